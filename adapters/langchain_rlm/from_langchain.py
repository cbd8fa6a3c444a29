"""Inward: LangChain's parts as parts of the core. Converts, decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever

from rlm_plugins.errors import UsageError
from rlm_plugins.models import Embedder, Retriever
from rlm_plugins.retrieval import identified
from rlm_plugins.retrieval.foreign import foreign_fingerprint, searching
from rlm_plugins.texts import Passage, ScoreKind

if TYPE_CHECKING:
    from numpy.typing import NDArray


# --- documents -------------------------------------------------------------------------------------------------------


def passage_from_document(
    document: Document,
    *,
    score: float | None = None,
    score_kind: ScoreKind | None = None,
    id_key: str | None = None,
) -> Passage:
    """A document as a passage. The title is `metadata["title"]` where that is a string; the metadata is a copy.

    Several stores return documents without their id; `id_key` names the metadata field that has it (Qdrant's is
    "_id"), used where `document.id` is None.
    Raises `UsageError` for a score without its kind, or one that is not finite.
    """
    title = document.metadata.get("title")
    kept = None if id_key is None else document.metadata.get(id_key)
    return Passage(
        document.page_content,
        id=document.id if document.id is not None or kept is None else str(kept),
        title=title if isinstance(title, str) else None,
        score=score,
        score_kind=score_kind,
        metadata=dict(document.metadata),
    )


def document_from_passage(passage: Passage) -> Document:
    """A passage as a document, its title in `metadata["title"]`. A document has no place for the score."""
    metadata = dict(passage.metadata)
    if passage.title is not None:
        metadata.setdefault("title", passage.title)
    return Document(id=passage.id, page_content=passage.text, metadata=metadata)


# --- retrievers ------------------------------------------------------------------------------------------------------


class LangChainRetriever(Retriever):
    """A LangChain retriever or vector store as a retriever of the core.

    - A vector store is asked for k documents (and as many more as are excluded) by `similarity_search`.
    - A retriever is invoked with `config`, so that the callbacks and tags of a run reach it, and its answer is cut to
      k. It decides itself how many it finds; only one made by `store.as_retriever()` without a `k` is told ours.

    Documents without an id (see `id_key` in `passage_from_document`) are named by their content, so that they can be
    excluded too. Scores are None: what a store
    says is a cosine here, a distance there. Who knows what this one says names it in `score_kind`, and the passages
    carry it. Raises `UsageError` for another object, and for a `score_kind` beside a retriever, which gives no scores;
    `RetrievalError` where the search fails.
    """

    def __init__(
        self,
        source: BaseRetriever | VectorStore,
        *,
        config: RunnableConfig | None = None,
        score_kind: ScoreKind | None = None,
        id_key: str | None = None,
    ) -> None:
        if not isinstance(source, BaseRetriever | VectorStore):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a LangChain BaseRetriever or VectorStore, got {type(source).__name__}")
        if score_kind is not None and isinstance(source, BaseRetriever):
            raise UsageError(
                f"score_kind={score_kind!r} says what a vector store's scores mean, but a retriever "
                f"({type(source).__name__}) gives none: pass the vector store itself"
            )
        self._source = source
        self._config = config
        self._score_kind: ScoreKind | None = score_kind
        self._id_key = id_key

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        source, wanted = self._source, k + len(exclude)
        with searching(source):
            if isinstance(source, BaseRetriever):
                found = self._unscored(source.invoke(query, self._config, **_depth(source, wanted)))
            elif self._score_kind is None:
                found = self._unscored(source.similarity_search(query, k=wanted))
            else:
                found = self._scored(source.similarity_search_with_score(query, k=wanted))
        return _best(found, k, exclude)

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        source, wanted = self._source, k + len(exclude)
        with searching(source):
            if isinstance(source, BaseRetriever):
                found = self._unscored(await source.ainvoke(query, self._config, **_depth(source, wanted)))
            elif self._score_kind is None:
                found = self._unscored(await source.asimilarity_search(query, k=wanted))
            else:
                found = self._scored(await source.asimilarity_search_with_score(query, k=wanted))
        return _best(found, k, exclude)

    def _unscored(self, documents: Iterable[Document]) -> list[Passage]:
        return [passage_from_document(document, id_key=self._id_key) for document in documents]

    def _scored(self, found: Iterable[tuple[Document, float]]) -> list[Passage]:
        return [
            passage_from_document(document, score=float(score), score_kind=self._score_kind, id_key=self._id_key)
            for document, score in found
        ]


def _depth(retriever: BaseRetriever, wanted: int) -> dict[str, Any]:
    """How many to find, for a vector store's retriever whose user left that open."""
    if isinstance(retriever, VectorStoreRetriever) and "k" not in retriever.search_kwargs:
        return {"k": wanted}
    return {}


def _best(found: Sequence[Passage], k: int, exclude: frozenset[str]) -> tuple[Passage, ...]:
    named = map(identified, found)
    return tuple([passage for passage in named if passage.id not in exclude][:k])


# --- embeddings ------------------------------------------------------------------------------------------------------

_NAMES = ("model", "model_name", "model_id", "repo_id", "deployment", "azure_deployment", "deployment_name")
_SETTINGS = ("revision", "dimensions", "encode_kwargs", "query_encode_kwargs", "embed_instruction", "query_instruction")


class LangChainEmbedder(Embedder):
    """LangChain embeddings as an embedder of the core.

    The fingerprint is the class with the model's name and those settings that change vectors; keys, addresses and the
    like are not looked at. Raises `UsageError` for another object, and, only when the fingerprint is asked for, where
    nothing names the model and no `fingerprint` was given; `RetrievalError` where the embedding fails.
    """

    def __init__(self, embeddings: Embeddings, *, fingerprint: str | None = None) -> None:
        if not isinstance(embeddings, Embeddings):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected LangChain Embeddings, got {type(embeddings).__name__}")
        self._embeddings = embeddings
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint or foreign_fingerprint("langchain", self._embeddings, names=_NAMES, settings=_SETTINGS)

    def embed_query(self, text: str) -> NDArray[np.float32]:
        with searching(self._embeddings):
            return np.asarray(self._embeddings.embed_query(text), dtype=np.float32)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with searching(self._embeddings):
            return np.asarray(self._embeddings.embed_documents(list(texts)), dtype=np.float32)

    async def aembed_query(self, text: str) -> NDArray[np.float32]:
        with searching(self._embeddings):
            return np.asarray(await self._embeddings.aembed_query(text), dtype=np.float32)

    async def aembed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with searching(self._embeddings):
            return np.asarray(await self._embeddings.aembed_documents(list(texts)), dtype=np.float32)
