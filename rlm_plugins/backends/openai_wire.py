"""What OpenAI-compatible servers answer, read into our types: log-probs of every shape, usage. Pure functions on JSON.

| shape | where |
|---|---|
| `tokens`, `token_logprobs`, `top_logprobs` (one dict by text a token), `text_offset` | completions, echo |
| the same with lists of entries, or parallel `token_ids` | Together, Fireworks |
| `content`: entries of `token`, `logprob`, `bytes`, `top_logprobs` | chat; llama.cpp also for completions, with `id` |
| a bare list of such entries | some gateways |
| `prompt_logprobs`: one dict by token id a position | vLLM |
| `token_id:123` in the place of a text | vLLM with `return_tokens_as_token_ids` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..texts import FinishReason, TokenLogprob, Usage
from ..tokens import Tokenizer

Json = Mapping[str, Any]

_IMPOSSIBLE = -9000.0
"""vLLM writes -9999 for a probability of zero, since JSON has no -inf."""
_TOKEN_ID = "token_id:"
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One text a server wrote. `finish_reason` is None while a stream goes on."""

    text: str
    tokens: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


def read_choices(answer: Json, tokenizer: Tokenizer | None = None) -> list[Choice]:
    """The choices of an answer, in the order of their prompts."""
    choices = cast(list[Json], answer.get("choices") or [])
    ordered = sorted(choices, key=lambda choice: int(choice.get("index") or 0))
    return [read_choice(choice, tokenizer) for choice in ordered]


def read_choice(choice: Json, tokenizer: Tokenizer | None = None) -> Choice:
    """A choice of a completion, a chat, or an event of either's stream."""
    said: Json = choice.get("message") or choice.get("delta") or {}
    text = choice.get("text") if "text" in choice else said.get("content")
    finish = choice.get("finish_reason")
    tokens = read_logprobs(choice.get("logprobs"), tokenizer)
    return Choice(text or "", tokens, None if finish is None else _FINISH.get(finish, "stop"))


def read_logprobs(logprobs: Any, tokenizer: Tokenizer | None = None) -> tuple[TokenLogprob, ...]:
    """Entries of any shape; empty where there are none, whatever form nothing takes."""
    if isinstance(logprobs, list):
        return tuple(_entry(entry, tokenizer) for entry in cast(list[Json], logprobs))
    if not isinstance(logprobs, Mapping):
        return ()
    shape = cast(Json, logprobs)
    if shape.get("content"):
        return tuple(_entry(entry, tokenizer) for entry in shape["content"])
    return _parallel(shape, tokenizer)


def _entry(entry: Json, tokenizer: Tokenizer | None) -> TokenLogprob:
    text, token_id = _token(entry.get("token"), entry.get("id"), tokenizer)
    return _token_logprob(text, token_id, entry.get("logprob"), entry.get("top_logprobs"), tokenizer)


def _parallel(shape: Json, tokenizer: Tokenizer | None) -> tuple[TokenLogprob, ...]:
    texts: Sequence[str] = shape.get("tokens") or ()
    values: Sequence[float | None] = shape.get("token_logprobs") or ()
    if not texts or len(values) != len(texts):
        return ()
    ids: Sequence[int | None] = shape.get("token_ids") or [None] * len(texts)
    tops: Sequence[Any] = shape.get("top_logprobs") or [None] * len(texts)
    found: list[TokenLogprob] = []
    for index, value in enumerate(values):
        text, token_id = _token(texts[index], ids[index] if index < len(ids) else None, tokenizer)
        top = tops[index] if index < len(tops) else None
        found.append(_token_logprob(text, token_id, value, top, tokenizer))
    return tuple(found)


def _token_logprob(
    text: str, token_id: int | None, value: float | None, top: Any, tokenizer: Tokenizer | None
) -> TokenLogprob:
    listed = _listed(top, tokenizer)
    ids = tuple(one for _, one, _ in listed if one is not None)
    return TokenLogprob(
        text,
        read_value(value),
        token_id,
        tuple((one, logprob) for one, _, logprob in listed),
        ids if len(ids) == len(listed) else (),
    )


