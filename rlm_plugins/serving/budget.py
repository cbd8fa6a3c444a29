"""A budget: calls, tokens and money that a run may cost, refused before it is spent where that is known."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RLMError, UsageError
from ..flows import Batch, Failed
from ..models import LanguageModel
from ..requests import Generate, GenerateIds, OpenStream, ReadStream, Request, Score, ScoreRows
from ..texts import Chunk, Generation, Scoring, Usage
from .front import Front


class BudgetExceeded(RLMError):
    """The budget is spent. `spent` says on what; what was answered before is not lost."""

    def __init__(self, message: str, spent: Usage) -> None:
        super().__init__(message)
        self.spent = spent


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, per million tokens, in any currency."""

    prompt: float = 0.0
    cached_prompt: float | None = None
    """None: as `prompt`."""
    completion: float = 0.0

    def of(self, usage: Usage) -> float:
        """
        >>> round(Price(prompt=2.0, completion=8.0).of(Usage(prompt_tokens=1000, completion_tokens=100)), 6)
        0.0028
        """
        cached = self.prompt if self.cached_prompt is None else self.cached_prompt
        fresh = usage.prompt_tokens - usage.cached_prompt_tokens
        total = fresh * self.prompt + usage.cached_prompt_tokens * cached + usage.completion_tokens * self.completion
        return total / 1e6


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent; None is no limit. `money` needs a `Price`."""

    calls: int | None = None
    tokens: int | None = None
    """Prompt and completion tokens together."""
    money: float | None = None


class BudgetedModel(Front):
    """Refuses with `BudgetExceeded` once the budget is spent, and counts in `spent` what each answer cost.

    A call is counted when it is asked, and never asked beyond the budget. Tokens and money are known when the answer is
    there, so the last batch can go over them. Raises `UsageError` for a limit on money without a price.
    """

    def __init__(self, lm: LanguageModel, budget: Budget, *, price: Price | None = None) -> None:
        if budget.money is not None and price is None:
            raise UsageError("a budget of money needs price=Price(prompt=..., completion=...), per million tokens")
        super().__init__(lm)
        self.budget = budget
        self.price = price or Price()
        self._spent = Usage()
        self._begun = 0
        self._lock = threading.Lock()

    @property
    def spent(self) -> Usage:
        return self._spent

    @property
    def money(self) -> float:
        return self.price.of(self._spent)

    def answer(self, batch: Batch) -> Sequence[Any]:
        admitted, replies = self._admitted(batch)
        asked = self.lm.answer([batch[index] for index in admitted]) if admitted else []
        return self._placed(admitted, asked, replies)

    async def aanswer(self, batch: Batch) -> Sequence[Any]:
        admitted, replies = self._admitted(batch)
        asked = await self.lm.aanswer([batch[index] for index in admitted]) if admitted else []
        return self._placed(admitted, asked, replies)

    def _admitted(self, batch: Batch) -> tuple[list[int], list[Any]]:
        """The requests there is money for, and the refusals of the others."""
        admitted: list[int] = []
        replies: list[Any] = [None] * len(batch)
        with self._lock:
            for index, request in enumerate(batch):
                calls = _calls(request)
                why = self._over(calls) if calls else None
                if why is None:
                    self._begun += calls
                    admitted.append(index)
                else:
                    replies[index] = Failed(BudgetExceeded(why, self._spent))
        return admitted, replies

    def _over(self, calls: int) -> str | None:
        spent, limit = self._spent, self.budget
        if limit.calls is not None and self._begun + calls > limit.calls:
            return f"the budget of {limit.calls} calls is spent ({self._begun} were made): raise Budget(calls=...)"
        tokens = spent.prompt_tokens + spent.completion_tokens
        if limit.tokens is not None and tokens >= limit.tokens:
            return f"the budget of {limit.tokens} tokens is spent ({tokens} were used): raise Budget(tokens=...)"
        if limit.money is not None and self.money >= limit.money:
            return f"the budget of {limit.money:g} is spent ({self.money:.4g} was used): raise Budget(money=...)"
        return None

    def _placed(self, admitted: list[int], answers: Sequence[Any], replies: list[Any]) -> list[Any]:
        with self._lock:
            for index, answer in zip(admitted, answers, strict=True):
                replies[index] = answer
                self._spent = self._spent + _usage(answer)
        return replies


def _calls(request: Request[Any]) -> int:
    """Prompts that a request has processed; 0 for what is free or was counted when it was opened."""
    if isinstance(request, ScoreRows):
        return len(request.prompts)
    return int(isinstance(request, Generate | GenerateIds | Score | OpenStream) and not isinstance(request, ReadStream))


def _usage(answer: Any) -> Usage:
    match answer:
        case Generation() | Scoring():
            return answer.usage
        case Chunk(final=Generation() as final):
            return final.usage
        case Failed(error) if getattr(error, "partial", None) is not None:
            return error.partial.usage  # type: ignore[attr-defined]
        case _:
            return Usage()
