"""REPLUG's document weights as a LangChain retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, PrivateAttr, ValidationError

from rlm_plugins.errors import UsageError
from rlm_plugins.flows import Batch, Flow, Handler, arun, ask, run
from rlm_plugins.methods.replug.weights import Weighting, passage_weights
from rlm_plugins.models import Embedder, Retriever, Router
from rlm_plugins.requests import Retrieve
from rlm_plugins.retrieval.scores import Scores, scored
from rlm_plugins.texts import Passage

from .arguments import refused
from .embeddings import known_embeddings
from .from_langchain import document_from_passage
from .sources import SCORE, SCORE_KIND, WEIGHT, Embedders, retriever_from, scoring


class ReplugRetriever(BaseRetriever):
    """Documents of a retriever or a vector store, scored anew and weighed as REPLUG weighs them, best first.

    Each is a copy whose metadata has `replug_score`, `replug_score_kind` and `replug_weight`; the weights sum to 1.
    `invoke(query, k=3)` wins over `k`. Raises `UsageError` at construction for arguments that are unknown or cannot
    work together, `RetrievalError` where the search or the embedding fails.
    """

    retriever: BaseRetriever | Retriever | None = None
    vectorstore: VectorStore | None = None
    embeddings: Embeddings | Embedder | None = None
    """None: the vector store's own."""
    scores: Scores | None = None
    """None: "embeddings" where embeddings are known, else what the passages of a core retriever carry."""
    k: int = 10
    weights: Weighting = "softmax"
    weight_temperature: float | None = None

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    _embedders: Embedders = PrivateAttr(default_factory=Embedders)

    def __init__(self, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            raise refused("ReplugRetriever", error, type(self).model_fields) from None
        if (self.retriever is None) == (self.vectorstore is None):
            raise UsageError("ReplugRetriever takes a retriever or a vectorstore, one of the two")
        self._parts(self.k, None)

    @property
    def scoring_embeddings(self) -> Embeddings | Embedder | None:
        """The embeddings that documents are scored by, as far as they are known."""
        return self.embeddings if self.embeddings is not None else known_embeddings(self._source)

    @property
    def _source(self) -> BaseRetriever | VectorStore | Retriever | None:
        return self.vectorstore if self.retriever is None else self.retriever

    def _parts(self, k: int | None, config: RunnableConfig | None) -> tuple[int, Scores | None, Handler]:
        k = self.k if k is None else k
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        scores, embeddings = scoring(
            "ReplugRetriever",
            self.scores,
            self.embeddings,
            self._source,
            weights=self.weights,
            weight_temperature=self.weight_temperature,
        )
        embedder = None if embeddings is None else self._embedders.of(embeddings)
        return k, scores, Router(_NoModel(), retriever=retriever_from(self._source, config), embedder=embedder)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        k, scores, handler = self._parts(k, RunnableConfig(callbacks=run_manager.get_child()))
        return self._documents(run(_found(query, k, scores), handler))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        k, scores, handler = self._parts(k, RunnableConfig(callbacks=run_manager.get_child()))
        return self._documents(await arun(_found(query, k, scores), handler))

    def _documents(self, passages: tuple[Passage, ...]) -> list[Document]:
        if not passages:
            return []
        weights = passage_weights(passages, weights=self.weights, temperature=self.weight_temperature)
        documents: list[Document] = []
        for passage, weight in zip(passages, weights.tolist(), strict=True):
            document = document_from_passage(passage)
            document.metadata |= {SCORE: passage.score, SCORE_KIND: passage.score_kind, WEIGHT: weight}
            documents.append(document)
        return documents


def _found(query: str, k: int, scores: Scores | None) -> Flow[tuple[Passage, ...]]:
    passages = yield from ask(Retrieve(query, k))
    if scores is not None:
        passages = yield from scored(query, passages, scores)
    return passages


class _NoModel:
    """Retrieval asks nothing of a language model."""

    def answer(self, batch: Batch) -> list[Any]:
        raise TypeError(f"a retriever has no language model, was asked {batch}")

    async def aanswer(self, batch: Batch) -> list[Any]:
        return self.answer(batch)
