"""Retries, limits and budgets, each alone, sync and async alike."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest

from rlm_plugins.errors import ModelError, UsageError
from rlm_plugins.flows import Failed
from rlm_plugins.requests import Generate, Sampling, Score
from rlm_plugins.serving import Budget, BudgetedModel, BudgetExceeded, LimitedModel, Price, RetryingModel
from rlm_plugins.testing import RandomModel
from rlm_plugins.texts import Generation, Usage

SHORT = Sampling(max_tokens=4)
BATCH = [Generate(f"Question {n}", sampling=SHORT) for n in range(6)]


class Flaky(RandomModel):
    """Fails the first `times` askings of each prompt, and notes who is in it at once."""

    def __init__(self, error: Exception, times: int = 1, *, seconds: float = 0.0) -> None:
        super().__init__()
        self.error, self.times, self.seconds = error, times, seconds
        self.asked: dict[Any, int] = {}
        self.inside = self.most_inside = 0
        self._lock = threading.Lock()

    def _enter(self, count: int) -> None:
        with self._lock:
            self.inside += count
            self.most_inside = max(self.most_inside, self.inside)

    def answer(self, batch: Any) -> list[Any]:
        self._enter(len(batch))
        time.sleep(self.seconds)
        self._enter(-len(batch))
        return [self._one(request) for request in batch]

    async def aanswer(self, batch: Any) -> list[Any]:
        self._enter(len(batch))
        await asyncio.sleep(self.seconds)
        self._enter(-len(batch))
        return [self._one(request) for request in batch]

    def _one(self, request: Any) -> Any:
        self.asked[request.prompt] = self.asked.get(request.prompt, 0) + 1
        if self.asked[request.prompt] <= self.times:
            return Failed(self.error)
        return super().answer([request])[0]


def answered(lm: Any, batch: Any, how: str) -> list[Any]:
    return list(lm.answer(batch) if how == "run" else asyncio.run(lm.aanswer(batch)))


both = pytest.mark.parametrize("how", ["run", "arun"])


@both
def test_what_may_pass_is_asked_again_and_nothing_else(how: str) -> None:
    inner = Flaky(ModelError("busy", retryable=True), times=2)
    inner.asked = {"Question 0": 5}  # answers at once
    lm = RetryingModel(inner, first_wait=0.001)
    found = answered(lm, BATCH, how)
    assert [generation.text for generation in found] == [one.text for one in RandomModel().answer(BATCH)]
    assert inner.asked == {"Question 0": 6, **{f"Question {n}": 3 for n in range(1, 6)}}


@both
@pytest.mark.parametrize("error", [ModelError("no", retryable=False), UsageError("no")], ids=str)
def test_what_will_not_pass_is_asked_once(how: str, error: Exception) -> None:
    inner = Flaky(error, times=9)
    [reply] = answered(RetryingModel(inner, first_wait=0.001), BATCH[:1], how)
    assert reply.error is error
    assert inner.asked == {"Question 0": 1}


@both
def test_attempts_end(how: str) -> None:
    inner = Flaky(ModelError("busy", retryable=True), times=9)
    [reply] = answered(RetryingModel(inner, attempts=3, first_wait=0.001), BATCH[:1], how)
    assert isinstance(reply, Failed)
    assert inner.asked == {"Question 0": 3}


@both
def test_the_endpoint_is_given_the_time_it_asks_for(how: str) -> None:
    inner = Flaky(ModelError("busy", retryable=True, retry_after=0.1))
    begun = time.monotonic()
    answered(RetryingModel(inner, first_wait=0.0), BATCH[:1], how)
    assert time.monotonic() - begun >= 0.1
    long = Flaky(ModelError("busy", retryable=True, retry_after=1000.0))
    [reply] = answered(RetryingModel(long), BATCH[:1], how)
    assert isinstance(reply, Failed)  # nobody waits for a quarter of an hour


def test_waits_grow_and_differ() -> None:
    lm = RetryingModel(RandomModel(), first_wait=1.0, longest_wait=5.0, rng=random.Random(0))
    waits = [[lm._wait(attempt, ModelError("busy")) for _ in range(20)] for attempt in range(4)]
    for attempt, drawn in enumerate(waits):
        longest = min(5.0, 2.0**attempt)
        assert all(longest / 2 <= wait <= longest for wait in drawn)
        assert len(set(drawn)) == 20


@both
def test_only_so_many_are_under_way(how: str) -> None:
    inner = Flaky(ModelError("x"), times=0, seconds=0.03)
    found = answered(LimitedModel(inner, max_concurrency=2), BATCH, how)
    assert all(isinstance(reply, Generation) for reply in found)
    assert inner.most_inside == 2


@both
def test_only_so_many_begin_a_minute(how: str) -> None:
    inner = Flaky(ModelError("x"), times=0)
    lm = LimitedModel(inner, max_concurrency=6, per_minute=60 / 0.04, burst=2)
    begun = time.monotonic()
    answered(lm, BATCH, how)
    assert time.monotonic() - begun >= 0.04 * 4 - 0.001  # two at once, then one each 40 ms


@both
def test_a_budget_of_calls_is_never_overdrawn(how: str) -> None:
    inner = Flaky(ModelError("x"), times=0)
    lm = BudgetedModel(inner, Budget(calls=4))
    found = answered(lm, BATCH, how)
    assert [isinstance(reply, Generation) for reply in found] == [True] * 4 + [False] * 2
    assert isinstance(found[5].error, BudgetExceeded)
    assert sum(inner.asked.values()) == 4
    assert lm.spent == sum((reply.usage for reply in found[:4]), Usage())


@both
def test_budgets_of_tokens_and_money_end_the_spending(how: str) -> None:
    price = Price(prompt=1.0, completion=10.0)
    for budget in (Budget(tokens=30), Budget(money=50e-6)):
        lm = BudgetedModel(RandomModel(), budget, price=price)
        replies = [answered(lm, [request], how)[0] for request in BATCH]
        allowed = sum(isinstance(reply, Generation) for reply in replies)
        assert 1 <= allowed < len(BATCH)
        assert lm.money == pytest.approx(price.of(lm.spent))
        with pytest.raises(BudgetExceeded, match="is spent"):
            lm.score("Who?", "Bora")


def test_money_needs_a_price() -> None:
    with pytest.raises(UsageError, match="price="):
        BudgetedModel(RandomModel(), Budget(money=1.0))


def test_streams_pass_and_are_counted() -> None:
    lm = BudgetedModel(RetryingModel(LimitedModel(RandomModel())), Budget(calls=1))
    chunks = list(lm.stream("Who?", sampling=SHORT))
    assert "".join(chunk.text for chunk in chunks) == RandomModel().generate("Who?", sampling=SHORT).text
    assert lm.spent.calls == 1
    with pytest.raises(BudgetExceeded):
        list(lm.stream("Who?", sampling=SHORT))


def test_all_together_answer_as_the_model_alone() -> None:
    lm = BudgetedModel(RetryingModel(LimitedModel(RandomModel(), max_concurrency=3)), Budget(calls=100))
    assert lm.capabilities == RandomModel().capabilities
    assert [one.tokens for one in lm.answer([*BATCH, Score("a", "b")])] == [
        one.tokens for one in RandomModel().answer([*BATCH, Score("a", "b")])
    ]
    assert "RetryingModel" in repr(lm)
