#!/bin/sh
# Makes .venv with everything pinned: uv where it can be had (seconds), plain pip otherwise.
# The same files give the CUDA build of torch on a GPU machine and a CPU build where one is offered.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: Python 3.11 or newer is needed; '$PYTHON' is $("$PYTHON" --version 2>&1 || echo missing)." >&2
    echo "       Set PYTHON=/path/to/python3.11 and run again." >&2
    exit 2
fi

make_venv() { "$PYTHON" -m venv --clear .venv >/dev/null 2>&1; }
if ! make_venv; then
    # Debian and Ubuntu keep ensurepip in a package of its own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv" >&2
        apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
        make_venv
    else
        echo "setup: cannot create a virtual environment; run: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi

links=$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)
if .venv/bin/python -m pip install -q --disable-pip-version-check uv 2>/dev/null; then
    # Compiled now, once: else every process whose Python writes no bytecode compiles torch again.
    UV_FIND_LINKS="$links" .venv/bin/uv pip install --compile-bytecode --python .venv/bin/python -e '.[dev]' -c constraints.txt
else
    .venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
fi
touch .venv/.ready
