"""What an endpoint gives, found out by asking it: a few short calls, judged by the answers and never by the status.

| question | how it is answered |
|---|---|
| log-probs, how many | the entries that came with one token, of 20, then 5, then 1 asked for |
| several prompts, repeatability | the same prompt twice in one request, against the first answer |
| token ids, the tokenizer, BOS | ids give the log-prob that the text gave |
| echo or prompt log-probs, aligned | a token just written is echoed with the log-prob it was written with, twice |
| raw or biased | the second-best token is forced: its log-prob is what it was, or it is not |
| continuation or new turn | after the first token of an answer comes its second, with the same log-prob |
| entries = tokens | as many entries as completion tokens, in a text of rare characters |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from ..capabilities import Capabilities
from ..errors import ModelError, RLMError, Unsupported, UsageError
from ..flows import Failed, Flow, ask, attempt
from ..requests import Sampling
from ..texts import Message, TokenLogprob
from ..tokens import Tokenizer, with_bos
from .openai_errors import NotThere, StatusError
from .openai_requests import (
    CHAT_CONTINUATIONS,
    ChatOpening,
    Continuation,
    Endpoint,
    EndpointFacts,
    IdsOpening,
    Opening,
    ScoringWay,
    TextOpening,
    next_call,
)
from .openai_scoring import Scorer, Target
from .openai_transport import Answered, Call
from .openai_wire import Choice, Json, read_choices, read_usage

_PROMPTS = ("The numbers in their order are one, two, three, four,", "Once upon a time there was a")
_QUESTIONS = ("Count from one to five in words.", "Write one sentence about the sea.")
_RARE = "\u2603\U0001f71a\u2603\U0001f71a\u2603\U0001f71a\u2603"
_TOLERANCE = 0.02
"""Nats: nearer than this (and than twice the repeatability more) two values are one."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller has said about the endpoint, and what is to be found out ("auto")."""

    model: str
    endpoint: Literal["auto"] | Endpoint
    continuation: Literal["auto"] | Continuation | None
    scoring: Literal["auto"] | ScoringWay | None
    tokenizer: Tokenizer | None
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _First:
    """The first answer: what all later ones are compared with."""

    facts: EndpointFacts
    opening: Opening
    asked: int | None
    choice: Choice

    @property
    def token(self) -> TokenLogprob | None:
        return self.choice.tokens[0] if self.choice.tokens else None


def discover(wishes: Wishes) -> Flow[EndpointFacts]:
    """Find out what the endpoint gives: 3 to 12 calls of 1 to 4 tokens.

    Raises `UsageError` where the key is refused or the model is unknown, `ModelError` where there is no answer.
    """
    listed, window = yield from _listed(wishes.model)
    errors: list[RLMError] = []
    for endpoint in ("completions", "chat") if wishes.endpoint == "auto" else (wishes.endpoint,):
        first = yield from _first(wishes, endpoint, errors)
        if first is None:
            continue
        facts = yield from (_completions(wishes, first) if endpoint == "completions" else _chat(wishes, first))
        facts = yield from _entries(wishes, facts)
        if listed and wishes.model not in listed:
            facts = _noted(facts, f"the model list does not name it (it lists {', '.join(sorted(listed)[:5])})")
        return replace(facts, context_window=window)
    known = f"; the endpoint lists {', '.join(sorted(listed)[:8])}" if listed else ""
    error = errors[-1]
    if isinstance(error, NotThere):
        raise UsageError(f"{error} (asked for {wishes.model!r}{known})")
    raise error


# --- asking ----------------------------------------------------------------------------------------------------------


def _tried(call: Call) -> Flow[Answered | RLMError]:
    """The answer, or the error where the request was refused as such. Raises every other failure."""
    reply = yield from attempt(ask(call))
    if not isinstance(reply, Failed):
        return reply
    if isinstance(reply.error, NotThere) or (isinstance(reply.error, ModelError) and not reply.error.retryable):
        return reply.error
    raise reply.error


def _listed(model: str) -> Flow[tuple[set[str], int | None]]:
    """The names in the model list, where there is one, and the window of ours (vLLM says it)."""
    reply = yield from attempt(ask(Call("/models")))
    if isinstance(reply, Failed):
        if isinstance(reply.error, NotThere | StatusError):
            return set(), None
        raise reply.error
    entries = cast(list[Json], reply.data.get("data") or [])
    window: int | None = None
    for entry in entries:
        if entry.get("id") == model and isinstance(entry.get("max_model_len"), int):
            window = entry["max_model_len"]
    return {str(entry.get("id")) for entry in entries}, window


