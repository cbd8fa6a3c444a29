"""Arguments that are refused: pydantic's findings as one `UsageError` that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError

from rlm_plugins.errors import UsageError


def refused(part: str, error: ValidationError, known: Iterable[str]) -> UsageError:
    """What pydantic found wrong with the arguments of `part`, whose names are `known`."""
    found: list[str] = []
    for detail in error.errors(include_url=False):
        name = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            found.append(unknown(part, "argument", [name], known))
        else:
            found.append(f"{part}({name}=...): {detail['msg']}, got {type(detail['input']).__name__}")
    return UsageError("; ".join(dict.fromkeys(found)))


def unknown(part: str, kind: str, names: Iterable[str], known: Iterable[str]) -> str:
    """
    >>> unknown("ChatReplug", "argument", ["retreiver"], ["llm", "retriever"])
    "ChatReplug has no argument 'retreiver' (did you mean 'retriever'?); it takes llm, retriever"
    """
    known = list(known)
    parts: list[str] = []
    for name in names:
        near = get_close_matches(name, known, n=1)
        parts.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    return f"{part} has no {kind} {', '.join(parts)}; it takes {', '.join(known)}"
