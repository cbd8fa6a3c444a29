"""Methods as flows: generators that ask, and are answered, and never do I/O themselves.

    passages = yield from ask(Retrieve(query, k=10))

A driver answers what a flow asks, one batch at a time: `run` (or `iterate`, which also yields what the flow emits) in
threads, `arun` (or `aiterate`) on an event loop. The driver owns what the answers open, and the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from .errors import DeadlineExceeded
from .requests import Emit, Reply, Request, Resource

T = TypeVar("T")

Batch = Sequence[Request[Any]]
Flow = Generator[Batch, Sequence[Any], T]


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that could not be answered. `ask` raises the error in the flow that asked, and in no other."""

    error: Exception


class Handler(Protocol):
    """Answers batches of requests: one reply each, in order, `Failed` where there is none."""

    def answer(self, batch: Batch) -> Sequence[Any]: ...

    async def aanswer(self, batch: Batch) -> Sequence[Any]: ...


# --- what a method uses ----------------------------------------------------------------------------------------------


def ask(request: Request[Reply]) -> Flow[Reply]:
    """Ask one thing. Raises what the answer failed with."""
    [reply] = yield [request]
    if isinstance(reply, Failed):
        raise reply.error
    return cast(Reply, reply)


def ask_each(requests: Sequence[Request[Reply]]) -> Flow[list[Reply | Failed]]:
    """Ask independent things at once, and be told of each whether it failed."""
    return list((yield requests)) if requests else []


def ask_all(requests: Sequence[Request[Reply]]) -> Flow[list[Reply]]:
    """Ask independent things at once. Raises the first failure."""
    replies = yield from ask_each(requests)
    for reply in replies:
        if isinstance(reply, Failed):
            raise reply.error
    return cast(list[Reply], replies)


def attempt(flow: Flow[T]) -> Flow[T | Failed]:
    """Run a flow, and return its error instead of raising it."""
    try:
        return (yield from flow)
    except Exception as error:
        return Failed(error)


def together(flows: Iterable[Flow[T]]) -> Flow[list[T]]:
    """Advance flows in step: what they ask in the same step becomes one batch. If one raises, the others are closed."""
    running = list(flows)
    results: list[Any] = [None] * len(running)
    asked: dict[int, Batch] = {}

    def advance(index: int, replies: Sequence[Any] | None) -> None:
        try:
            asked[index] = next(running[index]) if replies is None else running[index].send(replies)
        except StopIteration as stop:
            results[index] = stop.value
            asked.pop(index, None)

    try:
        for index in range(len(running)):
            advance(index, None)
        while asked:
            turn = dict(asked)
            replies = yield [request for batch in turn.values() for request in batch]
            start = 0
            for index, batch in turn.items():
                advance(index, replies[start : start + len(batch)])
                start += len(batch)
    finally:
        with ExitStack() as closing:  # all are closed, even if one will not be
            for flow in reversed(running):
                closing.callback(flow.close)
    return results


# --- drivers ---------------------------------------------------------------------------------------------------------


