"""log p(a given text | what stands before it) from an endpoint, in three ways.

| way | request | needs |
|---|---|---|
| echo | one: `echo`, `logprobs` | completions; aligned echo |
| prompt log-probs | one: `prompt_logprobs` | vLLM |
| forced decoding | one per token: `max_tokens=1`, `logit_bias={token: 100}` | raw log-probs, a tokenizer |

Forced decoding is exact where the returned log-probs do not contain the bias, which the probe finds out. In all three
what comes back is checked against what was sent: a value that cannot be placed is an error, never a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, Unsupported
from ..flows import Flow, ask, ask_all
from ..requests import Sampling
from ..texts import TokenLogprob, Usage
from ..tokens import TokenIds, Tokenizer
from .openai_requests import ChatOpening, EndpointFacts, IdsOpening, Opening, TextOpening, next_call
from .openai_transport import Answered, Call
from .openai_wire import continuation_entries, read_choices, read_prompt_logprobs, read_usage

_ONE = Sampling(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored after an opening: its text, and its ids where a tokenizer is known."""

    text: str
    ids: TokenIds | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores texts at one endpoint, in the way its facts name."""

    model: str
    facts: EndpointFacts
    tokenizer: Tokenizer | None
    extra: Mapping[str, Any]

    def score(self, opening: Opening, target: Target) -> Flow[tuple[tuple[TokenLogprob, ...], Usage]]:
        """Entries of the target's tokens, and the cost. Raises `Unsupported` where the endpoint scores nothing."""
        match self.facts.scoring:
            case "echo" if not isinstance(opening, ChatOpening):
                return self._echoed(opening, target)
            case "prompt_logprobs":
                return self._prompted(opening, target)
            case "forced":
                return self._forced(opening, target)
            case _:
                raise Unsupported(
                    "scoring a given text",
                    "prompt_logprobs",
                    found=self.facts.capabilities.prompt_logprobs,
                    remedy="use an endpoint with echo or prompt_logprobs (vLLM, SGLang), or pass tokenizer= for one "
                    "whose log-probs are raw under logit_bias",
                )

    def _echoed(
        self, opening: TextOpening | IdsOpening, target: Target
    ) -> Flow[tuple[tuple[TokenLogprob, ...], Usage]]:
        whole, before = _whole(opening, target)
        call = next_call(self.model, self.facts, whole, _ONE, logprobs=1, ids=True, extra=self.extra)
        answered = yield from ask(Call(call.path, {**(call.body or {}), "echo": True}))
        [choice] = read_choices(answered.data, self.tokenizer)
        found = choice.tokens
        if isinstance(before, int):
            assert isinstance(whole, IdsOpening)
            entries = _placed(found, whole.ids, before)
        else:
            assert isinstance(whole, TextOpening)
            entries = continuation_entries(found[:-1], before, whole.text)  # the last one was written, not echoed
            entries = entries or continuation_entries(found, before, whole.text)
            if entries is None:
                raise ModelError(
                    "the echoed tokens do not spell the text that was sent, so their log-probs cannot be placed: pass "
                    "tokenizer=, so that token ids can be sent"
                )
        return _valued(entries), _usage([answered])

    def _prompted(self, opening: Opening, target: Target) -> Flow[tuple[tuple[TokenLogprob, ...], Usage]]:
        whole, before = _whole(opening, target)
        call = next_call(self.model, self.facts, whole, _ONE, extra=self.extra)
        answered = yield from ask(Call(call.path, {**(call.body or {}), "prompt_logprobs": 0}))
        if isinstance(whole, IdsOpening) and isinstance(before, int):
            found = read_prompt_logprobs(answered.data, whole.ids)
            return _valued(_placed(found, whole.ids, before)), _usage([answered])
        found = read_prompt_logprobs(answered.data)
        end = target.ids
        if end is not None and tuple(entry.token_id for entry in found[-len(end) :]) == end:
            return _valued(found[-len(end) :]), _usage([answered])
        entries = continuation_entries(found, "", target.text)
        if entries is None:
            raise ModelError(
                "the prompt's log-probs do not end in the text that was to be scored, so they cannot be placed: does "
                "the server's template put something after the answer?"
            )
        return _valued(entries), _usage([answered])

    def _forced(self, opening: Opening, target: Target) -> Flow[tuple[tuple[TokenLogprob, ...], Usage]]:
        if target.ids is None or self.tokenizer is None:
            raise Unsupported(
                "forced decoding",
                "tokenizer",
                found=None,
                remedy="pass tokenizer=, the one of the model that is served",
            )
        calls: list[Call] = []
        for index, token in enumerate(target.ids):
            done = target.ids[:index]
            begun = opening.then(done, self._said(opening, done)) if done else opening
            call = next_call(self.model, self.facts, begun, _ONE, logprobs=0, ids=True, extra=self.extra)
            calls.append(Call(call.path, {**(call.body or {}), "logit_bias": {str(token): 100}}))
        answers = yield from ask_all(calls)
        entries: list[TokenLogprob] = []
        for token, answered in zip(target.ids, answers, strict=True):
            [choice] = read_choices(answered.data, self.tokenizer)
            entries.append(self._follows(choice.tokens, token))
        return _valued(entries), _usage(answers)

    def _said(self, opening: Opening, done: TokenIds) -> str:
        """Ids as the text that stands for them. Raises `ModelError` where text cannot say them."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(done)
        if not isinstance(opening, IdsOpening) and tuple(self.tokenizer.encode(text)) != done:
            raise ModelError(
                f"{text!r} as text would be other tokens than those to be scored (a part of a character, or a merge), "
                "so forced decoding needs an endpoint that takes token ids"
            )
        return text

    def _follows(self, tokens: Sequence[TokenLogprob], token: int) -> TokenLogprob:
        """The entry of a forced token, if that is what was written."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode([token])
        if len(tokens) == 1:
            entry = tokens[0]
            same = entry.token_id == token if entry.token_id is not None else entry.token == text
            if same or (entry.token_id is None and token in self.tokenizer.end_ids):
                return TokenLogprob(text, entry.logprob, token)
        raise ModelError(
            f"the endpoint was forced to write {text!r} and gave log-probs of {[entry.token for entry in tokens]!r}: "
            "it does not follow logit_bias, or another tokenizer is served"
        )


