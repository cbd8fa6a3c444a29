"""A town with a founder, a model that reads, an embedder that counts words, and Settings that must not be touched."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llama_index.core")

import llama_index.core
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_rlm import RLMEmbedding

from rlm_plugins.models import Embedder
from rlm_plugins.testing import ScriptedModel


class WordEmbedder(Embedder):
    """Counts words, each in one of 64 places."""

    def __init__(self) -> None:
        self.embedded: list[str] = []

    @property
    def fingerprint(self) -> str:
        return "words-64"

    def embed_query(self, text: str) -> NDArray[np.float32]:
        vector = np.zeros(64, dtype=np.float32)
        for word in text.lower().replace("?", "").replace(".", "").split():
            vector[zlib.crc32(word.encode()) % 64] += 1
        return vector

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.embedded += texts
        return np.stack([self.embed_query(text) for text in texts])


class FixedRetriever(BaseRetriever):
    """Finds what it was told to, with the scores it was told to."""

    def __init__(self, nodes: Sequence[NodeWithScore]) -> None:
        self.nodes = list(nodes)
        self.asked: list[str] = []
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle.query_str)
        return list(self.nodes)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._retrieve(query_bundle)


class Events(BaseEventHandler):
    """Keeps every event, with the names of the spans that were opened."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.seen]


def _reads(prompt: str) -> str:
    return "Bora Tinel" if "Bora Tinel" in prompt else "the river Osk"


@pytest.fixture(autouse=True)
def _settings_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset Settings, and no model loaded by LlamaIndex itself."""

    def only_given(resolve: Callable[..., Any]) -> Callable[..., Any]:
        def given(model: Any, *args: Any, **kwargs: Any) -> Any:
            assert model != "default", "Settings was touched while unset: LlamaIndex would load OpenAI"
            return resolve(model, *args, **kwargs)

        return given

    import llama_index.core.settings as settings

    for name in ("resolve_llm", "resolve_embed_model"):
        monkeypatch.setattr(settings, name, only_given(getattr(settings, name)))
    for name in ("_llm", "_embed_model", "_callback_manager", "_prompt_helper"):
        monkeypatch.setattr(Settings, name, None)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", str.split)


@pytest.fixture
def lm() -> ScriptedModel:
    return ScriptedModel(_reads)


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture
def question() -> str:
    return "Who founded the town of Velgar?"


@pytest.fixture
def nodes() -> list[NodeWithScore]:
    """As a store gives them: the scores are distances, so the worst has the largest."""
    texts = {
        "founder": "Bora Tinel founded the town of Velgar.",
        "river": "The river Osk flows past.",
        "tower": "A tower stands here.",
    }
    return [
        NodeWithScore(node=TextNode(text=text, id_=name, metadata={"page": place}), score=place / 2)
        for place, (name, text) in enumerate(texts.items())
    ]


@pytest.fixture
def index(nodes: list[NodeWithScore], embedder: WordEmbedder) -> VectorStoreIndex:
    return VectorStoreIndex([found.node for found in nodes], embed_model=RLMEmbedding(embedder))


@pytest.fixture
def fixed_retriever(nodes: list[NodeWithScore]) -> FixedRetriever:
    return FixedRetriever(nodes)


@pytest.fixture
def retriever_of() -> type[FixedRetriever]:
    return FixedRetriever


@pytest.fixture
def events() -> Iterator[Events]:
    root = get_dispatcher()
    handler = Events(seen=[])
    before = list(root.event_handlers)
    root.event_handlers = [*before, handler]
    yield handler
    root.event_handlers = before


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    root = get_dispatcher()
    handler = SimpleSpanHandler()
    before = list(root.span_handlers)
    root.span_handlers = [*before, handler]
    yield handler
    root.span_handlers = before


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Async code that hands its work to the loop's threads is not async."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work was handed to the event loop's threads")

    monkeypatch.setattr(asyncio, "to_thread", refuse)
    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", refuse)
