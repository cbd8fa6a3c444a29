"""Failures of an endpoint as our errors: who can fix it, whether to try again, and never a key in the text."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ..errors import ModelError, RLMError, UsageError

if TYPE_CHECKING:
    import openai


class Secret:
    """A text that never shows: not in a repr, not in a log, not in an error.

    >>> Secret("sk-123")
    Secret(***)
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def scrub(self, text: str) -> str:
        """The text without the secret."""
        return text.replace(self._value, "***") if self._value else text

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        raise TypeError("a key is not written to disk or sent to another process: build the model there")


class StatusError(ModelError):
    """The endpoint answered with an HTTP status that is an error."""

    def __init__(self, message: str, status: int, *, retryable: bool, retry_after: float | None) -> None:
        super().__init__(message, retryable=retryable, retry_after=retry_after)
        self.status = status


class NotThere(UsageError):
    """The endpoint has no such path or model."""


_RETRYABLE = frozenset({408, 409, 425, 429})


def as_error(error: Exception, address: str, secret: Secret, timeout: float) -> Exception:
    """One of the library's errors; what is no failure of the endpoint (a bug) is returned as it is."""
    import openai

    if isinstance(error, RLMError):
        return error
    if isinstance(error, openai.APITimeoutError):
        return ModelError(f"{address} did not answer within {timeout:g} seconds: raise timeout=", retryable=True)
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, address, secret)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        why = secret.scrub(f"{type(cause).__name__}: {cause}" if cause else str(error))
        return ModelError(f"no whole answer from {address} ({why}): is the server running?", retryable=True)
    if isinstance(error, openai.OpenAIError):
        return ModelError(f"{address} reported in its stream: {secret.scrub(str(error))}", retryable=False)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return ModelError(f"the answer of {address} is not whole JSON: it was cut short", retryable=True)
    if type(error).__module__.startswith("httpx"):
        return ModelError(f"the connection to {address} broke ({type(error).__name__})", retryable=True)
    return error


def _of_status(error: openai.APIStatusError, address: str, secret: Secret) -> RLMError:
    status = error.status_code
    said = secret.scrub(_said(error.body) or error.message)[:500]
    if status in (401, 403):
        return UsageError(
            f"{address} refused the key with {status}: {said}; pass api_key=, or one that may use the model"
        )
    if status in (404, 405, 501):
        return NotThere(f"{address} has no such model or path ({status}): {said}; check model= and base_url=")
    retryable = status in _RETRYABLE or status >= 500
    if "insufficient_quota" in (error.code or "", _field(error.body, "type")):
        retryable = False
    wait = retry_after(error.response.headers) if retryable else None
    return StatusError(f"{address} answered {status}: {said}", status, retryable=retryable, retry_after=wait)


def _said(body: object) -> str:
    """The message in an error body, of any server's form."""
    if isinstance(body, Mapping):
        fields = cast(Mapping[str, Any], body)
        for name in ("message", "detail", "error"):
            if fields.get(name):
                return _said(fields[name]) if isinstance(fields[name], Mapping) else str(fields[name])
    return str(body) if isinstance(body, str) else ""


def _field(body: object, name: str) -> str:
    return str(cast(Mapping[str, Any], body).get(name)) if isinstance(body, Mapping) else ""


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date); None where neither says.

    >>> retry_after({"retry-after": "2"}), retry_after({"retry-after-ms": "250"}), retry_after({})
    (2.0, 0.25, None)
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            at = email.utils.parsedate_to_datetime(value).timestamp()
        except ValueError:
            continue
        return max(0.0, at - (time.time() if now is None else now))
    return None
