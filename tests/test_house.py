"""The rules of the house: what an import loads, what is public, who may know whom."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rlm_plugins

ROOT = Path(__file__).parents[1]
CORE = ROOT / "rlm_plugins"
FRAMEWORKS = {"langchain", "langchain_core", "langchain_community", "langgraph", "llama_index", "llama_index_core"}
ADAPTERS = {"langchain_rlm", "llama_index_rlm"}
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "faiss",
    "pydantic",
    "openai",
    "httpx",
    "jinja2",
    "safetensors",
    "asyncpg",
}
MAY_KNOW_FRAMEWORKS = {"demo.py"}
"""The demo shows REPLUG in both frameworks, and imports them when it runs."""

PUBLIC = [
    "CONTINUATION",
    "PAPER",
    "QUESTION_ANSWER",
    "Capabilities",
    "Chunk",
    "DeadlineExceeded",
    "DenseRetriever",
    "Embedder",
    "Generation",
    "LanguageModel",
    "Message",
    "MissingExtra",
    "ModelError",
    "OpenAICompatibleLM",
    "Passage",
    "PromptTemplate",
    "RLMError",
    "Replug",
    "ReplugSettings",
    "RetrievalError",
    "Retriever",
    "Sampling",
    "Scoring",
    "TokenLogprob",
    "TransformersLM",
    "Unsupported",
    "Usage",
    "UsageError",
    "aprobe",
    "embedded_encoder",
    "embedded_reader",
    "probe",
]
"""Every public name, in order: a change here is a change for users."""

SOURCES = sorted(CORE.rglob("*.py"))


def imported_by(module: str) -> tuple[set[str], float]:
    """The top-level packages that a fresh interpreter has loaded after importing `module`, and the seconds it took
    beyond numpy."""
    code = (
        "import json, sys, time, numpy; start = time.perf_counter()\n"
        f"import {module}\n"
        "took = time.perf_counter() - start\n"
        "print(json.dumps([sorted({name.split('.')[0] for name in sys.modules}), took]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, took = json.loads(done.stdout)
    return set(loaded), took


def imports(tree: ast.AST, *, package: tuple[str, ...]) -> set[str]:
    """Every module that a file imports anywhere, by its absolute name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def test_importing_the_core_loads_no_framework_and_nothing_heavy(
    record_property: Callable[[str, object], None],
) -> None:
    loaded, took = imported_by("rlm_plugins")
    record_property("import rlm_plugins: seconds beyond numpy", round(took, 3))
    assert not loaded & (FRAMEWORKS | ADAPTERS | HEAVY)
    assert loaded & {"rlm_plugins"}


@pytest.mark.parametrize("module", ["rlm_plugins.testing", "rlm_plugins.methods.replug.ensemble", "rlm_plugins.cli"])
def test_neither_do_the_parts_a_frozen_endpoint_needs(module: str) -> None:
    loaded, _ = imported_by(module)
    assert not loaded & (FRAMEWORKS | ADAPTERS | {"torch", "transformers", "faiss"})


def test_the_public_names_are_these_and_can_be_imported() -> None:
    assert list(getattr(rlm_plugins, "__all__", [])) == PUBLIC
    for name in PUBLIC:
        assert getattr(rlm_plugins, name) is not None


def test_every_module_can_be_imported_by_itself() -> None:
    for path in (CORE / "flows.py", CORE / "tokens.py", CORE / "traces.py", CORE / "methods/replug/ensemble.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert importlib.import_module(name).__doc__, f"{name} says nothing about itself"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    printed = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not printed or path.name == "cli.py", f"print outside the command line, lines {printed}"
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    known = {name.split(".")[0] for name in imports(tree, package=package)}
    if path.name not in MAY_KNOW_FRAMEWORKS:
        assert not known & FRAMEWORKS, "the core knows no framework"
        assert not known & ADAPTERS, "the core knows no adapter"
    stars = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars, "star import"


@pytest.mark.parametrize("path", sorted((CORE / "methods").rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_a_method_does_no_io_and_has_no_clock_no_chance_and_no_log(path: Path) -> None:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {name.split(".")[0] for name in imports(tree, package=package)}
    assert not known & {
        "time",
        "datetime",
        "random",
        "secrets",
        "logging",
        "asyncio",
        "threading",
        "socket",
        "requests",
    }
    assert not known & {"os", "pathlib", "io", "subprocess", "urllib", "http", "httpx", "openai"}
    source = ast.unparse(tree)
    assert "open(" not in source
    assert "np.random" not in source


def test_adapters_is_no_package() -> None:
    """`adapters` is another project's import name: with an `__init__.py`, an editable install would shadow it."""
    assert (ROOT / "adapters").is_dir()
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_the_reader_of_imports_sees_relative_and_absolute_ones() -> None:
    tree = ast.parse("import a.b\nfrom .x import y\nfrom ..z import w\nfrom . import v\ndef f():\n    import langgraph")
    assert imports(tree, package=("p", "q")) == {"a.b", "p.q.x", "p.z", "p.q", "langgraph"}
