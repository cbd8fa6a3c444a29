"""A real server in an environment of its own, on the loopback address, ended by its process id.

`tools/test_server.sh` builds the environment (`.venv-vllm`) and runs these tests. RLM_TEST_SERVER names an address
that is served already; then RLM_TEST_MODEL is the folder it serves, and RLM_TEST_NAME the name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention computes on a CPU."""
STARTS_WITHIN = float(os.environ.get("RLM_TEST_SERVER_SECONDS", "600"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only where they are asked for by name: `-m server`."""
    if "server" not in (config.option.markexpr or ""):
        real = [item for item in items if item.get_closest_marker("server")]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]


@dataclass(frozen=True)
class Served:
    base_url: str
    model: str
    folder: Path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is served: the embedded reader if it is there, else a tiny random Llama."""
    if "RLM_TEST_MODEL" in os.environ:
        return Path(os.environ["RLM_TEST_MODEL"])
    reader = ROOT / "rlm_plugins" / "reader" / "weights"
    if (reader / "config.json").exists() and _head_width(reader) in HEAD_WIDTHS:
        return reader
    return _tiny_llama(tmp_path_factory.mktemp("tiny"))


def _head_width(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _tiny_llama(folder: Path) -> Path:
    """The random Llama of the other tests, with heads that the server can compute."""
    import torch
    import transformers

    spec = importlib.util.spec_from_file_location("models_for_tests", ROOT / "tests" / "models_for_tests.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    config = transformers.LlamaConfig(
        vocab_size=made.vocabulary(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.12,  # wide: near-uniform logits would hide off-by-one errors
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    made.hf_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM on the CPU in float32, serving the folder as `served`."""
    if "RLM_TEST_SERVER" in os.environ:
        yield Served(os.environ["RLM_TEST_SERVER"], os.environ.get("RLM_TEST_NAME", "served"), folder)
        return
    if not PYTHON.exists():
        pytest.skip("needs vllm in .venv-vllm: run tools/test_server.sh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "served", "--dtype", "float32", "--max-logprobs", "20", "--enforce-eager"]
    command += ["--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with log.open("w") as written:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=written, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield Served(f"http://127.0.0.1:{port}/v1", "served", folder)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"the server did not answer within {STARTS_WITHIN:g} seconds:\n{log.read_text()[-3000:]}")
