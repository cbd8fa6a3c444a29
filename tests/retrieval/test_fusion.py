from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_plugins.errors import RetrievalError, UsageError
from rlm_plugins.models import Retriever
from rlm_plugins.retrieval import FusionRetriever, content_id, fuse
from rlm_plugins.texts import Passage


class Ranked(Retriever):
    """Returns what it was given, cut to k."""

    def __init__(self, names: Sequence[str], barrier: asyncio.Barrier | None = None) -> None:
        self.passages = [Passage(f"text {name}", id=name) for name in names]
        self.barrier = barrier
        self.asked: list[int] = []

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> list[Passage]:
        self.asked.append(k)
        return [passage for passage in self.passages if passage.id not in exclude][:k]

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> list[Passage]:
        if self.barrier is not None:
            await self.barrier.wait()
        return self.retrieve(query, k, exclude)


class Broken(Ranked):
    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> list[Passage]:
        raise RetrievalError("down")


rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=4)


@given(rankings=rankings, k_constant=st.sampled_from([1.0, 60.0]))
def test_the_sum_of_reciprocal_ranks(rankings: list[list[str]], k_constant: float) -> None:
    fused = fuse([Ranked(names).passages for names in rankings], k_constant=k_constant)
    expected = {
        name: sum(1 / (k_constant + names.index(name) + 1) for names in rankings if name in names)
        for name in {name for names in rankings for name in names}
    }
    assert {p.id: p.metadata["rrf_score"] for p in fused} == pytest.approx(expected)
    assert [p.score for p in fused] == [rank + 1.0 for rank in range(len(expected))]
    sums = [p.metadata["rrf_score"] for p in fused]
    assert sums == sorted(sums, reverse=True)
    assert all(p.score_kind == "rank" for p in fused)


@given(rankings=rankings, k=st.integers(1, 9), exclude=st.frozensets(st.sampled_from("abcz")))
def test_run_and_arun_agree(rankings: list[list[str]], k: int, exclude: frozenset[str]) -> None:
    retriever = FusionRetriever([Ranked(names) for names in rankings])
    found = retriever.retrieve("q", k, exclude)
    assert found == asyncio.run(retriever.aretrieve("q", k, exclude))
    assert not exclude & {passage.id for passage in found}
    assert [p.score for p in found] == [rank + 1.0 for rank in range(len(found))]
    assert len(found) <= k


def test_the_same_passage_by_id_or_by_content() -> None:
    named, nameless, other = Passage("otter", id="1"), Passage("otter"), Passage("otter", title="Otters")
    fused = fuse([[nameless, other], [named], [Passage("otter", id="2")]])
    assert [p.id for p in fused] == ["1", "2", content_id(other)]
    assert fused[0].metadata["rrf_score"] == pytest.approx(2 / 61)
    assert (named.metadata, nameless.id) == ({}, None), "what was given is left alone"


def test_a_repeated_passage_counts_once_at_its_better_rank() -> None:
    [only] = fuse([[Passage("a"), Passage("a")]])
    assert only.metadata["rrf_score"] == pytest.approx(1 / 61)


def test_equal_sums_keep_the_order_met() -> None:
    assert [p.id for p in fuse([Ranked("ab").passages, Ranked("ba").passages])] == ["a", "b"]


def test_all_are_asked_at_once_and_deep_enough() -> None:
    async def search() -> tuple[Passage, ...]:
        barrier = asyncio.Barrier(3)
        parts = [Ranked("abcdef", barrier) for _ in range(3)]
        found = await asyncio.wait_for(FusionRetriever(parts, candidates=5).aretrieve("q", 2), 10)
        assert [part.asked for part in parts] == [[5]] * 3
        return found

    assert [p.id for p in asyncio.run(search())] == ["a", "b"]
    shallow = Ranked("abcdef")
    assert len(FusionRetriever([shallow], candidates=2).retrieve("q", 4)) == 4
    assert shallow.asked == [4]


def test_a_failure_fails_and_cancels_the_rest() -> None:
    async def search() -> None:
        barrier = asyncio.Barrier(2)
        with pytest.raises(RetrievalError, match="down"):
            await FusionRetriever([Ranked("a", barrier), Broken("b")]).aretrieve("q", 1)
        await asyncio.sleep(0)
        assert barrier.n_waiting == 0

    asyncio.run(search())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="no retrievers"):
        FusionRetriever([])
    with pytest.raises(UsageError, match="k_constant"):
        FusionRetriever([Ranked("a")], k_constant=0)
    with pytest.raises(UsageError, match="candidates"):
        FusionRetriever([Ranked("a")], candidates=0)
    with pytest.raises(UsageError, match="k_constant"):
        fuse([], k_constant=float("nan"))
