"""What the bridges to frameworks share: one error for what fails there, and a name for somebody else's embeddings."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from ..errors import RetrievalError, RLMError, UsageError


@contextmanager
def searching(source: object) -> Generator[None]:
    """What `source` raises inside becomes a `RetrievalError` that names it, with the cause chained."""
    try:
        yield
    except RLMError:
        raise
    except Exception as error:
        raise RetrievalError(f"{type(source).__name__} failed with {type(error).__name__}: {error}") from error


def foreign_fingerprint(framework: str, embeddings: object, *, names: Sequence[str], settings: Sequence[str]) -> str:
    """A framework's embedding model by its class, the attributes that name the model, and those that change vectors.

    Nothing else is looked at, so no key or address gets in. Raises `UsageError` where nothing names the model.
    """
    kind = f"{type(embeddings).__module__}.{type(embeddings).__qualname__}"
    found = ((name, getattr(embeddings, name, None)) for name in names)
    named = {name: value for name, value in found if isinstance(value, str) and value not in ("", "unknown")}
    if not named:
        raise UsageError(
            f"nothing in {kind} says which model it is (looked at {', '.join(names)}): name it with fingerprint=..., "
            "a string that changes whenever the vectors would"
        )
    chosen = {name: value for name in settings if (value := getattr(embeddings, name, None)) is not None}
    return f"{framework}:{kind}:{json.dumps(named | chosen, sort_keys=True, default=str)}"
