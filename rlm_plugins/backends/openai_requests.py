"""What is sent to an OpenAI-compatible endpoint: a prompt to go on with, and the body that asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..capabilities import Capabilities
from ..errors import Unsupported
from ..requests import Sampling
from ..texts import Message
from ..tokens import TokenIds
from .openai_transport import COMPLETIONS, Call

Endpoint = Literal["completions", "chat"]
Continuation = Literal["completions", "continue_final_message", "assistant_message", "prefix"]
ScoringWay = Literal["echo", "prompt_logprobs", "forced"]

CHAT = "/chat/completions"
PATHS: dict[Endpoint, str] = {"completions": COMPLETIONS, "chat": CHAT}


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """What a probe found out, and what follows for what is sent."""

    endpoint: Endpoint
    capabilities: Capabilities
    scoring: ScoringWay | None = None
    """How a given text is scored; None where it cannot be."""
    names_ids: bool = False
    """It can name tokens by id (`return_tokens_as_token_ids`)."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    context_window: int | None = None


@dataclass(frozen=True, slots=True)
class TextOpening:
    """A prompt as text; the server adds BOS where its model has one."""

    text: str

    def then(self, ids: TokenIds, text: str) -> TextOpening:
        return TextOpening(self.text + text)


@dataclass(frozen=True, slots=True)
class IdsOpening:
    """A prompt as token ids, BOS included."""

    ids: TokenIds

    def then(self, ids: TokenIds, text: str) -> IdsOpening:
        return IdsOpening(self.ids + ids)


@dataclass(frozen=True, slots=True)
class ChatOpening:
    """A conversation, and what of the answer to it is there already."""

    messages: tuple[Message, ...]
    answer: str = ""

    def then(self, ids: TokenIds, text: str) -> ChatOpening:
        return ChatOpening(self.messages, self.answer + text)


Opening = TextOpening | IdsOpening | ChatOpening
"""A prompt as it is sent. `then` is the opening after something was written."""


# --- how a chat is made to go on with an answer ----------------------------------------------------------------------

Fields = dict[str, Any]


def _continue_final_message(answer: str) -> tuple[Fields, Fields]:
    """vLLM, SGLang: the last message is open, and no new turn is begun."""
    return _assistant(answer), {"continue_final_message": True, "add_generation_prompt": False}


def _assistant_message(answer: str) -> tuple[Fields, Fields]:
    """llama.cpp, some gateways: a trailing assistant message is gone on with."""
    return _assistant(answer), {}


def _prefix(answer: str) -> tuple[Fields, Fields]:
    """Mistral, DeepSeek (beta): the message says that it is a beginning."""
    return {**_assistant(answer), "prefix": True}, {}


def _assistant(answer: str) -> Fields:
    return {"role": "assistant", "content": answer}


CHAT_CONTINUATIONS: dict[Continuation, Callable[[str], tuple[Fields, Fields]]] = {
    "continue_final_message": _continue_final_message,
    "assistant_message": _assistant_message,
    "prefix": _prefix,
}
"""By name: the answer so far to the message that holds it and the fields beside the messages."""


# --- bodies ----------------------------------------------------------------------------------------------------------


def next_call(
    model: str,
    facts: EndpointFacts,
    opening: Opening,
    sampling: Sampling,
    *,
    logprobs: int | None = None,
    ids: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Call:
    """The call that writes on. `logprobs`: alternatives per token, None for no log-probs; `ids`: name tokens by id.

    Only what differs from the API's defaults is sent. Raises `Unsupported` where an answer is begun and the chat cannot
    go on with it.
    """
    body: Fields = {"model": model, facts.token_limit: sampling.max_tokens, "temperature": sampling.temperature}
    if sampling.top_p != 1.0:
        body["top_p"] = sampling.top_p
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    body |= prompt_fields(opening, facts.capabilities.continuation)
    if logprobs is not None:
        body |= logprob_fields(facts.endpoint, logprobs)
        if ids and facts.names_ids:
            body["return_tokens_as_token_ids"] = True
    return Call(PATHS[facts.endpoint], {**body, **(extra or {})})


def logprob_fields(endpoint: Endpoint, alternatives: int) -> Fields:
    """How log-probs with so many alternatives are asked for."""
    if endpoint == "completions":
        return {"logprobs": max(1, alternatives)}  # some servers take 0 for "none"
    return {"logprobs": True, "top_logprobs": alternatives} if alternatives else {"logprobs": True}


def prompt_fields(opening: Opening, continuation: str | None) -> Fields:
    """The prompt in a body. Raises `Unsupported` where a chat cannot go on with the answer that is begun."""
    match opening:
        case TextOpening(text):
            return {"prompt": text}
        case IdsOpening(ids):
            return {"prompt": list(ids)}
        case ChatOpening(messages, answer):
            sent: list[Fields] = [
                {**message.extra, "role": message.role, "content": message.content} for message in messages
            ]
            if not answer:
                return {"messages": sent}
            way = _chat_continuation(continuation)
            last, beside = way(answer)
            return {"messages": [*sent, last], **beside}


def _chat_continuation(name: str | None) -> Callable[[str], tuple[Fields, Fields]]:
    for known, way in CHAT_CONTINUATIONS.items():
        if known == name:
            return way
    raise Unsupported(
        "going on with a begun answer",
        "continuation",
        found=name,
        remedy='use a completions endpoint, or a chat that continues (vLLM: continuation="continue_final_message")',
    )
