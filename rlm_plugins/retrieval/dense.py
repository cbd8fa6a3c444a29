"""Dense retrieval: the passages whose embeddings lie nearest to the query's.

s(d, x) = cos(E(d), E(x)), or the inner product <E(d), E(x)>
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..flows import Flow, arun, ask, run
from ..models import Embedder, Retriever
from ..requests import Embed
from ..texts import Passage
from .identity import identified
from .vectors import checked, unit

Metric = Literal["cosine", "inner_product"]


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is searched: an index, whose row i is `passages[i]`. Replaced as a whole, never changed."""

    index: Any
    passages: tuple[Passage, ...]
    rows: Mapping[str, int]


class DenseRetriever(Retriever):
    """Passages found by their embeddings, exactly unless given another index.

    - `metric="cosine"` stores unit vectors; `"inner_product"` stores the vectors as they are. Returned passages carry
      that as their score and its kind.
    - `index`: an empty faiss index for inner products, where an exact search is too slow; it is trained on the first
      passages if it needs training. Its scores are as exact as it is.
    - `batch_size`: how many texts the embedder is given at once.

    The text alone is embedded, without title or metadata. Passages without an id are named by their content. Equal
    scores stand in the order the passages were added. Searching is safe from several threads, also while passages are
    added. Raises `UsageError` for an unknown metric, an index that is not empty or not for inner products, and a
    `batch_size` below 1. Cost: a search reads every vector (100,000 of 384 dimensions: 154 MB, tens of milliseconds).
    """

    def __init__(
        self, embedder: Embedder, *, metric: Metric = "cosine", index: Any = None, batch_size: int = 64
    ) -> None:
        if metric not in ("cosine", "inner_product"):
            raise UsageError(f'metric must be "cosine" or "inner_product", got {metric!r}')
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size!r}")
        if index is not None:
            _check_empty(index)
        self._embedder = embedder
        self._metric: Metric = metric
        self._batch_size = batch_size
        self._stored = _Stored(index, (), {})
        self._adding = Lock()

    @classmethod
    def from_passages(
        cls,
        passages: Sequence[Passage],
        embedder: Embedder,
        *,
        metric: Metric = "cosine",
        index: Any = None,
        batch_size: int = 64,
    ) -> DenseRetriever:
        """A retriever over these passages, which are embedded now. Raises as `add` does."""
        retriever = cls(embedder, metric=metric, index=index, batch_size=batch_size)
        retriever.add(passages)
        return retriever

    def __len__(self) -> int:
        return len(self._stored.passages)

    @property
    def passages(self) -> tuple[Passage, ...]:
        """All passages, in the order they were added, as `retrieve` knows them (with an id)."""
        return self._stored.passages

    @property
    def metric(self) -> Metric:
        return self._metric

    @property
    def embedder(self) -> Embedder:
        return self._embedder

    def add(self, passages: Sequence[Passage]) -> None:
        """Embed passages and add them: all of them, or none where this raises.

        The index is copied, so that searches under way are not disturbed: add many at a time. Raises `UsageError` for
        an id that is there already or occurs twice and where the index refuses; `RetrievalError` for unusable
        embeddings.
        """
        named = self._new(passages)
        self._insert(named, run(self._embedded(named), self._embedder))

    async def aadd(self, passages: Sequence[Passage]) -> None:
        """`add` on an event loop."""
        named = self._new(passages)
        self._insert(named, await arun(self._embedded(named), self._embedder))

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        """The best k passages, best first; fewer where there are no more.

        Raises `UsageError` for a k below 1, `RetrievalError` for an unusable embedding of the query.
        """
        return run(self._found(query, k, exclude), self._embedder)

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        """`retrieve`, with the query embedded on the event loop; the search itself takes its milliseconds there."""
        return await arun(self._found(query, k, exclude), self._embedder)

    def save(self, folder: str | Path) -> None:
        """Write everything to a folder, which is made if need be; a retriever saved there before is replaced at once.

        Raises `UsageError` where metadata is not JSON, or the folder cannot be written.
        """
        from .saved import save

        stored = self._stored
        save(Path(folder), stored.index, stored.passages, metric=self._metric, fingerprint=self._embedder.fingerprint)

    @classmethod
    def load(
        cls, folder: str | Path, embedder: Embedder, *, batch_size: int = 64, trust_index: bool = False
    ) -> DenseRetriever:
        """A retriever as `save` left it. Nothing is unpickled and nothing embedded.

        An exact index is checked byte for byte. Others are read by faiss, which a file made for the purpose may crash:
        `trust_index=True` says that the folder is your own. Raises `UsageError` for a folder that is not a saved
        retriever, is damaged, of another version, or was made with an embedder of another fingerprint.
        """
        from .saved import load

        saved = load(Path(folder), embedder.fingerprint, trust_index=trust_index)
        retriever = cls(embedder, metric=saved.metric, batch_size=batch_size)
        rows = {str(passage.id): row for row, passage in enumerate(saved.passages)}
        retriever._stored = _Stored(saved.index, saved.passages, rows)
        return retriever

    # --- adding ---

    def _new(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        named = tuple(map(identified, passages))
        _merged_rows(self._stored.rows, named)
        return named

    def _embedded(self, passages: Sequence[Passage]) -> Flow[NDArray[np.float32]]:
        """Ask for the vectors [n, dim] of passages, a batch at a time."""
        batches: list[NDArray[np.float32]] = []
        for start in range(0, len(passages), self._batch_size):
            texts = tuple(passage.text for passage in passages[start : start + self._batch_size])
            dimension = batches[0].shape[1] if batches else self._dimension
            vectors = checked((yield from ask(Embed(texts, "document"))), texts, dimension=dimension)
            batches.append(self._scaled(vectors, texts))
        return np.concatenate(batches) if batches else np.zeros((0, 0), dtype=np.float32)

    def _scaled(self, vectors: NDArray[np.float32], texts: Sequence[str]) -> NDArray[np.float32]:
        return unit(vectors, texts).astype(np.float32) if self._metric == "cosine" else vectors

    @property
    def _dimension(self) -> int | None:
        return None if self._stored.index is None else int(self._stored.index.d)

    def _insert(self, passages: tuple[Passage, ...], vectors: NDArray[np.float32]) -> None:
        if not passages:
            return
        faiss: Any = importlib.import_module("faiss")
        with self._adding:
            stored = self._stored
            rows = _merged_rows(stored.rows, passages)
            if stored.index is None:
                index = faiss.IndexFlatIP(vectors.shape[1])
            else:
                checked(vectors, [passage.text for passage in passages], dimension=int(stored.index.d))
                index = faiss.clone_index(stored.index)
            try:
                if not index.is_trained:
                    index.train(vectors)
                index.add(vectors)
            except RuntimeError as error:
                raise UsageError(
                    f"the faiss index ({type(index).__name__}) refuses {len(vectors)} vectors: {error}; "
                    "train it beforehand, or use the exact index (index=None)"
                ) from error
            self._stored = _Stored(index, stored.passages + passages, rows)

    # --- searching ---

    def _found(self, query: str, k: int, exclude: frozenset[str]) -> Flow[tuple[Passage, ...]]:
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k!r}")
        stored = self._stored
        excluded = sorted({stored.rows[passage_id] for passage_id in exclude if passage_id in stored.rows})
        k = min(k, len(stored.passages) - len(excluded))
        if k < 1:
            return ()
        asked = checked((yield from ask(Embed((query,), "query"))), (query,), dimension=int(stored.index.d))
        scores, rows = _search(stored.index, self._scaled(asked, (query,)), k, excluded)
        if self._metric == "cosine":
            scores = np.clip(scores, -1.0, 1.0)
        order = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place]))
        return tuple(
            replace(stored.passages[int(rows[place])], score=float(scores[place]), score_kind=self._metric)
            for place in order
        )


