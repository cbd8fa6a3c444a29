#!/usr/bin/env bash
# The adapters against the oldest and the newest supported frameworks, without torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

# newest: langchain-core may ask for a certifi newer than an index holds, and pip would then quietly take an older core
overrides=$(mktemp)
echo "certifi" >"$overrides"
trap 'rm -f "$overrides"' EXIT

tools=.venv-matrix-tools
[ -x $tools/bin/uv ] || { "$python" -m venv $tools && $tools/bin/python -m pip --disable-pip-version-check install -q uv; }
find_links=()
[ -z "${PIP_FIND_LINKS:-}" ] || find_links=(--find-links "$PIP_FIND_LINKS")

run() {
    local name=$1 venv=.venv-matrix-$1
    shift
    echo "--- $name: $*"
    $tools/bin/uv venv -q --clear --python "$python" "$venv"
    $tools/bin/uv pip install -q --python "$venv/bin/python" --overrides "$overrides" "${find_links[@]}" \
        --editable ".[langchain,llama-index]" pytest pytest-asyncio hypothesis "$@"
    $tools/bin/uv pip list --python "$venv/bin/python" 2>/dev/null | grep -E '^(langchain|llama-index|langgraph)' || true
    RLM_MAY_LACK="torch,transformers,sentence_transformers,chromadb,qdrant_client,langchain_chroma,langchain_qdrant,openai" \
        "$venv/bin/python" -m pytest -q tests/langchain_rlm tests/llama_index_rlm
}

# the releases around a core are named, for a resolver left alone goes back to langchain 0.0
run floor langchain-core==1.2.5 llama-index-core==0.13.0 "langchain>=1.2,<1.3" "langgraph>=1.0,<1.1" \
    "langgraph-prebuilt<1.0.9" "aiohttp<3.13" langchain-tests  # its vcrpy does not know a newer aiohttp
run newest --upgrade langchain-core llama-index-core "langchain>=1.2" langgraph langchain-tests