def _first(wishes: Wishes, endpoint: Endpoint, errors: list[RLMError]) -> Flow[_First | None]:
    """The first answer with a text in it, with as many alternatives as the endpoint accepts to be asked for."""
    facts = EndpointFacts(endpoint, Capabilities())
    tokens = 1 if endpoint == "completions" else 4
    found: _First | None = None
    for opening in _openings(endpoint):
        for asked in (20, 5, 1, None) if found is None else (found.asked,):
            reply = yield from _tried(_call(wishes, facts, opening, tokens, asked))
            if isinstance(reply, RLMError) and "max_completion_tokens" in str(reply):
                facts = replace(facts, token_limit="max_completion_tokens")
                reply = yield from _tried(_call(wishes, facts, opening, tokens, asked))
            if isinstance(reply, NotThere):
                errors.append(reply)
                return found
            if isinstance(reply, RLMError):
                errors.append(reply)
                continue
            choices = read_choices(reply.data, wishes.tokenizer)
            if not choices:
                errors.append(ModelError(f"the answer has no choices: {str(reply.data)[:120]}"))
                return found
            found = _First(facts, opening, asked, choices[0])
            break
        if found is None or found.choice.text:  # an empty text is an end, not an absence: ask something else
            return found
    return found


def _openings(endpoint: Endpoint) -> Sequence[Opening]:
    if endpoint == "completions":
        return [TextOpening(text) for text in _PROMPTS]
    return [ChatOpening((Message("user", question),)) for question in _QUESTIONS]


def _call(wishes: Wishes, facts: EndpointFacts, opening: Opening, tokens: int, asked: int | None, **more: Any) -> Call:
    call = next_call(
        wishes.model,
        facts,
        opening,
        Sampling(max_tokens=tokens),
        logprobs=asked,
        ids=True,
        extra=wishes.extra,
    )
    return Call(call.path, {**(call.body or {}), **more})


def _noted(facts: EndpointFacts, note: str) -> EndpointFacts:
    return _can(facts, notes=(*facts.capabilities.notes, note))


def _can(facts: EndpointFacts, **changes: Any) -> EndpointFacts:
    return replace(facts, capabilities=replace(facts.capabilities, **changes))


# --- judging ---------------------------------------------------------------------------------------------------------


def _given(first: _First) -> EndpointFacts:
    """What the first answer itself shows."""
    token = first.token
    if token is None or token.logprob is None:
        return _noted(first.facts, "it answers without log-probs")
    return _can(first.facts, output_logprobs=True, top_logprobs=min(len(token.top), first.asked or 0))


def _difference(one: TokenLogprob | None, other: TokenLogprob | None) -> float:
    """The largest difference between the values that two entries both list; inf where the best tokens differ."""
    if one is None or other is None or one.logprob is None or other.logprob is None:
        return math.inf
    values, others = dict(one.top), dict(other.top)
    values[one.token], others[other.token] = one.logprob, other.logprob
    if one.token not in others:
        return math.inf
    shared = [abs(values[text] - others[text]) for text in values.keys() & others.keys() if math.isfinite(values[text])]
    return max((value for value in shared if math.isfinite(value)), default=math.inf)


def _same(one: float | None, other: float | None, facts: EndpointFacts) -> bool:
    if one is None or other is None:
        return False
    return abs(one - other) <= _TOLERANCE + 2 * facts.capabilities.repeatability


# --- a completions endpoint ------------------------------------------------------------------------------------------


def _completions(wishes: Wishes, first: _First) -> Flow[EndpointFacts]:
    facts = _can(_given(first), continuation="completions")
    if wishes.continuation is None:
        facts = _can(facts, continuation=None)
    facts = yield from _repeated(wishes, facts, first)
    facts, opening, token = yield from _by_ids(wishes, facts, first)
    if token is None:
        return facts
    facts = yield from _biased(wishes, facts, opening, token)
    return (yield from _scoring(wishes, facts, opening, token, ("echo", "prompt_logprobs")))


def _repeated(wishes: Wishes, facts: EndpointFacts, first: _First) -> Flow[EndpointFacts]:
    """Whether two prompts can go in one request, and how far identical calls differ."""
    call = _call(wishes, facts, first.opening, 1, first.asked)
    body = dict(call.body or {})
    reply = yield from _tried(Call(call.path, {**body, "prompt": [body["prompt"]] * 2}))
    choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
    batched = len(choices) == 2
    if not batched:
        reply = yield from _tried(call)
        choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
    return _repeatable(_can(facts, batched_prompts=batched), first, choices)


