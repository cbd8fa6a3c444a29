"""Inward: a LlamaIndex LLM as a language model of the core, and chat messages as messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rlm_plugins.errors import UsageError
from rlm_plugins.models import LanguageModel
from rlm_plugins.requests import Sampling
from rlm_plugins.texts import Message, Role

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatMessage

    from .llm import ReplugLLM


class FrozenLM:
    """Where a LlamaIndex LLM becomes a language model of the core."""

    @staticmethod
    def from_llm(llm: object) -> LanguageModel:
        """The model behind an LLM, with its tokenizer, window and way of sampling; the LLM itself is left as it is.

        - a language model of the core is taken as it is: `embedded_reader()`, `TransformersLM(...)`, `Replug(...)`;
        - a `ReplugLLM` gives its ensemble;
        - a `HuggingFaceLLM` gives its model and tokenizer, in a `TransformersLM`.

        Raises `UsageError` for anything else, and for what an LLM adds to its model and the core would leave out.
        """
        for convert in _CONVERTERS:
            if (model := convert(llm)) is not None:
                return model
        raise UsageError(
            f"{_kind(llm)} cannot be mixed: REPLUG needs next-token probabilities, which LlamaIndex's interface does "
            "not give. These work: a language model of rlm_plugins (embedded_reader(), TransformersLM(...)), a "
            "HuggingFaceLLM of llama-index-llms-huggingface, or a ReplugLLM"
        )


def _from_core(llm: object) -> LanguageModel | None:
    return llm if isinstance(llm, LanguageModel) else None


def _from_replug(llm: object) -> LanguageModel | None:
    if _class_name(llm) != "ReplugLLM":
        return None
    return cast("ReplugLLM", llm).language_model


# What a HuggingFaceLLM can add to its model, with the value that adds nothing, and where it belongs here.
_ADDED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "system_prompt": (("", None), "put it into a system message, or into template="),
    "query_wrapper_prompt": (("{query_str}", "", None), "use template="),
    "stopping_ids": (([], (), None), "use stop="),
}
_SAMPLING = frozenset({"do_sample", "temperature", "top_p", "max_new_tokens", "pad_token_id"})


def _from_hugging_face(llm: object) -> LanguageModel | None:
    """`HuggingFaceLLM`, known by its class name: it is not a dependency."""
    if _class_name(llm) != "HuggingFace_LLM":
        return None
    model, tokenizer = getattr(llm, "_model", None), getattr(llm, "_tokenizer", None)
    if model is None or tokenizer is None:
        raise UsageError(f"{_kind(llm)} holds no model and tokenizer (_model, _tokenizer)")
    for name, (nothing, instead) in _ADDED.items():
        value = getattr(llm, name, None)
        plain: object = getattr(value, "template", value)
        if plain not in nothing:
            raise UsageError(f"{name}={plain!r} of the HuggingFaceLLM would be left out here: {instead}")
    sampling = _hugging_face_sampling(llm)
    from rlm_plugins.backends.transformers_local import TransformersLM

    found = TransformersLM(model, tokenizer=tokenizer)
    found.sampling = sampling
    window = getattr(llm, "context_window", None)
    if isinstance(window, int):
        found.context_window = window if found.context_window is None else min(window, found.context_window)
    return found


def _hugging_face_sampling(llm: object) -> Sampling:
    """`generate_kwargs` and `max_new_tokens`; where nothing is said about sampling it is greedy."""
    asked = dict(cast("Mapping[str, Any]", getattr(llm, "generate_kwargs", None) or {}))
    unknown = sorted(asked.keys() - _SAMPLING)
    if unknown:
        raise UsageError(
            f"generate_kwargs of the HuggingFaceLLM holds {', '.join(unknown)}, which a mixture of documents has no "
            f"counterpart for; known are {', '.join(sorted(_SAMPLING))}"
        )
    sampled = asked.get("do_sample", "temperature" in asked)
    return Sampling(
        temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(asked.get("top_p", 1.0)) if sampled else 1.0,
        max_tokens=int(asked.get("max_new_tokens", getattr(llm, "max_new_tokens", Sampling().max_tokens))),
    )


_CONVERTERS: tuple[Callable[[object], LanguageModel | None], ...] = (_from_core, _from_replug, _from_hugging_face)
"""Tried in turn: each gives the model, None where it does not know the object, or an error that says why not."""


def _class_name(llm: object) -> str | None:
    named = getattr(type(llm), "class_name", None)
    return named() if callable(named) else None  # pyright: ignore[reportReturnType]


def _kind(llm: object) -> str:
    return f"{type(llm).__module__}.{type(llm).__qualname__}"


# --- messages --------------------------------------------------------------------------------------------------------

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
}
_NO_CONTENT = frozenset({"thinking", "cache"})


def messages_from_chat(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """A conversation as messages of the core; tool calls and other extras travel in `Message.extra`.

    Raises `UsageError` for a content block that is not text.
    """
    return tuple(_message(message) for message in messages)


def _message(message: ChatMessage) -> Message:
    texts: list[str] = []
    extra = dict(message.additional_kwargs)
    for block in message.blocks:
        kind = str(getattr(block, "block_type", type(block).__name__))
        if kind == "text":
            texts.append(str(getattr(block, "text", "")))
        elif kind == "tool_call":
            extra["tool_calls"] = [*extra.get("tool_calls", ()), block.model_dump()]
        elif kind not in _NO_CONTENT:
            raise UsageError(f"a message holds a block of the kind {kind!r}; only text can be sent to a local model")
    role = str(getattr(message.role, "value", message.role))
    if role not in _ROLES:
        raise UsageError(f"a message has the role {role!r}; known are {', '.join(_ROLES)}")
    return Message(_ROLES[role], "\n".join(texts), extra=extra)