def _search(
    index: Any, query: NDArray[np.float32], k: int, excluded: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores [<= k] and rows [<= k] of the best rows that are not excluded; `query` is [1, dim]."""
    faiss: Any = importlib.import_module("faiss")
    if excluded and isinstance(index, faiss.IndexFlat):
        left_out = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.asarray(excluded, dtype=np.int64)))
        scores, rows = index.search(query, k, params=faiss.SearchParameters(sel=left_out))
    else:  # other indices have selectors of their own kinds, or none: ask for as many more as may be dropped
        scores, rows = index.search(query, k + len(excluded))
    kept = (rows[0] >= 0) & ~np.isin(rows[0], np.asarray(excluded, dtype=np.int64))
    return scores[0][kept][:k], rows[0][kept][:k]


def _merged_rows(rows: Mapping[str, int], passages: Sequence[Passage]) -> dict[str, int]:
    merged = dict(rows)
    for passage in passages:
        name = str(passage.id)
        if name in merged:
            raise UsageError(
                f"the passage id {name!r} occurs twice, the second time with the text {passage.text[:60]!r}: ids must "
                "be unique; a passage without an id is named by its content, so leave repeated passages out"
            )
        merged[name] = len(merged)
    return merged


def _check_empty(index: Any) -> None:
    faiss: Any = importlib.import_module("faiss")
    if not isinstance(index, faiss.Index):
        raise UsageError(f"index must be a faiss index, got {type(index).__name__}")
    if index.ntotal:
        raise UsageError(f"index must be empty, got one with {index.ntotal} vectors whose passages are not known")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UsageError(
            "index must be for inner products (METRIC_INNER_PRODUCT), on unit vectors the cosine; "
            "got another metric: build it with faiss.index_factory(dim, ..., faiss.METRIC_INNER_PRODUCT)"
        )