_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""The deadline of the run that a handler is answering: runs inside the handler end with it, in threads too."""


class _Course(Generic[T]):
    """A flow under way: what it asks now, what was opened for it, when it must end. The drivers do the waiting."""

    def __init__(self, flow: Flow[T], deadline: float | None) -> None:
        self.flow = flow
        self.deadline = min((end for end in (deadline, _deadline.get()) if end is not None), default=None)
        self.opened: list[Resource] = []
        self.batch: Batch = ()
        self.done = False
        self.value: Any = None
        self._advance(None)

    def _advance(self, replies: Sequence[Any] | None) -> None:
        try:
            self.batch = next(self.flow) if replies is None else self.flow.send(replies)
        except StopIteration as stop:
            self.done, self.value = True, stop.value

    @property
    def events(self) -> list[Any]:
        return [request.event for request in self.batch if isinstance(request, Emit)]

    @property
    def asked(self) -> list[Request[Any]]:
        return [request for request in self.batch if not isinstance(request, Emit)]

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()

    def overdue(self) -> bool:
        left = self.seconds_left()
        return left is not None and left <= 0

    def reply(self, answers: Sequence[Any] | Failed) -> None:
        asked = len(self.asked)
        if isinstance(answers, Failed):
            answers = [answers] * asked
        self.opened += [answer for answer in answers if isinstance(answer, Resource)]
        if len(answers) != asked:
            raise RuntimeError(f"a handler was asked {asked} things and answered {len(answers)}")
        waiting = iter(answers)
        self._advance([None if isinstance(request, Emit) else next(waiting) for request in self.batch])


_TOO_LATE = "the time given to this run is over: raise `deadline`, or ask for less"


def iterate(flow: Flow[T], handler: Handler, *, deadline: float | None = None) -> Generator[Any, None, T]:
    """Drive a flow in this thread, yielding what it emits; its result is the generator's return value.

    `deadline` is a time of `time.monotonic()`. Past it every request fails with `DeadlineExceeded`, which a flow may
    catch to return what it has. Closing the generator closes the flow and everything opened for it.
    """
    course = None
    try:
        course = _Course(flow, deadline)
        while not course.done:
            yield from course.events
            if not course.asked:
                course.reply(())
            elif course.overdue():
                course.reply(Failed(DeadlineExceeded(_TOO_LATE)))
            else:
                outer = _deadline.set(course.deadline)
                try:
                    answers = handler.answer(course.asked)
                except Exception as error:
                    answers = Failed(error)
                finally:
                    _deadline.reset(outer)
                course.reply(answers)
        return cast(T, course.value)
    finally:
        with (
            ExitStack() as closing
        ):  # the flow first, then the resources, the last opened first; one failure stops none
            for resource in course.opened if course else []:
                closing.callback(resource.close)
            closing.callback(flow.close)


@dataclass(frozen=True, slots=True)
class _Result:
    value: Any


async def _adrive(flow: Flow[Any], handler: Handler, deadline: float | None) -> AsyncGenerator[Any, None]:
    """`iterate` on an event loop; the last thing yielded is the `_Result`."""
    course = None
    try:
        course = _Course(flow, deadline)
        while not course.done:
            for event in course.events:
                yield event
            if not course.asked:
                course.reply(())
            elif course.overdue():
                course.reply(Failed(DeadlineExceeded(_TOO_LATE)))
            else:
                left = course.seconds_left()
                clock = asyncio.timeout(left)
                try:
                    async with clock:
                        answers = await handler.aanswer(course.asked)
                except Exception as error:
                    expired = isinstance(error, TimeoutError) and clock.expired()
                    answers = Failed(DeadlineExceeded(_TOO_LATE) if expired else error)
                course.reply(answers)
        yield _Result(course.value)
    finally:
        async with AsyncExitStack() as closing:
            for resource in course.opened if course else []:
                closing.push_async_callback(resource.aclose)
            closing.callback(flow.close)


async def aiterate(flow: Flow[Any], handler: Handler, *, deadline: float | None = None) -> AsyncGenerator[Any, None]:
    """Drive a flow on the event loop, yielding what it emits. Close it (`aclose`) when you stop reading early."""
    course = _adrive(flow, handler, deadline)
    try:
        async for event in course:
            if not isinstance(event, _Result):
                yield event
    finally:
        await course.aclose()


def run(flow: Flow[T], handler: Handler, *, deadline: float | None = None) -> T:
    """Drive a flow to its result; what it emits is dropped."""
    course = iterate(flow, handler, deadline=deadline)
    while True:
        try:
            next(course)
        except StopIteration as stop:
            return cast(T, stop.value)


async def arun(flow: Flow[T], handler: Handler, *, deadline: float | None = None) -> T:
    """Drive a flow to its result on the event loop; what it emits is dropped."""
    course = _adrive(flow, handler, deadline)
    try:
        async for event in course:
            if isinstance(event, _Result):
                return cast(T, event.value)
    finally:
        await course.aclose()
    raise AssertionError("a driven flow always ends in a result")
