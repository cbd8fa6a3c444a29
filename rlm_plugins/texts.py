"""What methods read and write: passages, messages, generations, log-probabilities. All frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError

ScoreKind = Literal["cosine", "inner_product", "distance", "rank", "logit", "probability", "uniform"]
"""What a retrieval score means. `distance`: smaller is better; `rank`: 1 is best; all others: larger is better."""

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be retrieved.

    `score` is what the retriever said, in the unit `score_kind`; both are None where nobody scored the passage.
    Raises `UsageError` for a score that is not finite or has no kind, and for a text that is not a string.
    """

    text: str
    id: str | None = field(default=None, kw_only=True)
    title: str | None = field(default=None, kw_only=True)
    score: float | None = field(default=None, kw_only=True)
    score_kind: ScoreKind | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any], kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"Passage.text must be a string, got {type(self.text).__name__}")
        if self.score is not None and not math.isfinite(self.score):
            raise UsageError(
                f"passage {self.id or self.text[:40]!r} has the score {self.score}; scores must be finite: "
                "check the embeddings or the store that computed it"
            )
        if (self.score is None) != (self.score_kind is None):
            raise UsageError(f"a score needs its kind and a kind its score, got {self.score!r} and {self.score_kind!r}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `extra` holds what only the endpoint understands (tool calls, names)."""

    role: Role
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], kw_only=True, hash=False)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a text with its log-probability in nats.

    `logprob` is None where the model gave none (an echoed first token). `top` holds the listed alternatives as
    (token text, log-probability), best first, the chosen token included where it is among them; `top_ids` are their
    ids, where they are known (texts of different tokens can be equal).
    """

    token: str
    logprob: float | None
    token_id: int | None = None
    top: tuple[tuple[str, float], ...] = ()
    top_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What something cost. `calls`: prompts processed; `requests`: HTTP requests (0 for a local model).

    `estimated` says that a stream was cancelled before its usage arrived.
    """

    calls: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_prompt_tokens + other.cached_prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.estimated or other.estimated,
        )


FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A text a model wrote. `tokens` is empty where log-probabilities were not asked for or not given.

    `trace` is plain JSON (see `rlm_plugins.traces`), or None for a plain model call.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    trace: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text being written. The last chunk of a stream carries the whole `Generation`."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    final: Generation | None = None


@dataclass(frozen=True, slots=True)
class Scoring:
    """log p(continuation | prompt), token by token, in nats."""

    tokens: tuple[TokenLogprob, ...]
    usage: Usage = Usage()
    trace: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def logprob(self) -> float:
        """The sum over the continuation's tokens, in nats."""
        return math.fsum(token.logprob for token in self.tokens if token.logprob is not None)

    @property
    def mean_logprob(self) -> float:
        """Nats per token."""
        return self.logprob / len(self.tokens)
