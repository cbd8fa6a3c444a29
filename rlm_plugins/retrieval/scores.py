"""Scores that can be compared, whatever the store said.

A store's score is a cosine here and a squared distance there, one minus either, inverted, or missing. So a store is
asked for candidates, and the score is computed here: from the embeddings, from the rank, or by the caller's function.

| `scores` | score | kind |
|---|---|---|
| "embeddings" | cosine of the query's and the document's embedding | cosine |
| "rank" | 1, 2, 3, ... in the order given | rank |
| "uniform" | 1 for each, in the order given | uniform |
| a function of the query and the passages | what it returns | `kind`, said by the caller |
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..flows import Flow, arun, ask, ask_all, run
from ..models import Embedder
from ..requests import Embed
from ..texts import Passage, ScoreKind
from .vectors import checked, cosines, unit

Scores = Literal["embeddings", "rank", "uniform"] | Callable[[str, Sequence[Passage]], Sequence[float]]
"""Where the score of a retrieved passage comes from."""

_SMALLER_IS_BETTER: frozenset[ScoreKind] = frozenset({"distance", "rank"})


def scored(
    query: str, passages: Sequence[Passage], scores: Scores = "embeddings", *, kind: ScoreKind = "logit"
) -> Flow[tuple[Passage, ...]]:
    """The passages with comparable scores, best first; equal scores keep the order given.

    `kind` is the unit and the direction of what a function returns. A store's own score is used by saying what it is:
    `scored(query, passages, lambda query, passages: [p.score for p in passages], kind="distance")`.
    Asks `Embed` for "embeddings", nothing otherwise. Raises `UsageError` for an unknown option, and for a function
    that returns another number of scores, or one that is not finite; `RetrievalError` for unusable embeddings.
    """
    if scores == "embeddings":
        return (yield from rescored(query, passages))
    if scores == "rank":
        return score_by_rank(passages)
    if scores == "uniform":
        return score_uniform(passages)
    if not callable(scores):
        raise UsageError(f'scores must be "embeddings", "rank", "uniform" or a function, got {scores!r}')
    return _with_scores(passages, scores(query, passages), kind) if passages else ()


def rescored(query: str, passages: Sequence[Passage]) -> Flow[tuple[Passage, ...]]:
    """The passages with their cosine to the query, best first; equal cosines keep the order given.

        s(d, x) = cos(E(d), E(x))

    Cost: one query and the passages' texts to embed, nothing where there are no passages. The text alone is embedded,
    without title or metadata. Raises `RetrievalError` for vectors that are zero, not finite or of unequal dimension.
    """
    if not passages:
        return ()
    texts = tuple(passage.text for passage in passages)
    asked, found = yield from ask_all([Embed((query,), "query"), Embed(texts, "document")])
    one = unit(checked(asked, (query,)), (query,))
    many = unit(checked(found, texts, dimension=one.shape[1]), texts)
    return _with_scores(passages, cosines(one[0], many).tolist(), "cosine")


def score_by_embeddings(query: str, passages: Sequence[Passage], embedder: Embedder) -> tuple[Passage, ...]:
    """`rescored`, answered by an embedder."""
    return run(rescored(query, passages), embedder)


async def ascore_by_embeddings(query: str, passages: Sequence[Passage], embedder: Embedder) -> tuple[Passage, ...]:
    """`rescored`, answered by an embedder on an event loop."""
    return await arun(rescored(query, passages), embedder)


def score_by_rank(passages: Sequence[Passage]) -> tuple[Passage, ...]:
    """The passages numbered from 1 in the order given, best first.

    >>> [passage.score for passage in score_by_rank([Passage("first"), Passage("second")])]
    [1.0, 2.0]
    """
    return tuple(replace(p, score=float(rank), score_kind="rank") for rank, p in enumerate(passages, start=1))


def score_uniform(passages: Sequence[Passage]) -> tuple[Passage, ...]:
    """The passages with no difference made between them: a score of 1 each, in the order given."""
    return tuple(replace(passage, score=1.0, score_kind="uniform") for passage in passages)


def _with_scores(passages: Sequence[Passage], scores: Sequence[float], kind: ScoreKind) -> tuple[Passage, ...]:
    try:
        values = [float(score) for score in scores]
    except TypeError as error:
        raise UsageError(f"a score function must return one number for each passage: {error}") from error
    if len(values) != len(passages):
        raise UsageError(f"the score function was given {len(passages)} passages and returned {len(values)} scores")
    if not all(map(math.isfinite, values)):
        raise UsageError(f"the score function returned a score that is not finite: {values}")
    sign = 1.0 if kind in _SMALLER_IS_BETTER else -1.0
    order = sorted(range(len(values)), key=lambda index: sign * values[index])
    return tuple(replace(passages[index], score=values[index], score_kind=kind) for index in order)


class CachedEmbedder(Embedder):
    """An embedder that remembers document vectors by the content of their texts; the least recently used go first.

    With it, scoring candidates embeds no document twice. Queries are not kept. `max_items` vectors of dim float32 are
    held: 10,000 of 1,024 dimensions are 41 MB. Safe to use from several threads; two of them that meet a new document
    at the same moment may both embed it. Raises `UsageError` for a `max_items` below 1.
    """

    def __init__(self, embedder: Embedder, *, max_items: int = 10_000) -> None:
        if max_items < 1:
            raise UsageError(f"max_items must be at least 1, got {max_items!r}")
        self._embedder = embedder
        self._max_items = max_items
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = Lock()

    @property
    def fingerprint(self) -> str:
        return self._embedder.fingerprint

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return self._embedder.embed_query(text)

    async def aembed_query(self, text: str) -> NDArray[np.float32]:
        return await self._embedder.aembed_query(text)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return run(self._documents(texts), self._embedder)

    async def aembed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return await arun(self._documents(texts), self._embedder)

    def _documents(self, texts: Sequence[str]) -> Flow[NDArray[np.float32]]:
        """Ask for the texts that are not known, each once. Vectors [n, dim]."""
        if not texts:
            return (yield from ask(Embed((), "document")))
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        vectors = self._known(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in vectors}
        if missing:
            asked = tuple(missing.values())
            found = checked((yield from ask(Embed(asked, "document"))), asked)
            new = {key: row.copy() for key, row in zip(missing, found, strict=True)}
            vectors |= new
            self._keep(new)
        return np.stack([vectors[key] for key in keys])

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        with self._lock:
            known = {key: self._vectors[key] for key in keys if key in self._vectors}
            for key in known:
                self._vectors.move_to_end(key)
        return known

    def _keep(self, new: dict[bytes, NDArray[np.float32]]) -> None:
        with self._lock:
            self._vectors |= new
            while len(self._vectors) > self._max_items:
                self._vectors.popitem(last=False)
