"""Limits: how many requests at once, and how many a minute."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UsageError
from ..flows import Batch, Failed
from ..models import LanguageModel
from ..requests import Probe, ReadStream, Request
from .front import Front


class LimitedModel(Front):
    """At most `max_concurrency` requests under way (in all threads together, and on each event loop), and at most
    `per_minute` begun a minute, evenly: what is not used is kept up to `burst`.

    Requests of a batch are asked one by one, so that each has its turn: where an endpoint takes several prompts in one
    request and only their number at once matters, use its own `max_concurrency`. Probing and reading an open stream
    are not counted. Raises `UsageError` for values out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_concurrency: int = 8,
        per_minute: float | None = None,
        burst: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_concurrency < 1 or burst < 1 or (per_minute is not None and per_minute <= 0):
            raise UsageError("max_concurrency and burst must be at least 1, and per_minute above 0")
        super().__init__(lm)
        self._most = max_concurrency
        self._rate = _Rate(per_minute, burst, clock)
        self._slots = threading.BoundedSemaphore(max_concurrency)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def answer(self, batch: Batch) -> Sequence[Any]:
        if len(batch) == 1:
            return [self._one(batch[0])]
        with ThreadPoolExecutor(min(self._most, max(1, len(batch)))) as pool:
            return list(pool.map(self._one, batch))

    def _one(self, request: Request[Any]) -> Any:
        try:
            if isinstance(request, ReadStream | Probe):
                return self.lm.answer([request])[0]
            with self._slots:
                time.sleep(self._rate.wait())
                return self.lm.answer([request])[0]
        except Exception as error:
            return Failed(error)

    async def aanswer(self, batch: Batch) -> Sequence[Any]:
        slots = self._loops.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._most))
        if len(batch) == 1:
            return [await self._aone(batch[0], slots)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._aone(request, slots)) for request in batch]
        return [task.result() for task in tasks]

    async def _aone(self, request: Request[Any], slots: asyncio.Semaphore) -> Any:
        try:
            if isinstance(request, ReadStream | Probe):
                return (await self.lm.aanswer([request]))[0]
            async with slots:
                await asyncio.sleep(self._rate.wait())
                return (await self.lm.aanswer([request]))[0]
        except Exception as error:
            return Failed(error)


class _Rate:
    """A bucket of `burst` requests that fills evenly. Shared by threads and loops."""

    def __init__(self, per_minute: float | None, burst: int, clock: Callable[[], float]) -> None:
        self._seconds_each = 0.0 if per_minute is None else 60.0 / per_minute
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock() - burst * self._seconds_each

    def wait(self) -> float:
        """Take the next turn; seconds until it is there."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - self._burst * self._seconds_each) + self._seconds_each
            return max(0.0, self._free_at - now)
