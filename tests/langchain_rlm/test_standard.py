"""LangChain's own standard tests, over a scripted model and, where the weights are shipped, the embedded reader.

What is skipped, and why, is listed in tests/README.md.
"""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_tests")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_rlm import ChatReplug, ReplugRetriever, RLMEmbeddings
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from rlm_plugins.models import Embedder
from rlm_plugins.testing import ScriptedModel


def _store() -> InMemoryVectorStore:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
    store.add_documents([Document(f"Fact number {n}.", id=str(n)) for n in range(8)])
    return store


STORE = _store()
MODEL = ScriptedModel(lambda prompt: "Hello, you there. I am well.")


class _Chat:
    """What the unit and the integration tests are told alike."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatReplug

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": MODEL, "retriever": STORE, "k": 3}

    @property
    def enable_vcr_tests(self) -> bool:
        return True  # nothing is recorded, for nothing is requested: the test measures the model itself

    @property
    def supports_model_override(self) -> bool:
        return False  # the model is an object, not a name


class TestChatReplugUnit(_Chat, ChatModelUnitTests):
    pass


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # nothing was recorded to play back
class TestChatReplugIntegration(_Chat, ChatModelIntegrationTests):
    pass


class TestReplugRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return ReplugRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"vectorstore": STORE}

    @property
    def retriever_query_example(self) -> str:
        return "Fact number 3."


class _LetterCounts(Embedder):
    """How often each letter stands in a text."""

    @property
    def fingerprint(self) -> str:
        return "letter-counts"

    def embed_query(self, text: str) -> Any:
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: Any) -> Any:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return np.array([[text.lower().count(letter) for letter in letters] for text in texts], dtype=np.float32)


class _Embeddings:
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return RLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"embedder": _LetterCounts()}


class TestRLMEmbeddingsUnit(_Embeddings, EmbeddingsUnitTests):
    pass


class TestRLMEmbeddingsIntegration(_Embeddings, EmbeddingsIntegrationTests):
    pass
