"""Traces: versioned plain JSON in which an answer explains itself.

    trace = load_trace(generation.trace)        # or the text of a file
    dump(trace)                                 # JSON again

A trace may come from anywhere, so it is read as hostile input: bounded in size and depth, every field checked, what
belongs together compared. Fields that this version does not know are kept as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UsageError

MAX_BYTES = 32 << 20
"""The longest trace that is read: ten long documents and their prompts, and a thousand tokens, are a few megabytes."""

MAX_DEPTH = 16
"""A trace itself is 6 deep; the rest is room for fields to come."""

_SURROGATE = re.compile("[\ud800-\udfff]")

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0001)]
"""A probability, rounded."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class TracedDocument(_Part):
    """One expert: a document and its prompt, or the expert without a document."""

    id: str | None
    title: str | None = None
    score: float | None = None
    score_kind: Literal["cosine", "inner_product", "distance", "rank", "logit", "probability", "uniform"] | None = None
    weight: Share
    posterior_weight: Share | None = None
    """The weight after the whole text; None where the documents' own probabilities are not known."""
    null_document: bool = False
    text: str | None = None
    """As sent; with `prompt` only in full traces."""
    prompt: str | None = None


class TracedTokens(_Part):
    """Columns: one entry a token, rounded to 4 digits. Log-probabilities in nats; null where there is none."""

    text: list[str]
    logprob: list[float | None]
    certified: list[bool]
    responsibilities: list[list[Share]]
    """[tokens][documents]: w_d p_d(y) / sum_e w_e p_e(y)."""
    decided_by: list[Count]
    """The document with the largest responsibility."""
    changed_without: list[list[Count]] = []
    """The documents without which the greedy token would have been another; empty for a sampled text."""
    top: list[list[Annotated[tuple[str, float | None], Field(strict=False)]]]
    """The most probable tokens of the mixture, best first."""


class ReplugTrace(_Part):
    """What a REPLUG ensemble did, version 1. Weights sum to 1; every column has one entry a token."""

    version: Literal[1]
    query: str
    answer: str
    model: str
    ensemble: Literal["token", "answer", "choice"]
    method: Literal["native", "naive", "draft_verify", "certificate", "latent", "answer"]
    exact: bool
    ties: Count
    robust_radius: Count | None
    """How many documents an adversary may replace without changing the answer; None where that is not known."""
    documents: Annotated[list[TracedDocument], Field(min_length=1)]
    tokens: TracedTokens | None = None
    calls: Count
    requests: Count
    prompt_tokens: Count
    completion_tokens: Count

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        _sums_to_1("weight", [document.weight for document in self.documents])
        posterior = [d.posterior_weight for d in self.documents if d.posterior_weight is not None]
        if posterior:
            _sums_to_1("posterior_weight", posterior)
        if self.tokens is not None:
            _check_columns(self.tokens, len(self.documents))
        return self


def load_trace(source: str | bytes | Mapping[str, Any]) -> ReplugTrace:
    """A trace from its JSON text, or as `Generation.trace` holds it. Raises `UsageError` for anything that is not one,
    and says where it is wrong."""
    try:
        text = source if isinstance(source, str | bytes) else json.dumps(dict(source), allow_nan=False)
        if len(text) > MAX_BYTES:
            raise UsageError(f"a trace has at most {MAX_BYTES} bytes, got {len(text)}")
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"this is not the JSON of a trace: {error or type(error).__name__}") from None
    _check_plain(found)
    try:
        return ReplugTrace.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the trace"
        raise UsageError(
            f"not a REPLUG trace of version 1: {place}: {first['msg']} ({error.error_count()} errors in all)"
        ) from None


def dump(trace: ReplugTrace) -> str:
    """JSON: the fields that were given, and nothing more."""
    return trace.model_dump_json(exclude_unset=True)


def _refuse_constant(name: str) -> NoReturn:
    raise UsageError(f"a trace is plain JSON, which has no {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits)


def _check_plain(value: Any) -> None:
    """Raise unless `value` is nested at most `MAX_DEPTH` deep and its texts can be written in UTF-8."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and _SURROGATE.search(one):
                raise UsageError("a text in this trace holds half a character (a lone surrogate)")
        level = inner
        if not level:
            return
    raise UsageError(f"a trace is nested at most {MAX_DEPTH} deep: this is something else")


def _sums_to_1(name: str, weights: list[float]) -> None:
    if abs(sum(weights) - 1) > 1e-3:
        raise ValueError(f"{name} must sum to 1 over the documents, got {sum(weights):.6g}")


def _check_columns(tokens: TracedTokens, documents: int) -> None:
    count = len(tokens.text)
    lengths = {
        "logprob": len(tokens.logprob),
        "certified": len(tokens.certified),
        "responsibilities": len(tokens.responsibilities),
        "decided_by": len(tokens.decided_by),
        "changed_without": len(tokens.changed_without) or count,
        "top": len(tokens.top),
    }
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"tokens.{name} must have one entry a token: {length} for {count}")
    if any(len(shares) != documents for shares in tokens.responsibilities):
        raise ValueError(f"tokens.responsibilities must have one share for each of the {documents} documents")
    if any(d >= documents for d in [*tokens.decided_by, *(d for missed in tokens.changed_without for d in missed)]):
        raise ValueError(f"tokens name a document beyond the {documents} there are")
