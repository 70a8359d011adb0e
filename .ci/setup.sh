#!/bin/sh
# Makes the virtual environment $VENV with lowprec in editable mode and its extras $EXTRAS;
# with $JAX set, jax is pinned to that version. Uses uv where it is installed, else venv + pip.
set -eu

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [ -n "${JAX:-}" ]; then printf 'jax==%s\njaxlib==%s\n' "$JAX" "$JAX" > "$constraints"; fi

find_python() {
    for name in "${PYTHON:-}" python3.12 python3.13 python3.14 python3 python; do
        [ -n "$name" ] || continue
        if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then
            echo "$name"
            return
        fi
    done
}

python=$(find_python)
if command -v uv > /dev/null 2>&1; then
    uv venv --quiet --allow-existing ${python:+--python "$(command -v "$python")"} "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" --constraint "$constraints" --editable ".[$EXTRAS]"
elif [ -n "$python" ]; then
    "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet --constraint "$constraints" --editable ".[$EXTRAS]"
else
    echo "make: no Python >= 3.12 found (tried python3.12 python3.13 python3.14 python3 python);" \
         "install one, or name it: make $* PYTHON=/path/to/python3.12" >&2
    exit 1
fi
