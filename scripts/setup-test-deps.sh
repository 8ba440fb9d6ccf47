#!/usr/bin/env bash
# Sets up what the tests need beyond a Rust toolchain, make and a C compiler: UCX's run-time library. Where it may not
# install, it says so, and the tests of that transport say so again.
set -euo pipefail

# ldconfig is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin
has_ucx() { ldconfig -p 2>/dev/null | grep -q 'libucp\.so\.0'; }
install() {
  export DEBIAN_FRONTEND=noninteractive
  local flags=(install -y --no-install-recommends libucx0)
  apt-get "${flags[@]}" || { apt-get update && apt-get "${flags[@]}"; }
}
say() { printf 'test set-up: %s\n' "$1"; }

if has_ucx; then
  say "UCX is installed: the UCX cases will run"
elif ! command -v apt-get >/dev/null 2>&1; then
  say "UCX is missing and there is no apt-get: install libucp.so.0 for the UCX cases; without it they are reported as not run"
elif [ "$(id -u)" -ne 0 ]; then
  say "UCX is missing and only root may install: run 'sudo apt-get install libucx0' for the UCX cases; without it they are reported as not run"
else
  say "installing libucx0 with apt-get"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if install >"$log" 2>&1; then
    say "libucx0 is installed: the UCX cases will run"
  else
    tail -n 5 "$log" | sed 's/^/test set-up:   /'
    say "libucx0 could not be installed (above): the UCX cases are reported as not run"
  fi
fi