def _repeatable(facts: EndpointFacts, first: _First, choices: Sequence[Choice]) -> EndpointFacts:
    if not facts.capabilities.output_logprobs:
        return facts
    differences = [_difference(first.token, choice.tokens[0] if choice.tokens else None) for choice in choices]
    return _can(facts, repeatability=max(differences, default=math.inf))


def _by_ids(
    wishes: Wishes, facts: EndpointFacts, first: _First
) -> Flow[tuple[EndpointFacts, Opening, TokenLogprob | None]]:
    """Whether the prompt can be sent as ids and tokens be named by them. The opening and the first token, so said."""
    tokenizer, opening = wishes.tokenizer, first.opening
    if tokenizer is None or not isinstance(opening, TextOpening):
        return facts, opening, first.token
    ids = IdsOpening(with_bos(tokenizer, tokenizer.encode(opening.text)))
    for names_ids in (True, False):
        trial = replace(facts, names_ids=names_ids)
        reply = yield from _tried(_call(wishes, trial, ids, 1, first.asked))
        choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, tokenizer)
        if not choices:
            continue
        token = choices[0].tokens[0] if choices[0].tokens else None
        named = token is not None and token.token_id is not None
        same = choices[0].text == first.choice.text
        if first.token is not None and token is not None:
            same = _same(token.logprob, first.token.logprob, facts)
        if not same:
            note = "token ids give another answer than the text: another tokenizer is served, or another BOS"
            return _noted(facts, note), opening, first.token
        if token is not None and named:  # listed by id none is lost, as equal texts are
            facts = _can(facts, top_logprobs=min(len(token.top), first.asked or 0))
        return _can(replace(facts, names_ids=named), token_ids=True), ids, token
    return facts, opening, first.token


def _biased(wishes: Wishes, facts: EndpointFacts, opening: Opening, token: TokenLogprob) -> Flow[EndpointFacts]:
    """Whether log-probs under `logit_bias` are the model's own."""
    rivals = [(i, text, value) for i, (text, value) in enumerate(token.top) if text and text != token.token]
    if not rivals:
        return facts
    index, text, value = rivals[0]
    rival = token.top_ids[index] if token.top_ids else _single(wishes.tokenizer, text)
    if rival is None or not math.isfinite(value):
        return facts
    bias = {str(rival): 100}
    reply = yield from _tried(_call(wishes, facts, opening, 1, facts.capabilities.top_logprobs, logit_bias=bias))
    choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
    forced = choices[0].tokens[0] if choices and choices[0].tokens else None
    if forced is None or (forced.token != text and forced.token_id != rival):
        return facts
    if _same(forced.logprob, value, facts):
        return _can(facts, logit_bias="raw")
    return _noted(_can(facts, logit_bias="biased"), "log-probs under logit_bias contain the bias")


def _single(tokenizer: Tokenizer | None, text: str) -> int | None:
    """The id of a text that is one token."""
    ids = [] if tokenizer is None else tokenizer.encode(text)
    return ids[0] if len(ids) == 1 else None


def _scoring(
    wishes: Wishes, facts: EndpointFacts, opening: Opening, token: TokenLogprob, ways: tuple[ScoringWay, ...]
) -> Flow[EndpointFacts]:
    """The first way of scoring that gives a token just written the value it was written with."""
    if wishes.scoring != "auto":
        return _can(replace(facts, scoring=wishes.scoring), prompt_logprobs=wishes.scoring in ways)
    for way in ways:
        trial = replace(facts, scoring=way)
        aligned = yield from _aligned(wishes, trial, opening, token)
        if aligned is True:
            return _can(trial, prompt_logprobs=True)
        if aligned is False:
            facts = _noted(facts, f"{way} gives other values than writing does: it is not aligned, and not used")
    forced = facts.capabilities.logit_bias == "raw" and facts.capabilities.continuation and wishes.tokenizer
    return replace(facts, scoring="forced" if forced else None)


def _aligned(wishes: Wishes, facts: EndpointFacts, opening: Opening, token: TokenLogprob) -> Flow[bool | None]:
    """Score a token that was written, then the one after it. None: nothing was scored at all."""
    scorer = Scorer(wishes.model, facts, wishes.tokenizer, wishes.extra)
    for again in (True, False):
        ids = _target_ids(wishes, token)
        if isinstance(opening, IdsOpening) and ids is None:
            return None
        scored = yield from attempt(scorer.score(opening, Target(token.token, ids)))
        if isinstance(scored, Failed):
            if isinstance(scored.error, Unsupported | NotThere) or not getattr(scored.error, "retryable", False):
                return None
            raise scored.error
        [*_, entry] = scored[0]
        if not _same(entry.logprob, token.logprob, facts):
            return False
        if again:
            opening = opening.then(ids or (), token.token)
            reply = yield from _tried(_call(wishes, facts, opening, 1, 1))
            choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
            if not choices or not choices[0].tokens or not choices[0].text:
                return True  # the text has ended: one agreement must do
            token = choices[0].tokens[0]
    return True


