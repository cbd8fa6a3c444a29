"""A small corpus about one town, a model that reads it, and a record of the runs that LangChain announces."""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import config as runnables_config
from langchain_core.vectorstores import InMemoryVectorStore

from rlm_plugins.testing import ScriptedModel

QUESTION = "Who founded Velgar?"
TEXTS = (
    "Velgar was founded by Bora Tinel.",
    "The flag of Velgar is blue.",
    "The river at Velgar is the Tomb.",
    "Otters hold hands while they sleep.",
)


class WordCounts(Embeddings):
    """How often each known word stands in a text; the last place is always 1, so that no vector is zero."""

    words = ("founded", "velgar", "flag", "river", "otters", "bora")

    def embed_query(self, text: str) -> list[float]:
        found = re.findall(r"\w+", text.lower())
        return [float(found.count(word)) for word in self.words] + [1.0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    async def aembed_query(self, text: str) -> list[float]:
        return self.embed_query(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embed_documents(texts)


def make_store(texts: Sequence[str] = TEXTS) -> InMemoryVectorStore:
    store = InMemoryVectorStore(WordCounts())
    store.add_documents([Document(text, id=f"d{n}", metadata={"source": f"s{n}"}) for n, text in enumerate(texts)])
    return store


@pytest.fixture
def store() -> InMemoryVectorStore:
    return make_store()


@pytest.fixture
def store_of() -> Callable[[Sequence[str]], InMemoryVectorStore]:
    return make_store


@pytest.fixture
def embeddings() -> Embeddings:
    return WordCounts()


@pytest.fixture
def lm() -> ScriptedModel:
    return ScriptedModel({"founded by Bora": "Bora Tinel", "flag": "blue", "river": "the Tomb"}, confidence=0.8)


class Runs(BaseCallbackHandler):
    """What started under what: (kind, name, run id, parent id, tags, metadata)."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[str] = []

    def _start(
        self, kind: str, serialized: Any, run_id: Any, parent_run_id: Any, tags: Any, metadata: Any, **more: Any
    ):
        run = {"kind": kind, "id": run_id, "parent": parent_run_id, "tags": tags or [], "metadata": metadata or {}}
        self.started.append(run | {"name": more.get("name")})

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: Any, parent_run_id: Any = None, **more: Any
    ):
        self._start("model", serialized, run_id, parent_run_id, more.pop("tags"), more.pop("metadata"), **more)

    def on_retriever_start(self, serialized: Any, query: Any, *, run_id: Any, parent_run_id: Any = None, **more: Any):
        self._start("retriever", serialized, run_id, parent_run_id, more.pop("tags"), more.pop("metadata"), **more)

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **more: Any):
        self._start("chain", serialized, run_id, parent_run_id, more.pop("tags"), more.pop("metadata"), **more)

    def on_retriever_end(self, documents: Any, **_: Any) -> None:
        self.ended.append("retriever")

    def on_llm_end(self, response: Any, **_: Any) -> None:
        self.ended.append("model")

    def of(self, kind: str) -> dict[str, Any]:
        [run] = [run for run in self.started if run["kind"] == kind]
        return run


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Async code that hands its work to the loop's executor fails."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"run_in_executor was called with {args}")

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", refuse)
    monkeypatch.setattr(runnables_config, "run_in_executor", refuse)
    for module in ("language_models.chat_models", "retrievers", "vectorstores.base", "embeddings.embeddings"):
        monkeypatch.setattr(f"langchain_core.{module}.run_in_executor", refuse, raising=False)
