#!/usr/bin/env bash
# Rules that no compiler holds: a purpose line on every module, no file too long to be read in one sitting.
set -euo pipefail
cd "$(dirname "$0")/.."
lines_max=700
bad=0
complain() {
  printf 'tidy: %s\n' "$1" >&2
  bad=1
}

while IFS= read -r file; do
  [ -f "$file" ] || continue
  case "$file" in
    */gen/* | */bindings.rs) continue ;; # generated
  esac
  head -n 3 "$file" | grep -q '^//!' || complain "$file: begins without a //! line that says what it is for"
  lines=$(wc -l <"$file")
  [ "$lines" -le "$lines_max" ] || complain "$file: $lines lines, at most $lines_max: make two modules of it"
done < <(git ls-files '*.rs')

exit "$bad"
