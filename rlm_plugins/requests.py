"""What a method may ask for. A request is a value; what answers it is a `Handler`.

| request | reply |
|---|---|
| `Probe()` | `Capabilities` of the model |
| `Generate(prompt, ...)` | `Generation` |
| `GenerateIds(prompt_ids, ...)` | `Generation`, of a prompt given as token ids |
| `OpenStream(Generate(...))`, then `ReadStream(stream)` | a stream, then `Chunk` or None at its end |
| `Score(prompt, continuation, ...)` | `Scoring` |
| `OpenRows(prompts)`, then `Advance(rows, token_id)` | `Rows`, then log-probabilities float32 [k, V] |
| `ScoreRows(prompts, continuations)` | one float array per row: log p of each of its tokens, nats |
| `Retrieve(query, k, exclude)` | tuple of `Passage`, best first |
| `Embed(texts, kind)` | float32 [n, dim] |
| `Emit(event)` | None; the driver hands the event to whoever reads the run |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from .capabilities import Capabilities
from .errors import UsageError
from .prompts import Prompt
from .texts import Chunk, Generation, Passage, Scoring

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Reply = TypeVar("Reply", covariant=True)


class Request(Generic[Reply]):
    """Something a method asks of the world; `Reply` is the type of the answer."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop.

    `temperature=0` is greedy. `max_tokens` counts completion tokens. A `stop` string ends the text and is not part of
    it. `seed` makes sampling repeatable; None draws a fresh one. Raises `UsageError` for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {self.max_tokens!r}")
        if isinstance(self.stop, str) or any(not stop for stop in self.stop):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"stop must be a sequence of non-empty strings, got {self.stop!r}")


@runtime_checkable
class Resource(Protocol):
    """Something a reply opened. The driver closes it when the run returns, fails or is cancelled."""

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


class Rows(Resource, Protocol):
    """k prompts being continued with the same tokens."""

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """Next-token log-probabilities of every row, [k, V], nats."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        ...

    @property
    def cached_prompt_tokens(self) -> int:
        """How many of them were not computed again."""
        ...


class Stream(Resource, Protocol):
    """A text being written elsewhere."""


@dataclass(frozen=True, slots=True)
class Probe(Request[Capabilities]):
    """What can the model do? Answered from memory after the first time."""


@dataclass(frozen=True, slots=True)
class Generate(Request[Generation]):
    """Continue a prompt. `documents` are rendered into the prompt by whoever stands lowest; `answer_so_far` is text the
    answer has already, which the model goes on from. `top_logprobs`: alternatives wanted per token."""

    prompt: Prompt
    documents: tuple[Passage, ...] | None = None
    answer_so_far: str = ""
    sampling: Sampling = Sampling()
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class GenerateIds(Request[Generation]):
    """Continue a prompt given as token ids (BOS included). Nothing is rendered, cut or stripped."""

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Score(Request[Scoring]):
    """log p(continuation | prompt, documents). `include_end` adds the end token's probability."""

    prompt: Prompt
    continuation: str
    documents: tuple[Passage, ...] | None = None
    include_end: bool = False


@dataclass(frozen=True, slots=True)
class OpenStream(Request[Stream]):
    generate: Generate


@dataclass(frozen=True, slots=True)
class ReadStream(Request[Chunk | None]):
    stream: Stream


@dataclass(frozen=True, slots=True)
class OpenRows(Request[Rows]):
    """Open k prompts, given as token ids (BOS included), for token-by-token continuation."""

    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Advance(Request["NDArray[np.float32]"]):
    """Append one token to every row."""

    rows: Rows
    token_id: int


@dataclass(frozen=True, slots=True)
class ScoreRows(Request["list[NDArray[np.float32]]"]):
    """log p(continuation token | prompt, the tokens before it) for each row; both given as token ids."""

    prompts: tuple[tuple[int, ...], ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Retrieve(Request[tuple[Passage, ...]]):
    query: str
    k: int
    exclude: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Embed(Request["NDArray[np.float32]"]):
    texts: tuple[str, ...]
    kind: Literal["query", "document"]


@dataclass(frozen=True, slots=True)
class Emit(Request[None]):
    """Tell the reader of the run that something happened (a piece of text, a FLARE event)."""

    event: Any
