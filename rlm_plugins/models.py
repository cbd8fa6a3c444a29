"""What a language model, a retriever and an embedder are: handlers with a face.

Every method that takes a language model gives one back, so methods stack: `Replug(lm)` is a `LanguageModel` too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .capabilities import Capabilities
from .errors import UsageError
from .flows import Batch, Failed, Flow, Handler, aiterate, arun, ask, attempt, iterate, run, together
from .prompts import QUESTION_ANSWER, Prompt, PromptTemplate
from .requests import (
    Embed,
    Emit,
    Generate,
    OpenStream,
    Probe,
    ReadStream,
    Request,
    Retrieve,
    Sampling,
    Score,
    Stream,
)
from .texts import Chunk, Generation, Message, Passage, Scoring
from .tokens import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LanguageModel(ABC):
    """A handler of `Generate`, `Score`, `OpenStream`, `ReadStream` and `Probe`, with a method for each.

    `prompt` is a question (rendered by `template`), or a conversation. `documents` are put into the prompt by whoever
    stands lowest: a plain model concatenates them, an ensemble gives each a prompt of its own.
    """

    name: str
    template: PromptTemplate = QUESTION_ANSWER
    tokenizer: Tokenizer | None = None
    context_window: int | None = None
    sampling: Sampling = Sampling()
    """How this model samples where the call does not say."""

    @abstractmethod
    def answer(self, batch: Batch) -> Sequence[Any]: ...

    @abstractmethod
    async def aanswer(self, batch: Batch) -> Sequence[Any]: ...

    @property
    def capabilities(self) -> Capabilities:
        """Probes on first use where the model is an endpoint; use `aprobe` inside an event loop."""
        return run(ask(Probe()), self)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        documents: Sequence[Passage] | None = None,
        answer_so_far: str = "",
        sampling: Sampling | None = None,
        top_logprobs: int = 0,
        deadline: float | None = None,
    ) -> Generation:
        request = _generate(prompt, documents, answer_so_far, sampling or self.sampling, top_logprobs)
        return run(ask(request), self, deadline=deadline)

    async def agenerate(
        self,
        prompt: str | Sequence[Message],
        *,
        documents: Sequence[Passage] | None = None,
        answer_so_far: str = "",
        sampling: Sampling | None = None,
        top_logprobs: int = 0,
        deadline: float | None = None,
    ) -> Generation:
        request = _generate(prompt, documents, answer_so_far, sampling or self.sampling, top_logprobs)
        return await arun(ask(request), self, deadline=deadline)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        documents: Sequence[Passage] | None = None,
        answer_so_far: str = "",
        sampling: Sampling | None = None,
        top_logprobs: int = 0,
        deadline: float | None = None,
    ) -> Iterator[Chunk]:
        """Text as it is written; the last chunk carries the whole `Generation`. Close the iterator to stop early."""
        request = _generate(prompt, documents, answer_so_far, sampling or self.sampling, top_logprobs)
        return iterate(_read(request), self, deadline=deadline)

    def astream(
        self,
        prompt: str | Sequence[Message],
        *,
        documents: Sequence[Passage] | None = None,
        answer_so_far: str = "",
        sampling: Sampling | None = None,
        top_logprobs: int = 0,
        deadline: float | None = None,
    ) -> AsyncIterator[Chunk]:
        request = _generate(prompt, documents, answer_so_far, sampling or self.sampling, top_logprobs)
        return aiterate(_read(request), self, deadline=deadline)

    def score(
        self,
        prompt: str | Sequence[Message],
        continuation: str,
        *,
        documents: Sequence[Passage] | None = None,
        include_end: bool = False,
    ) -> Scoring:
        """log p(continuation | prompt, documents), token by token."""
        return run(ask(_score(prompt, continuation, documents, include_end)), self)

    async def ascore(
        self,
        prompt: str | Sequence[Message],
        continuation: str,
        *,
        documents: Sequence[Passage] | None = None,
        include_end: bool = False,
    ) -> Scoring:
        return await arun(ask(_score(prompt, continuation, documents, include_end)), self)


def probe(lm: LanguageModel) -> Capabilities:
    """What the model can do. For an endpoint: a few one-token calls, remembered."""
    return run(ask(Probe()), lm)


async def aprobe(lm: LanguageModel) -> Capabilities:
    return await arun(ask(Probe()), lm)


def as_prompt(prompt: str | Sequence[Message]) -> Prompt:
    """A question or a conversation, checked and frozen. Raises `UsageError` for an empty one."""
    if not prompt:
        raise UsageError("the prompt is empty: pass a question or a list of messages")
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _generate(
    prompt: str | Sequence[Message],
    documents: Sequence[Passage] | None,
    answer_so_far: str,
    sampling: Sampling,
    top_logprobs: int,
) -> Generate:
    sent = None if documents is None else tuple(documents)
    return Generate(as_prompt(prompt), sent, answer_so_far, sampling, top_logprobs)


def _score(
    prompt: str | Sequence[Message], continuation: str, documents: Sequence[Passage] | None, include_end: bool
) -> Score:
    return Score(as_prompt(prompt), continuation, None if documents is None else tuple(documents), include_end)


def _read(request: Generate) -> Flow[None]:
    """Read a stream to its end, emitting each chunk."""
    stream = yield from ask(OpenStream(request))
    while (chunk := (yield from ask(ReadStream(stream)))) is not None:
        yield [Emit(chunk)]


class FlowModel(LanguageModel):
    """A language model whose answers are flows over the handler `below`.

    Requests of one batch advance together, so what they ask in the same step reaches `below` as one batch. A request
    `interpret` knows nothing of (None) is handed to `below` as it is, and what that opens belongs to whoever asked.
    """

    below: Handler

    @abstractmethod
    def interpret(self, request: Request[Any]) -> Flow[Any] | None: ...

    def interpret_stream(self, request: Generate) -> Flow[Generation] | None:
        """The flow whose emitted chunks are the stream: where writing piece by piece is asked for differently."""
        return self.interpret(request)

    def answer(self, batch: Batch) -> list[Any]:
        plan = _Plan(self, batch)
        for index, stream in plan.read.items():
            plan.replies[index] = stream.read()
        if plan.flows:
            plan.place(plan.flows, run(together(plan.flows.values()), self.below))
        if plan.passed:
            plan.place(plan.passed, self.below.answer([batch[index] for index in plan.passed]))
        return plan.replies

    async def aanswer(self, batch: Batch) -> list[Any]:
        plan = _Plan(self, batch)
        for index, stream in plan.read.items():
            plan.replies[index] = await stream.aread()
        if plan.flows:
            plan.place(plan.flows, await arun(together(plan.flows.values()), self.below))
        if plan.passed:
            plan.place(plan.passed, await self.below.aanswer([batch[index] for index in plan.passed]))
        return plan.replies


class _Plan:
    """What becomes of each request of a batch: a flow, a stream that is opened (which costs nothing) or read, or
    something for the handler below."""

    def __init__(self, model: FlowModel, batch: Batch) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self.read: dict[int, FlowStream] = {}
        self.flows: dict[int, Flow[Any]] = {}
        self.passed: list[int] = []
        for index, request in enumerate(batch):
            if isinstance(request, ReadStream) and isinstance(request.stream, FlowStream):
                self.read[index] = request.stream
            elif isinstance(request, OpenStream) and (opened := model.interpret_stream(request.generate)) is not None:
                self.replies[index] = FlowStream(opened, model.below)
            elif (flow := model.interpret(request)) is not None:
                self.flows[index] = attempt(flow)
            else:
                self.passed.append(index)

    def place(self, indices: Iterable[int], answers: Sequence[Any]) -> None:
        for index, answer in zip(indices, answers, strict=True):
            self.replies[index] = answer


class FlowStream(Stream):
    """The chunks a flow emits, read one at a time, in a thread or on an event loop."""

    def __init__(self, flow: Flow[Generation], handler: Handler) -> None:
        self._flow = flow
        self._handler = handler
        self._chunks: Generator[Any, None, Any] | None = None
        self._achunks: AsyncGenerator[Any, None] | None = None

    def read(self) -> Chunk | Failed | None:
        self._chunks = self._chunks or iterate(self._flow, self._handler)
        try:
            return next(self._chunks, None)
        except Exception as error:
            return Failed(error)

    async def aread(self) -> Chunk | Failed | None:
        self._achunks = self._achunks or aiterate(self._flow, self._handler)
        try:
            return await anext(self._achunks, None)
        except Exception as error:
            return Failed(error)

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        self._flow.close()

    async def aclose(self) -> None:
        if self._achunks is not None:
            await self._achunks.aclose()
        self.close()


class Retriever(ABC):
    """Finds passages: a handler of `Retrieve`."""

    @abstractmethod
    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> Sequence[Passage]:
        """The best k passages, best first, without those whose id is in `exclude`."""

    @abstractmethod
    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> Sequence[Passage]: ...

    def answer(self, batch: Batch) -> list[Any]:
        return [_tried(lambda r=r: tuple(self.retrieve(r.query, r.k, r.exclude))) for r in _only(Retrieve, batch, self)]

    async def aanswer(self, batch: Batch) -> list[Any]:
        replies: list[Any] = []
        for request in _only(Retrieve, batch, self):
            try:
                replies.append(tuple(await self.aretrieve(request.query, request.k, request.exclude)))
            except Exception as error:
                replies.append(Failed(error))
        return replies


class Embedder(ABC):
    """Turns texts into vectors: a handler of `Embed`. Rows are float32 [n, dim]."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the exact weights: vectors of different fingerprints are never compared."""

    @abstractmethod
    def embed_query(self, text: str) -> NDArray[np.float32]:
        """One query, [dim]."""

    @abstractmethod
    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Documents, [n, dim]."""

    async def aembed_query(self, text: str) -> NDArray[np.float32]:
        return self.embed_query(text)

    async def aembed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.embed_documents(texts)

    def answer(self, batch: Batch) -> list[Any]:
        return [
            _tried(
                lambda r=r: (
                    self.embed_documents(r.texts)
                    if r.kind == "document"
                    else _stacked([self.embed_query(text) for text in r.texts])
                )
            )
            for r in _only(Embed, batch, self)
        ]

    async def aanswer(self, batch: Batch) -> list[Any]:
        replies: list[Any] = []
        for request in _only(Embed, batch, self):
            try:
                if request.kind == "document":
                    replies.append(await self.aembed_documents(request.texts))
                else:
                    replies.append(_stacked([await self.aembed_query(text) for text in request.texts]))
            except Exception as error:
                replies.append(Failed(error))
        return replies


class Router:
    """Sends each request to the part that answers its kind: a model, a retriever, an embedder."""

    def __init__(self, lm: Handler, *, retriever: Retriever | None = None, embedder: Embedder | None = None) -> None:
        self._lm = lm
        self._others: tuple[tuple[type[Request[Any]], Handler | None], ...] = (
            (Retrieve, retriever),
            (Embed, embedder),
        )

    def _split(self, batch: Batch) -> tuple[list[Any], list[tuple[Handler, list[int]]]]:
        replies: list[Any] = [None] * len(batch)
        parts: dict[int, tuple[Handler, list[int]]] = {}
        for index, request in enumerate(batch):
            handler: Handler | None = self._lm
            for kind, other in self._others:
                if isinstance(request, kind):
                    handler = other
            if handler is None:
                replies[index] = Failed(
                    UsageError(f"nothing here answers {type(request).__name__}: pass a retriever, or the documents")
                )
            else:
                parts.setdefault(id(handler), (handler, []))[1].append(index)
        return replies, list(parts.values())

    def answer(self, batch: Batch) -> list[Any]:
        replies, parts = self._split(batch)
        for handler, indices in parts:
            _place(replies, indices, handler.answer([batch[index] for index in indices]))
        return replies

    async def aanswer(self, batch: Batch) -> list[Any]:
        replies, parts = self._split(batch)
        for handler, indices in parts:
            _place(replies, indices, await handler.aanswer([batch[index] for index in indices]))
        return replies


def _place(replies: list[Any], indices: list[int], answers: Sequence[Any]) -> None:
    for index, answer in zip(indices, answers, strict=True):
        replies[index] = answer


def _only(kind: type[Any], batch: Batch, handler: object) -> list[Any]:
    for request in batch:
        if not isinstance(request, kind):
            raise TypeError(f"{type(handler).__name__} answers {kind.__name__}, was asked {type(request).__name__}")
    return list(batch)


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return Failed(error)


def _stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    import numpy as np

    return np.stack(rows)
