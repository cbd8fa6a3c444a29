"""Reciprocal rank fusion: one ranking from several, by ranks alone.

    RRF(d) = sum_r 1 / (k_constant + rank_r(d))        (Cormack, Clarke and Büttcher 2009; k_constant = 60)

Ranks need no common unit of score, so a dense and a lexical retriever can be fused as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ..errors import UsageError
from ..models import Retriever
from ..texts import Passage
from .identity import content_id


def fuse(rankings: Sequence[Sequence[Passage]], *, k_constant: float = 60.0) -> tuple[Passage, ...]:
    """Rankings, each best first, as one. Passages are the same where their ids are, or, without an id, their content.

    The score is the new rank, from 1 (`score_kind="rank"`); the sum itself is neither a probability nor a similarity
    and stands in `metadata["rrf_score"]`. Equal sums keep the order in which the passages were first met. A passage
    met twice in one ranking counts at its better rank; its first form met is the one returned.
    Raises `UsageError` for a `k_constant` that is not above 0.

    >>> fused = fuse([[Passage("a"), Passage("b")], [Passage("b"), Passage("c")]])
    >>> [(passage.text, passage.score) for passage in fused]
    [('b', 1.0), ('a', 2.0), ('c', 3.0)]
    """
    if not k_constant > 0:
        raise UsageError(f"k_constant must be above 0, got {k_constant!r}")
    met_first = reversed([passage for ranking in rankings for passage in ranking])
    named = {content_id(passage): passage.id for passage in met_first if passage.id is not None}
    first: dict[str, Passage] = {}
    sums: dict[str, float] = {}
    for ranking in rankings:
        met: set[str] = set()
        for rank, passage in enumerate(ranking, start=1):
            key = passage.id if passage.id is not None else named.get(content_id(passage), content_id(passage))
            if key not in met:
                met.add(key)
                first.setdefault(key, replace(passage, id=key))
                sums[key] = sums.get(key, 0.0) + 1.0 / (k_constant + rank)
    order = sorted(sums, key=lambda key: -sums[key])
    return tuple(
        replace(
            first[key],
            score=float(rank),
            score_kind="rank",
            metadata={**first[key].metadata, "rrf_score": sums[key]},
        )
        for rank, key in enumerate(order, start=1)
    )


class FusionRetriever(Retriever):
    """Several retrievers as one, by reciprocal rank fusion (see `fuse`).

    Each is asked for `candidates` passages (or for k, where that is more); on an event loop all at once. If one fails,
    so does the fusion. Raises `UsageError` for no retrievers, and for numbers out of range.
    """

    def __init__(
        self, retrievers: Sequence[Retriever], *, k_constant: float = 60.0, candidates: int | None = None
    ) -> None:
        if not retrievers:
            raise UsageError("there are no retrievers to fuse: pass at least one")
        if not k_constant > 0:
            raise UsageError(f"k_constant must be above 0, got {k_constant!r}")
        if candidates is not None and candidates < 1:
            raise UsageError(f"candidates must be at least 1, got {candidates!r}")
        self._retrievers = tuple(retrievers)
        self._k_constant = k_constant
        self._candidates = candidates

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        depth = max(k, self._candidates or k)
        return self._best([retriever.retrieve(query, depth, exclude) for retriever in self._retrievers], k, exclude)

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> tuple[Passage, ...]:
        depth = max(k, self._candidates or k)
        asked = [asyncio.ensure_future(each.aretrieve(query, depth, exclude)) for each in self._retrievers]
        try:
            return self._best(await asyncio.gather(*asked), k, exclude)
        finally:
            for task in asked:
                task.cancel()

    def _best(self, rankings: Sequence[Sequence[Passage]], k: int, exclude: frozenset[str]) -> tuple[Passage, ...]:
        fused = fuse(rankings, k_constant=self._k_constant)
        kept = [passage for passage in fused if passage.id not in exclude][:k]
        return tuple(replace(passage, score=float(rank)) for rank, passage in enumerate(kept, start=1))