def _target_ids(wishes: Wishes, token: TokenLogprob) -> tuple[int, ...] | None:
    if token.token_id is not None:
        return (token.token_id,)
    if wishes.tokenizer is None:
        return None
    single = _single(wishes.tokenizer, token.token)
    return None if single is None else (single,)


# --- a chat ----------------------------------------------------------------------------------------------------------


def _chat(wishes: Wishes, first: _First) -> Flow[EndpointFacts]:
    facts = _given(first)
    if wishes.tokenizer is not None:
        facts = replace(facts, names_ids=True)  # asked for; what does not know the field ignores or refuses it
    reply = yield from _tried(_call(wishes, facts, first.opening, 4, first.asked))
    if isinstance(reply, RLMError):
        facts = replace(facts, names_ids=False)
        reply = yield from _tried(_call(wishes, facts, first.opening, 4, first.asked))
    choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
    facts = _repeatable(facts, first, choices)
    whole = choices[0] if choices else first.choice
    token = next(iter(whole.tokens), None)
    facts = replace(facts, names_ids=token is not None and token.token_id is not None)
    facts = yield from _continued(wishes, facts, first.opening, whole)
    if token is None or token.logprob is None:
        return facts
    facts = yield from _biased(wishes, facts, first.opening, token)
    if facts.capabilities.continuation is None:
        return replace(facts, scoring=None if wishes.scoring == "auto" else wishes.scoring)
    return (yield from _scoring(wishes, facts, first.opening, token, ("prompt_logprobs",)))


def _continued(wishes: Wishes, facts: EndpointFacts, opening: Opening, whole: Choice) -> Flow[EndpointFacts]:
    """The first strategy after which the answer goes on as it went on by itself."""
    if wishes.continuation != "auto":
        return _can(facts, continuation=wishes.continuation)
    tokens = list(whole.tokens)
    by_logprob = len(tokens) > 1 and bool(tokens[0].token.strip())
    begin = tokens[0].token if by_logprob else whole.text[: max(1, len(whole.text) // 2)].rstrip()
    rest = whole.text[len(begin) :]
    if not whole.text.startswith(begin) or not rest:
        return _noted(facts, "its answer was too short to see whether it goes on with a begun one")
    for name in CHAT_CONTINUATIONS:
        trial = _can(facts, continuation=name)
        assert isinstance(opening, ChatOpening)
        begun = ChatOpening(opening.messages, begin)
        reply = yield from _tried(_call(wishes, trial, begun, 3, 1 if by_logprob else None))
        choices = [] if isinstance(reply, RLMError) else read_choices(reply.data, wishes.tokenizer)
        if not choices:
            continue
        written = choices[0]
        if by_logprob:
            token = written.tokens[0] if written.tokens else None
            goes_on = token is not None and token.token == tokens[1].token
            goes_on = goes_on and token is not None and _same(token.logprob, tokens[1].logprob, facts)
        else:
            goes_on = bool(written.text) and (rest.startswith(written.text) or written.text.startswith(rest))
        if goes_on:
            return trial
    return _noted(facts, "a begun answer opens a new turn")


# --- both ------------------------------------------------------------------------------------------------------------


def _entries(wishes: Wishes, facts: EndpointFacts) -> Flow[EndpointFacts]:
    """Whether every token written has an entry, in a text whose characters are several tokens."""
    if not facts.capabilities.output_logprobs:
        return facts
    opening: Opening = TextOpening(_RARE)
    if facts.endpoint == "chat":
        opening = ChatOpening((Message("user", f"Repeat: {_RARE}"),))
    reply = yield from _tried(_call(wishes, facts, opening, 4, 1))
    if isinstance(reply, RLMError):
        return facts
    usage = read_usage(reply.data)
    choices = read_choices(reply.data, wishes.tokenizer)
    if usage is None or not choices:
        return facts
    missing = usage.completion_tokens - len(choices[0].tokens)
    if missing <= (choices[0].finish_reason == "stop"):
        return facts
    note = f"{missing} of {usage.completion_tokens} tokens had no log-prob: pieces of characters have no entry"
    return _noted(_can(facts, token_entries=False), note)