def _whole(opening: Opening, target: Target) -> tuple[Opening, int | str]:
    """The opening with the target in it, and what stands before the target: a number of ids, or a text."""
    match opening:
        case IdsOpening(ids):
            if target.ids is None:
                raise ModelError("token ids can only be scored after token ids")
            return opening.then(target.ids, ""), len(ids)
        case TextOpening(text):
            return opening.then((), target.text), text
        case ChatOpening():
            return opening.then((), target.text), ""


def _placed(found: Sequence[TokenLogprob], ids: TokenIds, before: int) -> list[TokenLogprob]:
    """Entries of ids[before:], checked: one entry per id sent, perhaps one for a token written after them."""
    same = all(entry.token_id in (None, one) for entry, one in zip(found, ids, strict=False))
    if len(found) not in (len(ids), len(ids) + 1) or not same:
        raise ModelError(
            f"{len(ids)} token ids were sent and {len(found)} log-probs came back, or of other tokens: they cannot be "
            "placed; does the server add special tokens?"
        )
    return [
        TokenLogprob(entry.token, entry.logprob, one)
        for entry, one in zip(found[before : len(ids)], ids[before:], strict=True)
    ]


def _valued(entries: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """The entries, none of which may be without a value: nothing is scored as nothing."""
    for entry in entries:
        if entry.logprob is None:
            raise ModelError(f"the endpoint gave no log-prob for {entry.token!r}; the text may have nothing before it")
    return tuple(TokenLogprob(entry.token, entry.logprob, entry.token_id) for entry in entries)


def _usage(answers: Sequence[Answered]) -> Usage:
    total = Usage()
    for answered in answers:
        said = read_usage(answered.data, requests=answered.requests)
        total = total + (said or Usage(1, answered.requests, estimated=True))
    return total
