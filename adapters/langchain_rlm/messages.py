"""Inward: LangChain's messages as a conversation of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
)

from rlm_plugins.errors import UsageError
from rlm_plugins.texts import Message, Role

_ROLES: tuple[tuple[type[BaseMessage], Role], ...] = (
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (SystemMessage, "system"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_NAMED_ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
_TEXT_BLOCKS = frozenset({"text", "text-plain", "input_text", "output_text"})
_SILENT_BLOCKS = frozenset({"reasoning", "thinking", "redacted_thinking", "tool_call", "tool_use", "function_call"})
"""Parts of an assistant's message that are not its text; the calls themselves are in `tool_calls`."""


def conversation(messages: Sequence[BaseMessage]) -> tuple[Message, ...]:
    """Messages as turns, in order: tool and system messages as they are, tool calls and names in `Message.extra`.

    Raises `UsageError` for content that is not text (images, audio, files) and for a message without a role.
    """
    return tuple(map(_turn, messages))


def _turn(message: BaseMessage) -> Message:
    role = _role(message)
    text = message_text(message)
    sent = convert_to_openai_messages(cast(Any, message.model_copy(update={"content": text})))
    extra = {key: value for key, value in cast(dict[str, Any], sent).items() if key not in ("role", "content")}
    return Message(role, text, extra=extra)


def _role(message: BaseMessage) -> Role:
    if isinstance(message, ChatMessage):
        role = _NAMED_ROLES.get(message.role.lower())
        if role is None:
            raise UsageError(f"a message's role must be one of {', '.join(_NAMED_ROLES)}, got {message.role!r}")
        return role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise UsageError(f"{type(message).__name__} is not a turn of a conversation: leave it out")


def message_text(message: BaseMessage) -> str:
    """The text of a message. Raises `UsageError` for content that is not text."""
    if isinstance(message.content, str):
        return message.content
    parts: list[str] = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif (kind := str(block.get("type"))) in _TEXT_BLOCKS:
            parts.append(str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and kind in _SILENT_BLOCKS):
            raise UsageError(
                f"a {type(message).__name__} holds content of the type {kind!r}, but an ensemble over documents reads "
                "text only: send a text, or describe the content in words"
            )
    return "".join(parts)