def _listed(top: Any, tokenizer: Tokenizer | None) -> list[tuple[str, int | None, float]]:
    """Alternatives, best first (some servers put the sampled token first), each id once."""
    entries: list[tuple[Any, Any, Any]] = []
    if isinstance(top, Mapping):
        entries = [(text, None, value) for text, value in cast(Json, top).items()]
    elif isinstance(top, list):
        entries = [(one.get("token"), one.get("id"), one.get("logprob")) for one in cast(list[Json], top)]
    found: list[tuple[str, int | None, float]] = []
    seen: set[int] = set()
    for token, given_id, value in entries:
        text, token_id = _token(token, given_id, tokenizer)
        logprob = read_value(value)
        if logprob is None or token_id in seen:
            continue
        if token_id is not None:
            seen.add(token_id)
        found.append((text, token_id, logprob))
    return sorted(found, key=lambda one: -one[2])


def _token(token: Any, given_id: Any, tokenizer: Tokenizer | None) -> tuple[str, int | None]:
    text = token if isinstance(token, str) else ""
    token_id = given_id if isinstance(given_id, int) else None
    if text.startswith(_TOKEN_ID) and text[len(_TOKEN_ID) :].isdigit():
        token_id = int(text[len(_TOKEN_ID) :])
        text = "" if tokenizer is None else tokenizer.decode([token_id])
    return text, token_id


def read_value(value: Any) -> float | None:
    """A log-probability: -9999 and the like are -inf; what is no number is None.

    >>> read_value(-0.5), read_value(-9999.0), read_value(None)
    (-0.5, -inf, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return -math.inf if value <= _IMPOSSIBLE else float(value)


def read_prompt_logprobs(answer: Json, ids: Sequence[int] | None = None) -> tuple[TokenLogprob, ...]:
    """vLLM's `prompt_logprobs`, one entry per prompt token, the first without a value.

    A position lists its own token first, and alternatives; where `ids` are known they say which is the token.
    """
    positions: Any = answer.get("prompt_logprobs")
    if positions is None:
        choices = cast(list[Json], answer.get("choices") or [])
        positions = choices[0].get("prompt_logprobs") if choices else None
    if not isinstance(positions, list):
        return ()
    found: list[TokenLogprob] = []
    for index, position in enumerate(cast(list[Mapping[str, Json] | None], positions)):
        known = ids[index] if ids is not None and index < len(ids) else None
        if not position:
            found.append(TokenLogprob("", None, known))
            continue
        key = str(known) if known is not None and str(known) in position else next(iter(position))
        entry = position[key]
        token_id = int(key) if key.lstrip("-").isdigit() else None
        found.append(TokenLogprob(str(entry.get("decoded_token") or ""), read_value(entry.get("logprob")), token_id))
    return tuple(found)


def read_usage(answer: Json, *, calls: int = 1, requests: int = 1) -> Usage | None:
    """What the server says it used; None where it does not say."""
    usage: Any = answer.get("usage")
    if not isinstance(usage, Mapping):
        return None
    said = cast(Json, usage)
    details: Json = said.get("prompt_tokens_details") or {}
    return Usage(
        calls,
        requests,
        int(said.get("prompt_tokens") or 0),
        int(details.get("cached_tokens") or 0),
        int(said.get("completion_tokens") or 0),
    )


def cover(text: str, tokens: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """The tokens with an entry of log-prob None for every piece of the text that none of them covers.

    Some servers drop the entries of tokens that hold a part of a character. What stands before or after the text
    (an end token) is left.

    >>> [token.token for token in cover("a☃b", [TokenLogprob("a", -1.0), TokenLogprob("b", -1.0)])]
    ['a', '☃', 'b']
    """
    found: list[TokenLogprob] = []
    at, partial = 0, False  # partial: entries of pieces of a character wait for the text they belong to
    for token in tokens:
        where = text.find(token.token, at) if token.token and "\ufffd" not in token.token else -1
        if where < 0:
            partial = True
        else:
            if where > at and not partial:
                found.append(TokenLogprob(text[at:where], None))
            at, partial = where + len(token.token), False
        found.append(token)
    if at < len(text) and not partial and found:
        found.append(TokenLogprob(text[at:], None))
    return tuple(found)


def continuation_entries(entries: Sequence[TokenLogprob], context: str, whole: str) -> tuple[TokenLogprob, ...] | None:
    """The echoed entries that make `whole` go on after `context`: from the token in which the context ends.

    None where the entries do not spell the text (pieces of characters, rewritten spaces): then only ids can align.
    """
    spelled = "".join(entry.token for entry in entries)
    if not spelled.endswith(whole):
        return None
    at = len(whole) - len(spelled)  # special tokens in front of the text have texts of their own
    for index, entry in enumerate(entries):
        at += len(entry.token)
        if at > len(context):
            return tuple(entries[index:])
    return None
