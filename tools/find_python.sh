#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Print the path of a Python interpreter that can make virtual environments.
#
#   tools/find_python.sh base     3.10 or newer; the pinned base version is tried first
#   tools/find_python.sh newest   3.12 or newer; the pinned newest version is tried first
#
# Looks at $PYTHON, at the interpreters on PATH, then at pyenv's. Exit code 1, with a sentence
# on stderr, when there is none.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/pins.env"

case "${1:-base}" in
    base)
        minimum=$PIN_PYTHON_MINIMUM
        names="python$PIN_PYTHON_BASE python3 python3.10 python3.11 python3.12 python3.13 python3.14"
        folders="$PIN_PYTHON_BASE 3.10 3.12 3.13 3.14"
        ;;
    newest)
        minimum=3.12
        names="python$PIN_PYTHON_NEWEST python3.12 python3.13 python3.14 python3"
        folders="$PIN_PYTHON_NEWEST 3.12 3.13 3.14"
        ;;
    *)
        echo "usage: $0 base|newest" >&2
        exit 2
        ;;
esac

# Asks the interpreter itself: a pyenv shim on PATH may stand for a version that is not active,
# and a distribution's Python may come without venv.
usable() {
    "$1" - "$minimum" 2>/dev/null <<'PROGRAM'
import sys
wanted = tuple(int(part) for part in sys.argv[1].split("."))
if sys.version_info[:2] < wanted:
    sys.exit(1)
import ensurepip, venv
print(sys.executable)
PROGRAM
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exit 0
    version=$("$PYTHON" --version 2>&1) || version="no interpreter"
    echo "PYTHON=$PYTHON is $version; Python $minimum or newer with the venv module is needed." >&2
    exit 1
fi
for name in $names; do
    usable "$name" && exit 0
done
for version in $folders; do
    for python in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python3; do
        [ -x "$python" ] && usable "$python" && exit 0
    done
done
found=$(python3 --version 2>&1) || found="no python3"
echo "Python $minimum or newer with the venv module is needed, found $found:" \
    "install one, or name it with PYTHON=/path/to/python3." >&2
exit 1
