"""Outward: an embedder of the core as a LlamaIndex embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from rlm_plugins.errors import UsageError
from rlm_plugins.models import Embedder

from .llm import refuse_unknown, refuse_unpicklable


class RLMEmbedding(BaseEmbedding):
    """An `Embedder` as a LlamaIndex embedding model, for indices and wherever one is asked for.

    `model_name` is the embedder's fingerprint, so that caches and stores can tell embedders apart. The other fields are
    LlamaIndex's: `embed_batch_size`, `callback_manager`, `num_workers`, `embeddings_cache`.
    Raises `UsageError` for an object that is not an embedder, and for an unknown argument.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    embedder: Any = Field(exclude=True, description="The embedder of rlm_plugins.")

    def __init__(self, embedder: Embedder, **fields: Any) -> None:
        refuse_unknown("RLMEmbedding", fields, type(self).model_fields)
        if not isinstance(embedder, Embedder):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected an Embedder of rlm_plugins, got {type(embedder).__name__}")
        given: dict[str, Any] = {"embedder": embedder, "model_name": embedder.fingerprint, **fields}
        super().__init__(**given)

    @classmethod
    def class_name(cls) -> str:
        return "RLMEmbedding"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> RLMEmbedding:
        """The same embedder: it is not copied."""
        return self.model_copy()

    def __getstate__(self) -> dict[Any, Any]:
        refuse_unpicklable(self, ("embedder",))
        return cast("dict[Any, Any]", super().__getstate__())

    def _get_query_embedding(self, query: str) -> list[float]:
        return _plain(self._embedder().embed_query(query))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return _plain(await self._embedder().aembed_query(query))

    def _get_text_embedding(self, text: str) -> list[float]:
        return _plain(self._embedder().embed_documents([text])[0])

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return _plain((await self._embedder().aembed_documents([text]))[0])

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return _rows(self._embedder().embed_documents(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return _rows(await self._embedder().aembed_documents(texts))

    def _embedder(self) -> Embedder:
        return self.embedder


def _plain(vector: NDArray[np.float32]) -> list[float]:
    return np.asarray(vector, dtype=np.float64).tolist()


def _rows(vectors: Sequence[Any] | NDArray[np.float32]) -> list[list[float]]:
    return [_plain(vector) for vector in vectors]
