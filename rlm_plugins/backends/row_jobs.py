"""What backends that compute rows have in common: what of a row is left to compute, and rows under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import UsageError
from ..requests import Rows
from ..tokens import TokenIds
from .prefix_cache import PrefixCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Payload = TypeVar("Payload")
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Job(Generic[Payload]):
    """A row to compute. Of its `ids` the first `prompt_length` are worth storing, and the last `keep` need logits."""

    ids: TokenIds
    prompt_length: int
    keep: int
    blocks: Sequence[Payload]
    to_compute: int
    """Tokens left when all that is stored is used."""


def reading(prompt: TokenIds, prefixes: PrefixCache[Payload]) -> Job[Payload]:
    """A prompt whose next token is wanted. Raises `UsageError` for an empty one."""
    return _job(prompt, prompt, 1, prefixes)


def scoring(prompt: TokenIds, continuation: TokenIds, prefixes: PrefixCache[Payload]) -> Job[Payload]:
    """A prompt whose continuation is to be foretold; the last token is foretold only, and never read."""
    return _job((*prompt, *continuation[:-1]), prompt, max(len(continuation), 1), prefixes)


def _job(ids: TokenIds, prompt: TokenIds, keep: int, prefixes: PrefixCache[Payload]) -> Job[Payload]:
    if not prompt:
        raise UsageError("a prompt has no tokens, so nothing can follow from it: begin with a word, or with BOS")
    blocks = prefixes.find(ids)
    known = min(len(blocks) * prefixes.block, len(ids) - keep)
    return Job(ids, len(prompt), keep, blocks, len(ids) - known)


def last_ids(job: Job[Payload], columns: int) -> list[int]:
    """The ids in the last columns, padded on the left with any id: what stands there is masked."""
    ids = job.ids[-columns:]
    return [0] * (columns - len(ids)) + list(ids)


class RowSet(Rows, Generic[Part]):
    """k prompts under way, in parts that advance together.

    Equal prompts stay equal, since they get the same tokens: they are computed once. `spread` [k] says which computed
    row is whose, None that each is its own.
    """

    def __init__(self, parts: list[Part], spread: list[int], *, prompt_tokens: int, cached: int) -> None:
        self.parts = parts
        self.spread = None if spread == list(range(len(spread))) else spread
        self.current: NDArray[np.float32] | None = None
        self._prompt_tokens = prompt_tokens
        self._cached = cached

    @property
    def logprobs(self) -> NDArray[np.float32]:
        assert self.current is not None
        return self.current

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    @property
    def cached_prompt_tokens(self) -> int:
        return self._cached

    def close(self) -> None:
        """Give up the caches. Raises nothing when closed again."""
        self.parts = []

    async def aclose(self) -> None:
        self.close()

    def open_parts(self) -> list[Part]:
        """Raises `UsageError` once closed."""
        if not self.parts:
            raise UsageError("these rows are closed: open the prompts again to go on")
        return self.parts


def spread_of(prompts: Sequence[TokenIds], distinct: Sequence[TokenIds], order: Sequence[int]) -> list[int]:
    """Which computed row belongs to each prompt; `order` lists the distinct prompts as they were computed.

    >>> spread_of([(7,), (8,), (7,)], distinct=[(7,), (8,)], order=[1, 0])
    [1, 0, 1]
    """
    place = {distinct[index]: at for at, index in enumerate(order)}
    return [place[prompt] for prompt in prompts]
