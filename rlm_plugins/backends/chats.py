"""Conversations to token ids, where what users and documents say never becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..texts import Message

Encode = Callable[[str], list[int]]


def encode_conversation(
    messages: Sequence[Message],
    specials: Iterable[str],
    *,
    render: Callable[[list[dict[str, Any]]], str],
    encode_template: Encode,
    encode_text: Encode,
) -> list[int]:
    """A conversation, rendered by a chat template and encoded with its control tokens.

    Where a message contains the text of a special token, a mark stands for it while the template is rendered, and then
    it is encoded as the plain text it is; everything around it is encoded as it would be without.
    """
    turns = [{**message.extra, "role": message.role, "content": message.content} for message in messages]
    look_alike = re.compile("|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True) if text))
    if not look_alike.pattern or not any(look_alike.search(text) for text in _strings(turns)):
        return encode_template(render(turns))
    said = "".join(_strings(turns))
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"{mark}{len(hidden) - 1}{mark}"

    shielded = [
        {
            key: value if key == "role" else _mapped(value, lambda text: look_alike.sub(hide, text))
            for key, value in turn.items()
        }
        for turn in turns
    ]
    ids: list[int] = []
    for index, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", render(shielded))):
        ids += encode_text(hidden[int(piece)]) if index % 2 else encode_template(piece) if piece else []
    return ids


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same structure with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return value
