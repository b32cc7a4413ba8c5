# Sourced by the other scripts: goes to the crate and reports steps.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# step <what> <command...>: runs the command; says what it is, and how long it took.
step() {
  local what=$1 start=$SECONDS
  shift
  printf '== %s\n' "$what"
  if "$@"; then
    printf '== %s: %d s\n' "$what" $((SECONDS - start))
  else
    printf '== %s: failed after %d s\n' "$what" $((SECONDS - start)) >&2
    return 1
  fi
}
