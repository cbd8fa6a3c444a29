"""Flows and their drivers: what is asked arrives, what is opened is closed, whoever drives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.errors import DeadlineExceeded
from rlm_plugins.flows import (
    Failed,
    Flow,
    aiterate,
    arun,
    ask,
    ask_all,
    ask_each,
    attempt,
    iterate,
    run,
    together,
)
from rlm_plugins.requests import Emit, Request


@dataclass(frozen=True)
class Double(Request[int]):
    n: int


@dataclass(frozen=True)
class Open(Request["Thing"]):
    name: str


@dataclass
class Thing:
    name: str
    log: list[str]
    fails: bool = False

    def close(self) -> None:
        self.log.append(f"close {self.name}")
        if self.fails:
            raise OSError(f"{self.name} will not close")

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.close()


@dataclass
class World:
    """A handler that doubles numbers and opens things; `batches` are the sizes it saw, `log` what was closed."""

    fail_on: frozenset[int] = frozenset()
    raises: Exception | None = None
    stubborn: frozenset[str] = frozenset()
    batches: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def answer(self, batch: Sequence[Request[Any]]) -> list[Any]:
        self.batches.append(len(batch))
        if self.raises is not None:
            raise self.raises
        return [self._one(request) for request in batch]

    def _one(self, request: Request[Any]) -> Any:
        match request:
            case Double(n) if n in self.fail_on:
                return Failed(ValueError(f"no {n}"))
            case Double(n):
                return 2 * n
            case Open(name):
                return Thing(name, self.log, fails=name in self.stubborn)
            case _:
                raise AssertionError(request)

    async def aanswer(self, batch: Sequence[Request[Any]]) -> list[Any]:
        await asyncio.sleep(0)
        return self.answer(batch)


Driver = Callable[..., Any]


def async_run(flow: Flow[Any], handler: Any, *, deadline: float | None = None) -> Any:
    return asyncio.run(arun(flow, handler, deadline=deadline))


both = pytest.mark.parametrize("drive", [run, async_run], ids=["run", "arun"])


def doubled(times: int, start: int = 1) -> Flow[int]:
    for _ in range(times):
        start = yield from ask(Double(start))
    return start


# --- asking ----------------------------------------------------------------------------------------------------------


@both
def test_flows_of_uneven_length_share_batches_while_they_last(drive: Driver) -> None:
    world = World()
    assert drive(together(doubled(n) for n in (0, 1, 3)), world) == [1, 2, 8]
    assert world.batches == [2, 1, 1]


@both
def test_nested_flows_merge_into_the_same_batches(drive: Driver) -> None:
    def outer() -> Flow[list[int]]:
        first = yield from together([doubled(1), doubled(2)])
        return (yield from ask_all([Double(n) for n in first]))

    world = World()
    assert drive(together([outer(), outer(), doubled(1)]), world) == [[4, 8], [4, 8], 2]
    assert world.batches == [5, 2, 4]


@both
def test_asking_nothing_reaches_no_handler(drive: Driver) -> None:
    def flow() -> Flow[tuple[Any, ...]]:
        return (yield from ask_all([])), (yield from ask_each([])), (yield from together([]))

    world = World()
    assert drive(flow(), world) == ([], [], [])
    assert world.batches == []


@both
def test_a_failure_is_raised_only_in_the_flow_that_asked(drive: Driver) -> None:
    def careful(n: int) -> Flow[str]:
        try:
            return str((yield from ask(Double(n))))
        except ValueError as error:
            return f"failed: {error}"

    assert drive(together([careful(1), careful(2), careful(3)]), World(frozenset({2}))) == ["2", "failed: no 2", "6"]


@both
def test_ask_each_tells_which_failed_and_ask_all_raises_the_first(drive: Driver) -> None:
    world = World(frozenset({2, 3}))
    replies = drive(ask_each([Double(1), Double(2), Double(3)]), world)
    assert replies[0] == 2
    assert [str(reply.error) for reply in replies[1:]] == ["no 2", "no 3"]
    with pytest.raises(ValueError, match="no 2"):
        drive(ask_all([Double(1), Double(2), Double(3)]), world)


@both
def test_a_handler_that_raises_fails_every_request_of_the_batch(drive: Driver) -> None:
    world = World(raises=OSError("429"))
    replies = drive(together([attempt(doubled(1)), attempt(doubled(2))]), world)
    assert [type(reply.error) for reply in replies] == [OSError, OSError]
    with pytest.raises(OSError, match="429"):
        drive(doubled(1), world)


@both
def test_attempt_returns_what_was_raised_and_keeps_what_was_not(drive: Driver) -> None:
    def broken() -> Flow[int]:
        yield from ask(Double(1))
        raise KeyError("later")

    [good, bad] = drive(together([attempt(doubled(2)), attempt(broken())]), World())
    assert good == 4
    assert isinstance(bad, Failed)
    assert isinstance(bad.error, KeyError)


@both
@pytest.mark.parametrize("answers", [0, 1, 3])
def test_the_wrong_number_of_replies_is_refused_and_what_they_opened_is_closed(drive: Driver, answers: int) -> None:
    log: list[str] = []

    class Miscounting:
        def answer(self, batch: Any) -> list[Any]:
            return [Thing(str(i), log) for i in range(answers)]

        async def aanswer(self, batch: Any) -> list[Any]:
            return self.answer(batch)

    with pytest.raises(RuntimeError, match=f"asked 2 things and answered {answers}"):
        drive(ask_all([Double(1), Double(2)]), Miscounting())
    assert log == [f"close {i}" for i in reversed(range(answers))]


# --- closing ---------------------------------------------------------------------------------------------------------


def opener(log: list[str], *names: str, then: Exception | None = None) -> Flow[str]:
    try:
        for name in names:
            yield from ask(Open(name))
        if then:
            raise then
        return "done"
    finally:
        log.append("flow ends")


@both
def test_resources_are_closed_last_first_after_the_flow(drive: Driver) -> None:
    world = World()
    assert drive(opener(world.log, "a", "b"), world) == "done"
    assert world.log == ["flow ends", "close b", "close a"]


@both
def test_resources_are_closed_when_the_flow_fails(drive: Driver) -> None:
    world = World()
    with pytest.raises(KeyError):
        drive(opener(world.log, "a", "b", then=KeyError()), world)
    assert world.log == ["flow ends", "close b", "close a"]


@both
def test_one_resource_that_will_not_close_leaves_none_open(drive: Driver) -> None:
    world = World(stubborn=frozenset("b"))
    with pytest.raises(OSError, match="b will not close"):
        drive(opener(world.log, "a", "b", "c"), world)
    assert world.log == ["flow ends", "close c", "close b", "close a"]


@both
def test_if_one_flow_raises_the_others_are_closed(drive: Driver) -> None:
    log: list[str] = []

    def patient(name: str) -> Flow[None]:
        try:
            yield from ask_all([Double(1)])
            yield from ask_all([Double(1)])
        finally:
            log.append(name)

    def hasty() -> Flow[None]:
        yield from ask(Double(1))
        raise KeyError("hasty")

    with pytest.raises(KeyError, match="hasty"):
        drive(together([patient("a"), hasty(), patient("b")]), World())
    assert log == ["a", "b"]


@both
def test_a_flow_may_ask_in_finally_when_it_was_not_closed(drive: Driver) -> None:
    def flow() -> Flow[int]:
        try:
            yield from ask(Double(7))
        finally:
            yield from ask(Double(2))
        return 0

    with pytest.raises(ValueError, match="no 7"):
        drive(flow(), World(frozenset({7})))


def asks_while_closing(log: list[str]) -> Flow[None]:
    try:
        yield from ask(Open("a"))
        yield [Emit("here")]
        yield from ask(Double(1))
    finally:
        log.append("asks")
        yield from ask(Double(2))


def test_a_flow_that_asks_while_it_is_closed_is_an_error_that_leaks_nothing() -> None:
    world = World()
    course = iterate(asks_while_closing(world.log), world)
    assert next(course) == "here"
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        course.close()
    assert world.log == ["asks", "close a"]


async def test_a_flow_that_asks_while_it_is_closed_leaks_nothing_on_an_event_loop() -> None:
    world = World()
    course = aiterate(asks_while_closing(world.log), world)
    assert await anext(course) == "here"
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        await course.aclose()
    assert world.log == ["asks", "close a"]


@both
def test_together_closes_every_flow_even_if_one_asks_while_it_is_closed(drive: Driver) -> None:
    log: list[str] = []

    def asking() -> Flow[None]:
        try:
            yield from ask(Double(1))
        finally:
            yield from ask(Double(2))

    def quiet(name: str) -> Flow[None]:
        try:
            yield from ask(Double(1))
        finally:
            log.append(name)

    def hasty() -> Flow[None]:
        raise KeyError("hasty")
        yield

    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        drive(together([quiet("a"), asking(), quiet("b"), hasty()]), World())
    assert sorted(log) == ["a", "b"]


# --- events ----------------------------------------------------------------------------------------------------------


def telling(*names: str) -> Flow[str]:
    for name in names:
        yield [Emit(f"before {name}")]
        reply = yield [Emit(f"with {name}"), Double(1), Emit(f"also {name}")]
        assert reply == [None, 2, None]
    return "told"


TOLD = ["before a", "with a", "also a", "before b", "with b", "also b"]


def test_events_come_out_in_the_order_they_were_emitted() -> None:
    world = World()
    course = iterate(telling("a", "b"), world)
    seen: list[Any] = []
    while True:
        try:
            seen.append(next(course))
        except StopIteration as stop:
            result = stop.value
            break
    assert (seen, result) == (TOLD, "told")
    assert world.batches == [1, 1]
    assert run(telling("a"), World()) == "told"


async def test_events_come_out_in_the_same_order_on_an_event_loop() -> None:
    assert [event async for event in aiterate(telling("a", "b"), World())] == TOLD
    assert await arun(telling("a"), World()) == "told"


def test_an_event_is_given_out_before_what_was_asked_with_it_is_answered() -> None:
    world = World()
    course = iterate(telling("a"), world)
    assert [next(course), next(course)] == ["before a", "with a"]
    assert world.batches == []
    course.close()


def emitting_opener(log: list[str]) -> Flow[None]:
    try:
        yield from ask(Open("a"))
        yield from ask(Open("b"))
        for n in range(9):
            yield [Emit(n)]
    finally:
        log.append("flow ends")


def test_closing_iterate_early_closes_the_flow_and_its_resources() -> None:
    world = World()
    course = iterate(emitting_opener(world.log), world)
    assert next(course) == 0
    course.close()
    assert world.log == ["flow ends", "close b", "close a"]


async def test_closing_aiterate_early_closes_the_flow_and_its_resources() -> None:
    world = World()
    course = aiterate(emitting_opener(world.log), world)
    assert await anext(course) == 0
    await course.aclose()
    assert world.log == ["flow ends", "close b", "close a"]


def test_an_unstarted_course_can_be_closed() -> None:
    world = World()
    iterate(emitting_opener(world.log), world).close()
    assert world.log == []


# --- deadlines and cancellation --------------------------------------------------------------------------------------


def partial() -> Flow[list[int]]:
    got: list[int] = []
    try:
        for n in range(5):
            got.append((yield from ask(Double(n))))
    except DeadlineExceeded:
        got.append(-1)
    return got


@both
def test_past_its_deadline_a_flow_may_return_what_it_has(drive: Driver) -> None:
    world = World()
    assert drive(partial(), world, deadline=time.monotonic() - 1) == [-1]
    assert world.batches == []
    assert drive(partial(), world, deadline=time.monotonic() + 3600) == [0, 2, 4, 6, 8]


@both
def test_past_its_deadline_a_flow_that_does_not_care_fails_and_is_closed(drive: Driver) -> None:
    world = World()

    def flow() -> Flow[None]:
        yield from opener(world.log, "a")

    with pytest.raises(DeadlineExceeded, match="raise `deadline`") as raised:
        drive(flow(), world, deadline=time.monotonic() - 1)
    assert isinstance(raised.value, TimeoutError)
    assert world.log == ["flow ends"]


@both
def test_a_run_inside_a_handler_ends_with_the_run_around_it(drive: Driver) -> None:
    """A model over a model answers one request with a run of its own: the deadline holds there too."""

    class Slow(World):
        def answer(self, batch: Sequence[Request[Any]]) -> list[Any]:
            time.sleep(0.01)
            return super().answer(batch)

        async def aanswer(self, batch: Sequence[Request[Any]]) -> list[Any]:
            await asyncio.sleep(0.01)
            return super().answer(batch)

    class Model:
        below = Slow()

        def answer(self, batch: Any) -> list[Any]:
            return [run(attempt(doubled(10_000)), self.below) for _ in batch]

        async def aanswer(self, batch: Any) -> list[Any]:
            return [await arun(attempt(doubled(10_000)), self.below) for _ in batch]

    with pytest.raises(DeadlineExceeded):
        drive(ask(Double(1)), Model(), deadline=time.monotonic() + 0.1)
    assert len(Model.below.batches) < 1000
    assert drive(doubled(3), Slow()) == 8, "the deadline is over with the run that had it"


class Hanging(World):
    """Answers the first batch, and hangs at the second until it is cancelled."""

    async def aanswer(self, batch: Sequence[Request[Any]]) -> list[Any]:
        if not self.batches:
            return self.answer(batch)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.log.append("handler cancelled")
            raise
        raise AssertionError


async def test_a_deadline_interrupts_a_handler_that_hangs() -> None:
    world = Hanging()
    assert await arun(partial(), world, deadline=time.monotonic() + 0.1) == [0, -1]
    assert world.log == ["handler cancelled"]


async def test_a_timeout_of_the_handlers_own_is_not_the_deadline() -> None:
    with pytest.raises(TimeoutError, match="the socket") as raised:
        await arun(doubled(1), World(raises=TimeoutError("the socket")), deadline=time.monotonic() + 3600)
    assert not isinstance(raised.value, DeadlineExceeded)


async def test_cancelling_reaches_the_handler_and_closes_everything() -> None:
    world = Hanging()

    def flow() -> Flow[None]:
        try:
            yield from ask_all([Open("a"), Open("b")])
            yield from ask(Double(1))
        except Exception:
            world.log.append("swallowed")
        finally:
            world.log.append("flow ends")

    task = asyncio.create_task(arun(flow(), world))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.log == ["handler cancelled", "flow ends", "close b", "close a"]


# --- one meaning, two drivers ----------------------------------------------------------------------------------------

plans = st.recursive(
    st.sampled_from(["ask", "fail", "emit", "open", "raise", "attempt_fail"]).map(lambda name: [name]),
    lambda plan: st.one_of(
        st.lists(plan, max_size=3).map(lambda parts: ["together", *parts]),
        st.lists(plan, max_size=3).map(lambda parts: ["then", *parts]),
    ),
    max_leaves=8,
)


def perform(plan: list[Any]) -> Flow[Any]:
    kind, *parts = plan
    match kind:
        case "ask":
            return (yield from ask(Double(1)))
        case "fail":
            return (yield from ask(Double(13)))
        case "attempt_fail":
            failed = yield from attempt(ask(Double(13)))
            return repr(failed)
        case "emit":
            yield [Emit("event")]
            return "emitted"
        case "open":
            thing = yield from ask(Open("thing"))
            return thing.name
        case "raise":
            raise KeyError("planned")
        case "together":
            return (yield from together([perform(part) for part in parts]))
        case _:
            results: list[Any] = []
            for part in parts:
                results.append((yield from perform(part)))
            return results


@settings(max_examples=60, deadline=None)
@given(plans)
def test_both_drivers_give_equal_results_events_batches_and_closings(plan: list[Any]) -> None:
    def sync_course(world: World) -> tuple[list[Any], str]:
        course, events = iterate(perform(plan), world), list[Any]()
        try:
            while True:
                events.append(next(course))
        except StopIteration as stop:
            return events, repr(stop.value)
        except Exception as error:
            return events, repr(error)

    async def async_course(world: World) -> list[Any]:
        events: list[Any] = []
        with contextlib.suppress(Exception):
            async for event in aiterate(perform(plan), world):
                events.append(event)
        return events

    def outcome(drive: Driver, world: World) -> str:
        try:
            return repr(drive(perform(plan), world))
        except Exception as error:
            return repr(error)

    worlds = [World(frozenset({13})) for _ in range(4)]
    events, result = sync_course(worlds[0])
    assert result == outcome(run, worlds[1]) == outcome(async_run, worlds[2])
    assert asyncio.run(async_course(worlds[3])) == events
    assert all((w.batches, w.log) == (worlds[0].batches, worlds[0].log) for w in worlds)
