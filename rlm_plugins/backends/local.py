"""A model in this process: everything a `LanguageModel` does, from two primitives, rows and scores.

A backend computes; it knows nothing of prompts, sampling or stop strings. `TransformersLM` and the numpy reader differ
only in theirs.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from ..capabilities import Capabilities
from ..decoding import OneRow, announce, decode_rows, scoring_rows
from ..flows import Batch, Failed, Flow, ask
from ..models import FlowModel
from ..prompts import QUESTION_ANSWER, PromptTemplate
from ..requests import Advance, Generate, OpenRows, Probe, Request, Rows, Score, ScoreRows
from ..texts import Generation, Scoring, TokenLogprob, Usage
from ..tokens import TokenIds, Tokenizer, answer_lead, fit_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RowRunner(Protocol):
    """What a backend computes. Called by one thread at a time."""

    def open_rows(self, prompts: tuple[TokenIds, ...]) -> Rows:
        """Compute the prompts (or find their beginnings already computed)."""
        ...

    def advance(self, rows: Any, token_id: int) -> NDArray[np.float32]:
        """Append a token to every row; the next log-probabilities, [k, V]."""
        ...

    def score_rows(
        self, prompts: tuple[TokenIds, ...], continuations: tuple[TokenIds, ...]
    ) -> list[NDArray[np.float32]]:
        """log p of every continuation token, one array per row."""
        ...


class _ComputeLane:
    """Runs a backend's work one piece at a time: under a lock for threads, in one thread of its own for event loops,
    so that the loop is never blocked and a cancelled run stops at its next token."""

    def __init__(self, runner: RowRunner) -> None:
        self._runner = runner
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def answer(self, batch: Batch) -> list[Any]:
        return [self._compute(request) for request in batch]

    async def aanswer(self, batch: Batch) -> list[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlm-compute")
        return await asyncio.wrap_future(self._thread.submit(self.answer, batch))

    def _compute(self, request: Request[Any]) -> Any:
        try:
            with self._lock:
                match request:
                    case OpenRows():
                        return self._runner.open_rows(request.prompts)
                    case Advance():
                        return self._runner.advance(request.rows, request.token_id)
                    case ScoreRows():
                        return self._runner.score_rows(request.prompts, request.continuations)
                    case _:
                        raise TypeError(f"a local model does not answer {type(request).__name__}")
        except Exception as error:
            return Failed(error)


class LocalModel(FlowModel):
    """A language model over a `RowRunner`."""

    def __init__(
        self,
        runner: RowRunner,
        *,
        name: str,
        tokenizer: Tokenizer,
        context_window: int | None,
        repeatability: float,
        template: PromptTemplate = QUESTION_ANSWER,
    ) -> None:
        self.name = name
        self.tokenizer = self._tokenizer = tokenizer
        self.context_window = context_window
        self.template = template
        self.below = _ComputeLane(runner)
        self._capabilities = Capabilities(
            output_logprobs=True,
            top_logprobs=1 << 30,
            prompt_logprobs=True,
            continuation="token_ids",
            batched_prompts=True,
            token_ids=True,
            full_distribution=True,
            repeatability=repeatability,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def interpret(self, request: Request[Any]) -> Flow[Any] | None:
        match request:
            case Generate():
                return self._generate(request)
            case Score():
                return self._score(request)
            case Probe():
                return _known(self._capabilities)
            case _:
                return None

    def _generate(self, request: Generate) -> Flow[Generation]:
        ids, _ = fit_prompt(
            self._tokenizer,
            self.template,
            request.prompt,
            request.documents or (),
            context_window=self.context_window,
            reserve=request.sampling.max_tokens,
            answer_so_far=request.answer_so_far,
        )
        decoded = yield from decode_rows(
            [ids],
            OneRow(),
            self._tokenizer,
            request.sampling,
            top_logprobs=request.top_logprobs,
            lead="" if request.answer_so_far else answer_lead(self._tokenizer, self.template, request.prompt, ids),
        )
        generation = Generation(decoded.text, decoded.tokens, decoded.finish_reason, decoded.usage)
        yield from announce(generation)
        return generation

    def _score(self, request: Score) -> Flow[Scoring]:
        rows = scoring_rows(
            self._tokenizer,
            self.template,
            request,
            [request.documents or ()],
            context_window=self.context_window,
        )
        [logprobs] = yield from ask(ScoreRows(*rows))
        [ids], [target] = rows
        tokens = tuple(
            TokenLogprob(self._tokenizer.decode([token]), float(logprob), token)
            for token, logprob in zip(target, logprobs, strict=True)
        )
        return Scoring(tokens, Usage(calls=1, prompt_tokens=len(ids) + len(target)))


def _known(capabilities: Capabilities) -> Flow[Capabilities]:
    return capabilities
    yield  # a flow that asks nothing is still a generator
