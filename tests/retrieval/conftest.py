from __future__ import annotations

import hashlib
from collections.abc import Sequence

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from rlm_plugins.models import Embedder


class HashingEmbedder(Embedder):
    """Words hashed into a small vector; counts what it is asked."""

    def __init__(self, dimension: int = 32, name: str = "hashing-32") -> None:
        self.dimension = dimension
        self.name = name
        self.documents: list[str] = []
        self.queries: list[str] = []
        self.asynchronous = 0

    @property
    def fingerprint(self) -> str:
        return self.name

    def embed_query(self, text: str) -> NDArray[np.float32]:
        self.queries.append(text)
        return self._vector(text)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.documents += texts
        rows = [self._vector(text) for text in texts]
        return np.stack(rows) if rows else np.zeros((0, self.dimension), dtype=np.float32)

    async def aembed_query(self, text: str) -> NDArray[np.float32]:
        self.asynchronous += 1
        return self.embed_query(text)

    async def aembed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asynchronous += 1
        return self.embed_documents(texts)

    def _vector(self, text: str) -> NDArray[np.float32]:
        vector = np.zeros(self.dimension)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:8], "big")
            vector += np.random.default_rng(seed).standard_normal(self.dimension)
        return vector.astype(np.float32)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small searches are slowed by many threads, most of all on a busy machine."""
    faiss.omp_set_num_threads(1)


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
def make_embedder() -> type[HashingEmbedder]:
    return HashingEmbedder
