"""One token after another, from distributions over rows: the loop every local way of writing shares.

A `Mixer` says which distribution k rows make together. One row is plain decoding; REPLUG's mixer makes many rows one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError, UsageError
from .flows import Flow, ask
from .mixtures import nucleus, temper
from .prompts import PromptTemplate, render_messages, render_text
from .requests import Advance, Emit, OpenRows, Sampling, Score
from .texts import Chunk, FinishReason, Generation, Passage, TokenLogprob, Usage
from .tokens import (
    IncrementalText,
    StopText,
    TokenIds,
    Tokenizer,
    answer_lead,
    continuation_ids,
    fit_prompt,
    with_bos,
)

Floats = NDArray[np.floating[Any]]


class Mixer(Protocol):
    """Makes one distribution of k rows, and is told which token was chosen."""

    def mix(self, rows: Floats) -> Floats:
        """Log-probabilities [k, V] to the distribution to choose from, [V], log."""
        ...

    def chosen(self, token_id: int, rows: Floats, mixed: Floats) -> None:
        """The token, with what `mix` was given and what it gave."""
        ...


class OneRow:
    """Plain decoding: the only row is the distribution."""

    def mix(self, rows: Floats) -> Floats:
        return rows[0]

    def chosen(self, token_id: int, rows: Floats, mixed: Floats) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Decoded:
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage


def decode_rows(
    prompts: Sequence[TokenIds],
    mixer: Mixer,
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    top_logprobs: int = 0,
    lead: str = "",
) -> Flow[Decoded]:
    """Write one text as the common continuation of k prompts. Emits a `Chunk` per piece of text.

    At each step every row gives log p_d(v) at the sampling temperature (1 when greedy), `mixer` makes them one
    distribution, top-p cuts it, one token is chosen and appended to *all* rows. `lead` (see `answer_lead`) is
    taken off the beginning of the text where it stands there. Raises `ModelError` when a row is NaN.
    """
    rows = yield from ask(OpenRows(tuple(prompts)))
    logprobs: Floats = rows.logprobs
    rng = np.random.default_rng(sampling.seed)
    pieces, stop = IncrementalText(tokenizer), StopText(sampling.stop)
    emitted: list[str] = []
    ids: list[int] = []
    tokens: list[TokenLogprob] = []
    finish: FinishReason = "length"
    told = 0  # tokens that a chunk carried
    while len(ids) < sampling.max_tokens:
        tempered = temper(logprobs, sampling.temperature) if sampling.temperature > 0 else logprobs
        mixed = mixer.mix(tempered)
        if np.isnan(mixed).any():  # a NaN in any row ends up here, and this is one row instead of k
            bad = np.isnan(logprobs).any(axis=1)
            whose = f"for prompt {int(bad.argmax())}" if bad.any() else "once mixed"
            raise ModelError(f"the model gave NaN log-probabilities {whose} at token {len(ids)} of the answer")
        token_id = _choose(mixed, sampling, rng)
        if token_id in tokenizer.end_ids:
            finish = "stop"
            mixer.chosen(token_id, tempered, mixed)
            break
        ids.append(token_id)
        tokens.append(_token(tokenizer, token_id, mixed, top_logprobs))
        mixer.chosen(token_id, tempered, mixed)
        piece, lead = _without_lead(pieces.push(token_id), lead)
        text = stop.push(piece)
        if text:
            emitted.append(text)
            yield [Emit(Chunk(text, tuple(tokens[told:])))]
            told = len(tokens)
        if stop.stopped:
            finish = "stop"
            break
        if len(ids) < sampling.max_tokens:
            logprobs = yield from ask(Advance(rows, token_id))
    if not stop.stopped:
        text = stop.push(_without_lead(pieces.rest(), lead)[0]) + stop.rest()
        if text:
            emitted.append(text)
            yield [Emit(Chunk(text, tuple(tokens[told:])))]
    usage = Usage(
        calls=len(prompts),
        prompt_tokens=rows.prompt_tokens,
        cached_prompt_tokens=rows.cached_prompt_tokens,
        completion_tokens=len(ids) + (finish == "stop" and not stop.stopped),
    )
    return Decoded("".join(emitted), tuple(ids), tuple(tokens), finish, usage)


def _choose(mixed: Floats, sampling: Sampling, rng: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(mixed.argmax())
    probabilities = np.exp(nucleus(mixed, sampling.top_p).astype(np.float64))
    return int(rng.choice(len(probabilities), p=probabilities / probabilities.sum()))


def _token(tokenizer: Tokenizer, token_id: int, mixed: Floats, top_logprobs: int) -> TokenLogprob:
    top: tuple[tuple[str, float], ...] = ()
    if top_logprobs:
        best = np.argpartition(-mixed, min(top_logprobs, len(mixed)) - 1)[:top_logprobs]
        best = best[np.argsort(-mixed[best], kind="stable")]
        top = tuple((tokenizer.decode([int(i)]), float(mixed[i])) for i in best)
    return TokenLogprob(tokenizer.decode([token_id]), float(mixed[token_id]), token_id, top)


def _without_lead(piece: str, lead: str) -> tuple[str, str]:
    """Take the template's space off the first piece that has text."""
    if not piece or not lead:
        return piece, lead
    return piece.removeprefix(lead), ""


def announce(generation: Generation) -> Flow[None]:
    """Emit the last chunk of a stream: no text, the whole generation."""
    yield [Emit(Chunk("", final=generation))]


def scoring_rows(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    request: Score,
    document_sets: list[tuple[Passage, ...]],
    *,
    context_window: int | None,
    max_document_tokens: int | None = None,
) -> tuple[tuple[TokenIds, ...], tuple[TokenIds, ...]]:
    """Prompts and continuation as ids, one row per set of documents, cut at the true token boundary.

    Raises `UsageError` for an empty continuation.
    """
    end = (min(tokenizer.end_ids),) if request.include_end and tokenizer.end_ids else ()
    if request.include_end and not end:
        raise UsageError("include_end needs a tokenizer with an end token, and this one has none")
    if not request.continuation:
        raise UsageError("the continuation to score is empty: its log-probability would be 0 whatever the context")
    lead = " " if template.answer_starts_with_space else ""  # the most that `answer_lead` says
    reserve = len(tokenizer.encode(lead + request.continuation)) + len(end)
    prompts: list[TokenIds] = []
    targets: list[TokenIds] = []
    for documents in document_sets:
        ids, sent = fit_prompt(
            tokenizer,
            template,
            request.prompt,
            documents,
            context_window=context_window,
            reserve=reserve,
            max_document_tokens=max_document_tokens,
        )
        text = answer_lead(tokenizer, template, request.prompt, ids) + request.continuation
        if isinstance(request.prompt, str):
            before, after = continuation_ids(tokenizer, render_text(template, request.prompt, sent), text)
            ids = with_bos(tokenizer, before)
        elif tokenizer.encode_chat(render_messages(template, request.prompt, sent)) is not None:
            after = tokenizer.encode(text)
        else:
            raise UsageError("scoring after a conversation needs a tokenizer with a chat template; pass a question")
        prompts.append(ids)
        targets.append((*after, *end))
    return tuple(prompts), tuple(targets)
