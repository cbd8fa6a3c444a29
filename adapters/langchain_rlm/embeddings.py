"""Embeddings, both ways: an embedder of the core as LangChain embeddings, and whatever is given as an embedder."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever

from rlm_plugins.errors import UsageError
from rlm_plugins.models import Embedder

from .from_langchain import LangChainEmbedder


class RLMEmbeddings(Embeddings):
    """An embedder of the core, `embedded_encoder()` for one, as LangChain embeddings. Raises `UsageError` for another
    object."""

    def __init__(self, embedder: Embedder) -> None:
        if not isinstance(embedder, Embedder):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"RLMEmbeddings takes an Embedder of rlm_plugins, got {type(embedder).__name__}")
        self.embedder = embedder

    def embed_query(self, text: str) -> list[float]:
        return self.embedder.embed_query(text).tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embedder.embed_documents(texts).tolist() if texts else []

    async def aembed_query(self, text: str) -> list[float]:
        return (await self.embedder.aembed_query(text)).tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return (await self.embedder.aembed_documents(texts)).tolist() if texts else []


def embedder_from(embeddings: Any) -> Embedder:
    """Embeddings, or an embedder of the core, as an embedder. Raises `UsageError` for another object."""
    if isinstance(embeddings, Embedder):
        return embeddings
    if isinstance(embeddings, RLMEmbeddings):
        return embeddings.embedder
    return LangChainEmbedder(embeddings)


def known_embeddings(source: Any) -> Embeddings | Embedder | None:
    """The embeddings a vector store says it uses, also behind its retriever; None where nobody says."""
    if isinstance(source, VectorStoreRetriever):
        return known_embeddings(source.vectorstore)
    if isinstance(source, VectorStore):
        try:
            return source.embeddings
        except (ValueError, NotImplementedError):  # some stores raise where they have none
            return None
    return getattr(source, "scoring_embeddings", None)
