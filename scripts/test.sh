#!/usr/bin/env bash
# Builds the services (the integration tests start them as processes), runs every test of the workspace, and says at the
# end what could not run here. Usage: scripts/test.sh [threads]
set -euo pipefail
cd "$(dirname "$0")/.."
threads=${1:-2}

cargo build --release --workspace --bins
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Tests print what they cannot run as lines that begin with "NOT RUN:"; --nocapture lets them through.
status=0
cargo test --release --workspace -- --test-threads "$threads" --nocapture 2>&1 | tee "$log" || status=$?

printf '\n== summary ==\n'
grep -hoE 'test result: .*' "$log" |
  awk '{ passed += $4; failed += $6; ignored += $8 } END { printf "%d tests passed, %d failed, %d ignored\n", passed, failed, ignored }'
if grep -q 'UCX: .*: ran on ' "$log"; then
  # Whole suites by name; the transport's own cases are many, so they are counted.
  grep -hoE 'UCX: .*: ran on .*' "$log" | sort -u |
    awk '/^UCX: transport: /{n++; sub(/.*: ran on /, ""); on = $0; next} {print} END {if (n) print "UCX: " n " transport cases: ran on " on}'
else
  echo 'UCX: no case says that it ran'
fi
if grep -q 'NOT RUN: ' "$log"; then
  echo 'not run here:'
  grep -hoE 'NOT RUN: .*' "$log" | sort -u | sed 's/^/  /'
else
  echo 'every case ran'
fi
exit "$status"
