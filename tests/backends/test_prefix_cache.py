"""The store of prompt beginnings: what it finds, what it gives up, and how rows are batched."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from rlm_plugins.backends.prefix_cache import PrefixCache, batches


def spans(start: int, end: int) -> tuple[tuple[int, int], int]:
    return (start, end), 10


def test_a_shared_beginning_is_stored_once_and_found_under_any_ending():
    cache = PrefixCache[tuple[int, int]](1000, block=4)
    document = tuple(range(10))
    cache.add((*document, 50, 51, 52), spans)
    cache.add((*document, 60, 61, 62), spans)
    assert cache.find((*document, 70, 71, 72, 73)) == [(0, 4), (4, 8)]
    assert cache.size == 10 * (2 + 1 + 1)
    assert cache.find((*document, 60, 61, 99)) == [(0, 4), (4, 8), (8, 12)]
    assert cache.find(document[:3]) == []


def test_the_same_tokens_after_another_beginning_are_another_block():
    cache = PrefixCache[tuple[int, int]](1000, block=2)
    cache.add((1, 1, 7, 7), spans)
    assert cache.find((2, 2, 7, 7)) == []
    assert cache.find((7, 7)) == []


def test_least_recently_used_goes_first_and_endings_before_beginnings():
    cache = PrefixCache[tuple[int, int]](40, block=2)
    cache.add((1, 1, 2, 2), spans)
    cache.add((3, 3, 4, 4), spans)
    cache.find((1, 1, 2, 2))
    cache.add((5, 5), spans)
    assert cache.size == 40
    assert len(cache.find((1, 1, 2, 2))) == 2
    assert cache.find((3, 3, 4, 4)) == [(0, 2)]  # its ending was given up, its beginning not


def test_a_prompt_larger_than_the_budget_keeps_its_own_beginning():
    cache = PrefixCache[tuple[int, int]](30, block=2)
    cache.add(tuple(range(20)), spans)
    assert cache.find(tuple(range(20))) == [(0, 2), (2, 4), (4, 6)]
    empty = PrefixCache[tuple[int, int]](0, block=2)
    empty.add((1, 2, 3, 4), spans)
    assert (empty.size, empty.find((1, 2, 3, 4))) == (0, [])


def test_clear_forgets_everything():
    cache = PrefixCache[tuple[int, int]](1000, block=2)
    cache.add((1, 2, 3, 4), spans)
    cache.clear()
    assert (cache.size, cache.find((1, 2, 3, 4))) == (0, [])


def test_what_is_found_is_always_what_was_stored_for_that_very_beginning():
    rng = random.Random(1)
    cache = PrefixCache[tuple[int, ...]](120, block=2)
    for _ in range(500):
        ids = tuple(rng.randrange(2) for _ in range(rng.randrange(9)))
        for index, payload in enumerate(cache.find(ids)):
            assert payload == ids[: 2 * index + 2]
        cache.add(ids, lambda _, end, ids=ids: (ids[:end], 10))
        assert cache.size == 10 * len(cache._blocks) <= 120  # pyright: ignore[reportPrivateUsage]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(20, 200))
def test_batches_cost_the_least_of_all_splits_of_the_sorted_rows(lengths: list[int], limit: int):
    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * max(lengths[index] for index in group) + 5 for group in groups)

    def allowed(group: list[int]) -> bool:
        return len(group) == 1 or len(group) * max(lengths[index] for index in group) <= limit

    groups = batches(lengths, limit=limit, per_batch=5)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(allowed(group) for group in groups)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = min(
        cost(split)
        for cuts in itertools.product((False, True), repeat=len(order) - 1)
        if all(map(allowed, split := _cut(order, cuts)))
    )
    assert cost(groups) == best


def test_no_rows_are_no_batches():
    assert batches([], limit=10) == []


def _cut(order: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    groups = [[order[0]]]
    for index, cut in zip(order[1:], cuts, strict=True):
        if cut:
            groups.append([])
        groups[-1].append(index)
    return groups
