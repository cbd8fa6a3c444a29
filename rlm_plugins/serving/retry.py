"""Trying again: what failed and may pass, after a wait that grows and is never the same for two."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Generator, Sequence
from typing import Any

from ..errors import ModelError, UsageError
from ..flows import Batch, Failed
from ..models import LanguageModel
from ..requests import ReadStream
from .front import Front


class RetryingModel(Front):
    """Asks again for what failed with a retryable `ModelError`, and for nothing else of the batch.

    Attempt n waits a random time between half of `first_wait * 2**n` seconds and all of it, at most `longest_wait`, and
    never less than the endpoint asked for (`retry-after`); an endpoint that asks for more than `longest_wait` is not
    waited for. A stream that has begun is not repeated: its reader has seen the text. Use the endpoint's own retries
    (`OpenAICompatibleLM(max_retries=0)`) or these, not both. Raises `UsageError` for values out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        attempts: int = 4,
        first_wait: float = 0.5,
        longest_wait: float = 60.0,
        rng: random.Random | None = None,
    ) -> None:
        if attempts < 1 or first_wait < 0 or longest_wait < first_wait:
            raise UsageError("attempts must be at least 1, and 0 <= first_wait <= longest_wait")
        super().__init__(lm)
        self._attempts = attempts
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._rng = rng or random.Random()

    def answer(self, batch: Batch) -> Sequence[Any]:
        course = self._course(batch)
        todo = next(course)
        while True:
            wait, requests = todo
            time.sleep(wait)
            try:
                todo = course.send(self.lm.answer(requests))
            except StopIteration as stop:
                return stop.value

    async def aanswer(self, batch: Batch) -> Sequence[Any]:
        course = self._course(batch)
        todo = next(course)
        while True:
            wait, requests = todo
            await asyncio.sleep(wait)
            try:
                todo = course.send(await self.lm.aanswer(requests))
            except StopIteration as stop:
                return stop.value

    def _course(self, batch: Batch) -> Generator[tuple[float, Batch], Sequence[Any], list[Any]]:
        """Seconds to wait and what to ask then, until all is answered."""
        replies = list((yield 0.0, batch))
        for attempt in range(1, self._attempts):
            again = [index for index, reply in enumerate(replies) if self._may_pass(batch[index], reply)]
            if not again:
                break
            wait = max(self._wait(attempt - 1, replies[index].error) for index in again)
            answers = yield wait, [batch[index] for index in again]
            for index, reply in zip(again, answers, strict=True):
                replies[index] = reply
        return replies

    def _may_pass(self, request: Any, reply: Any) -> bool:
        if isinstance(request, ReadStream) or not isinstance(reply, Failed):
            return False
        error = reply.error
        return isinstance(error, ModelError) and error.retryable and (error.retry_after or 0.0) <= self._longest_wait

    def _wait(self, attempt: int, error: ModelError) -> float:
        longest = min(self._longest_wait, self._first_wait * 2**attempt)
        return max(longest * (0.5 + self._rng.random() / 2), error.retry_after or 0.0)
