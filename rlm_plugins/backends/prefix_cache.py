"""Prompt beginnings computed before: a store that backends share, and how to batch what is left to compute.

A prompt is cut into blocks of 16 tokens. A block's key is the block before it and its own tokens, so equal keys mean
equal beginnings, whatever follows: a document in front of ten different questions is stored, and computed, once. What
a block holds (the keys and values of its positions) is the backend's business; the store only counts its bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")

_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Block(Generic[Payload]):
    serial: int
    payload: Payload
    size: int


class PrefixCache(Generic[Payload]):
    """Blocks of computed prompts under a budget of bytes, the least recently used given up first. 0 stores nothing.

    >>> cache = PrefixCache[str](budget=100, block=2)
    >>> cache.add((1, 2, 3, 4, 5), lambda start, end: (f"{start}-{end}", 10))
    >>> cache.find((1, 2, 3, 4, 9, 9)), cache.find((3, 4)), cache.size
    (['0-2', '2-4'], [], 20)
    """

    def __init__(self, budget: int, *, block: int = 16) -> None:
        self.budget = budget
        self.block = block
        self.size = 0
        """Bytes stored."""
        self._blocks: OrderedDict[_Key, _Block[Payload]] = OrderedDict()
        self._serial = 0

    def find(self, ids: Sequence[int]) -> list[Payload]:
        """What is stored of the longest known beginning of `ids`, block by block."""
        path, parent = list[tuple[_Key, _Block[Payload]]](), 0
        for key in self._keys(ids):
            block = self._blocks.get((parent, key))
            if block is None:
                break
            path.append(((parent, key), block))
            parent = block.serial
        self._use(key for key, _ in path)
        return [block.payload for _, block in path]

    def add(self, ids: Sequence[int], compute: Callable[[int, int], tuple[Payload, int]]) -> None:
        """Store the whole blocks of `ids` that are missing; `compute(start, end)` gives one's payload and bytes."""
        path, parent, added = list[_Key](), 0, 0
        for index, key in enumerate(self._keys(ids)):
            block = self._blocks.get((parent, key))
            if block is None:
                payload, size = compute(index * self.block, (index + 1) * self.block)
                if added + size > self.budget:
                    break  # one prompt alone must not push out its own beginning
                self._serial, added = self._serial + 1, added + size
                block = self._blocks[parent, key] = _Block(self._serial, payload, size)
                self.size += size
            path.append((parent, key))
            parent = block.serial
        self._use(path)
        while self.size > self.budget:
            self.size -= self._blocks.popitem(last=False)[1].size

    def clear(self) -> None:
        self._blocks.clear()
        self.size = 0

    def _keys(self, ids: Sequence[int]) -> Iterable[tuple[int, ...]]:
        return (tuple(ids[end - self.block : end]) for end in range(self.block, len(ids) + 1, self.block))

    def _use(self, path: Iterable[_Key]) -> None:
        """Beginnings count as used last, so that a block is never given up before those that stand on it."""
        for key in reversed(list(path)):
            self._blocks.move_to_end(key)


def batches(lengths: Sequence[int], *, limit: int, per_batch: int = 64) -> list[list[int]]:
    """Indices of rows to compute together: the split with the fewest tokens, padding included.

    A batch costs its size times its longest row, and `per_batch` tokens more for being one; one of several rows stays
    within `limit` tokens.

    >>> batches([500, 30, 510, 20], limit=4096)
    [[3, 1], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    cost, start = [0], list[int]()
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best, at = min(
            (cost[begin] + (end - begin) * longest + per_batch, begin)
            for begin in range(max(0, end - max(1, limit // max(1, longest))), end)
        )
        cost.append(best)
        start.append(at)
    groups, end = list[list[int]](), len(order)
    while end:
        groups.append(order[start[end - 1] : end])
        end = start[end - 1]
    return groups[::-1]
