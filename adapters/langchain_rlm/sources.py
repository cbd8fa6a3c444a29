"""Where documents come from and how they are scored: decided once, for the chat model and the retriever alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast, get_args

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import VectorStore

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.weights import Weighting, document_weights
from rlm_plugins.models import Embedder, Retriever
from rlm_plugins.retrieval.scores import CachedEmbedder, Scores
from rlm_plugins.texts import Passage, ScoreKind

from .embeddings import embedder_from, known_embeddings
from .from_langchain import LangChainRetriever, passage_from_document

SCORE, SCORE_KIND, WEIGHT = "replug_score", "replug_score_kind", "replug_weight"
"""The metadata in which a `ReplugRetriever` says what it found."""


def retriever_from(source: Any, config: RunnableConfig | None = None) -> Retriever:
    """A retriever, a vector store (through its retriever, so that the search is a run of its own) or a retriever of the
    core. Raises `UsageError` for another object."""
    if isinstance(source, Retriever):
        return source
    if isinstance(source, VectorStore):
        source = source.as_retriever()
    if not isinstance(source, BaseRetriever):
        raise UsageError(
            f"a retriever must be a LangChain retriever or vector store, or a Retriever of rlm_plugins, got "
            f"{type(source).__name__}"
        )
    return LangChainRetriever(source, config=config)


class Embedders:
    """The embedder of the embeddings seen last, with the document vectors it has computed."""

    def __init__(self) -> None:
        self._last: tuple[Any, Embedder] | None = None

    def of(self, embeddings: Any) -> Embedder:
        last = self._last
        if last is None or last[0] is not embeddings:
            self._last = last = embeddings, CachedEmbedder(embedder_from(embeddings))
        return last[1]


def scoring(
    part: str,
    scores: Scores | None,
    embeddings: Any,
    source: Any,
    *,
    weights: Weighting,
    weight_temperature: float | None,
) -> tuple[Scores | None, Any]:
    """How documents are scored, and by which embeddings (None: by none); scores None keeps what passages carry.

    Raises `UsageError` where documents would have to be weighed without anything to weigh them by.
    """
    known = embeddings if embeddings is not None else known_embeddings(source)
    if scores is None and known is not None and weights != "uniform":
        scores = "embeddings"
    if scores == "embeddings" and known is None:
        raise UsageError(f'{part}(scores="embeddings") needs embeddings: {_CHOICES}')
    if scores is None and weights != "uniform" and not (source is None or isinstance(source, Retriever)):
        raise UsageError(f"{part} has no embeddings to score the documents of a {type(source).__name__}: {_CHOICES}")
    if scores == "rank":
        document_weights([1.0], "rank", weights=weights, temperature=weight_temperature)
    return scores, known if scores == "embeddings" else None


_CHOICES = (
    "pass embeddings=..., or a vector store (or its retriever) that knows its own, or choose scores from "
    '"rank" (with weight_temperature), "uniform" or a function of (query, passages), or weights="uniform"'
)


def passages_from(documents: Any) -> tuple[Passage, ...] | None:
    """Documents of a call, LangChain's or the core's; what a `ReplugRetriever` scored keeps its score.

    Raises `UsageError` for anything else.
    """
    if documents is None:
        return None
    if isinstance(documents, str | bytes | dict | Document | Passage) or not isinstance(documents, Iterable):
        raise UsageError(f"documents must be a list of Document or Passage, got {type(documents).__name__}")
    return tuple(_passage(document) for document in cast(Iterable[Any], documents))


def _passage(document: Any) -> Passage:
    if isinstance(document, Passage):
        return document
    if not isinstance(document, Document):
        raise UsageError(f"documents must hold Document or Passage, got {type(document).__name__}: Document(text)")
    passage = passage_from_document(document)
    score, kind = document.metadata.get(SCORE), document.metadata.get(SCORE_KIND)
    if isinstance(score, int | float) and kind in get_args(ScoreKind):
        return replace(passage, score=float(score), score_kind=cast(ScoreKind, kind))
    return passage
