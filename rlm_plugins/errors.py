"""Every error the library raises on purpose.

    RLMError
    ├── UsageError (also ValueError)      the caller can fix it: a bad argument, a missing part, an unusable input
    │   └── MissingExtra (also ImportError)   an optional dependency is not installed; the message holds the command
    ├── Unsupported                       the model or endpoint cannot do what the method needs
    ├── ModelError                        the model or endpoint failed; `retryable` says whether trying again can help
    │   └── DeadlineExceeded (also TimeoutError)
    └── RetrievalError                    the retriever or embedder failed

A message says what was got, what was expected and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .texts import Generation


class RLMError(Exception):
    """The root: catching it catches everything this library raises on purpose."""


class UsageError(RLMError, ValueError):
    """The call is wrong and the caller can put it right."""


class MissingExtra(UsageError, ImportError):
    """A part needs a package that is not installed."""

    def __init__(self, part: str, package: str, extra: str) -> None:
        super().__init__(f'{part} needs {package}, which is not installed: pip install "rlm-plugins[{extra}]"')


class Unsupported(RLMError):
    """The model cannot do what the method needs.

    `capability` names the field of `Capabilities`, `found` what the model has, `remedy` what would provide it.
    """

    def __init__(self, needed_by: str, capability: str, *, found: object, remedy: str) -> None:
        super().__init__(f"{needed_by} needs {capability}, but the model has {capability} = {found!r}; {remedy}")
        self.capability = capability
        self.found = found
        self.remedy = remedy


class ModelError(RLMError):
    """The model or its endpoint failed.

    `retry_after`: seconds the endpoint asked to wait, where it said so. `partial`: the `Generation` that had arrived,
    and was paid for, when the failure cut it short.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        retry_after: float | None = None,
        partial: Generation | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after
        self.partial = partial


class DeadlineExceeded(ModelError, TimeoutError):
    """The time given to a run is over."""


class RetrievalError(RLMError):
    """The retriever or the embedder failed; the cause is chained."""
