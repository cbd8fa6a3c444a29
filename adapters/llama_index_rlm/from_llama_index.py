"""Inward: LlamaIndex's parts as parts of the core. Converts, decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, TextNode

from rlm_plugins.errors import UsageError
from rlm_plugins.models import Embedder, Retriever
from rlm_plugins.retrieval import identified
from rlm_plugins.retrieval.foreign import foreign_fingerprint, searching
from rlm_plugins.texts import Passage, ScoreKind

if TYPE_CHECKING:
    from numpy.typing import NDArray


# --- nodes -----------------------------------------------------------------------------------------------------------


def passage_from_node(
    node: NodeWithScore | BaseNode,
    *,
    score_kind: ScoreKind | None = None,
    metadata_mode: MetadataMode = MetadataMode.NONE,
) -> Passage:
    """A node as a passage. The title is `metadata["title"]` where that is a string; the metadata is a copy.

    The node's score means whatever its store says, so it is taken only by who names its kind in `score_kind`.
    `metadata_mode` says how much of the metadata stands in the text: by default none; `MetadataMode.LLM` and `EMBED`
    render it as LlamaIndex does for a language model and for an embedding model.
    Raises `UsageError` for a score that is not finite.
    """
    scored = isinstance(node, NodeWithScore)
    score = node.score if scored and score_kind is not None else None
    inner = node.node if scored else node
    title = inner.metadata.get("title")
    return Passage(
        inner.get_content(metadata_mode=metadata_mode),
        id=inner.node_id,
        title=title if isinstance(title, str) else None,
        score=None if score is None else float(score),
        score_kind=None if score is None else score_kind,
        metadata=dict(inner.metadata),
    )


def node_from_passage(passage: Passage) -> NodeWithScore:
    """A passage as a node, its title in `metadata["title"]`.

    LlamaIndex takes a larger score for a better one, so a distance or a rank stays behind.
    """
    metadata = dict(passage.metadata)
    if passage.title is not None:
        metadata.setdefault("title", passage.title)
    named: dict[str, Any] = {} if passage.id is None else {"id_": passage.id}
    node = TextNode(text=passage.text, metadata=metadata, **named)
    return NodeWithScore(node=node, score=None if passage.score_kind in ("distance", "rank") else passage.score)


# --- retrievers ------------------------------------------------------------------------------------------------------


class LlamaIndexRetriever(Retriever):
    """A LlamaIndex retriever or index as a retriever of the core.

    - An index is asked for k nodes (and as many more as are excluded) through `as_retriever(similarity_top_k=...)`.
      Indices that do not search by similarity ignore that number; their answer is cut to k.
    - A retriever finds as many nodes as it was built for (2, where its user said nothing), and is cut to k.

    `score_kind` and `metadata_mode` are those of `passage_from_node`. Raises `UsageError` for another object,
    `RetrievalError` where the search fails.
    """

    def __init__(
        self,
        source: BaseRetriever | BaseIndex[Any],
        *,
        score_kind: ScoreKind | None = None,
        metadata_mode: MetadataMode = MetadataMode.NONE,
    ) -> None:
        if not isinstance(source, BaseRetriever | BaseIndex):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a LlamaIndex retriever or index, got {type(source).__name__}")
        self._source = source
        self._score_kind: ScoreKind | None = score_kind
        self._metadata_mode = metadata_mode

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        with searching(self._source):
            found = self._retriever(k + len(exclude)).retrieve(query)
        return self._best(found, k, exclude)

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        with searching(self._source):
            found = await self._retriever(k + len(exclude)).aretrieve(query)
        return self._best(found, k, exclude)

    def _retriever(self, wanted: int) -> BaseRetriever:
        if isinstance(self._source, BaseRetriever):
            return self._source
        return self._source.as_retriever(similarity_top_k=wanted)

    def _best(self, found: Iterable[NodeWithScore], k: int, exclude: frozenset[str]) -> tuple[Passage, ...]:
        passages = [
            identified(passage_from_node(node, score_kind=self._score_kind, metadata_mode=self._metadata_mode))
            for node in found
        ]
        return tuple([passage for passage in passages if passage.id not in exclude][:k])


# --- embeddings ------------------------------------------------------------------------------------------------------

_NAMES = ("model_name", "model", "model_id", "deployment_name", "azure_deployment")
_SETTINGS = ("revision", "dimensions", "query_instruction", "text_instruction", "pooling", "normalize", "embed_dim")


class LlamaIndexEmbedder(Embedder):
    """A LlamaIndex embedding model as an embedder of the core; queries and texts go through their own methods.

    The fingerprint is the class with the model's name and those settings that change vectors; keys, addresses and the
    like are not looked at. Raises `UsageError` for another object, and, only when the fingerprint is asked for, where
    nothing names the model and no `fingerprint` was given; `RetrievalError` where the embedding fails.
    """

    def __init__(self, embed_model: BaseEmbedding, *, fingerprint: str | None = None) -> None:
        if not isinstance(embed_model, BaseEmbedding):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a LlamaIndex BaseEmbedding, got {type(embed_model).__name__}")
        self._embed_model = embed_model
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint or foreign_fingerprint(
            "llama_index", self._embed_model, names=_NAMES, settings=_SETTINGS
        )

    def embed_query(self, text: str) -> NDArray[np.float32]:
        with searching(self._embed_model):
            return np.asarray(self._embed_model.get_query_embedding(text), dtype=np.float32)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with searching(self._embed_model):
            return np.asarray(self._embed_model.get_text_embedding_batch(list(texts)), dtype=np.float32)

    async def aembed_query(self, text: str) -> NDArray[np.float32]:
        with searching(self._embed_model):
            return np.asarray(await self._embed_model.aget_query_embedding(text), dtype=np.float32)

    async def aembed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with searching(self._embed_model):
            return np.asarray(await self._embed_model.aget_text_embedding_batch(list(texts)), dtype=np.float32)
