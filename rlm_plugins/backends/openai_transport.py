"""The official SDK as a handler: one HTTP request, or one stream of events, per thing that is asked.

Above this file nothing knows of threads, event loops, connections or keys; below it stands the `openai` package.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ..errors import MissingExtra, ModelError
from ..flows import Batch, Failed, Flow, arun, run
from ..requests import Request
from ..requests import Stream as TextStream
from .openai_errors import Secret, as_error
from .openai_wire import Json

if TYPE_CHECKING:
    import openai

    from .openai_requests import EndpointFacts

_MOST_PROMPTS = 32
"""Prompts in one merged request, at most."""
COMPLETIONS = "/completions"


@dataclass(frozen=True, slots=True)
class Answered:
    """A parsed answer. `requests` is 0 where it came with the request that another one paid for."""

    data: Json
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Call(Request[Answered]):
    """POST `body` to a path under the base URL; GET where there is no body."""

    path: str
    body: Json | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class OpenEvents(Request[TextStream]):
    path: str
    body: Json = field(hash=False)


@dataclass(frozen=True, slots=True)
class ReadEvent(Request["Json | None"]):
    """The next event of a stream; None at its end."""

    stream: TextStream


@dataclass(frozen=True, slots=True)
class Discover(Request["EndpointFacts"]):
    """What the endpoint is. Found out once, however many ask at the same time."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    base_url: str | None
    api_key: Secret
    timeout: float
    max_retries: int
    max_concurrency: int
    headers: Mapping[str, str]


class Transport:
    """A handler of `Call`, `OpenEvents`, `ReadEvent` and `Discover`.

    At most `max_concurrency` calls are under way in threads, and as many on each event loop; an opened stream does not
    count. `merge` lets calls that differ in their prompt alone go out as one request.
    """

    def __init__(self, options: ClientOptions, discovery: Callable[[], Flow[EndpointFacts]], address: str) -> None:
        try:
            import openai
        except ImportError:
            raise MissingExtra("OpenAICompatibleLM", "openai", "openai") from None
        self._sdk = openai
        self._options = options
        self._discovery = discovery
        self._address = address
        self.facts: EndpointFacts | None = None
        self._threads = _Threads(options.max_concurrency)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()
        self._client: openai.OpenAI | None = None

    # --- in threads ---

    def answer(self, batch: Batch) -> list[Any]:
        replies: list[Any] = [None] * len(batch)
        work: list[Callable[[], Any]] = []
        for indices, request in self._plan(batch):
            if isinstance(request, Discover):  # asks for more: not from a thread that others may need
                _place(replies, indices, self._answer_one(request, len(indices)))
            else:
                work.append(lambda at=indices, one=request: _place(replies, at, self._answer_one(one, len(at))))
        self._threads.run(work)
        self._ask_apart(batch, replies)
        return replies

    def _answer_one(self, request: Request[Any], count: int) -> list[Any]:
        try:
            match request:
                case Call():
                    with self._threads.slots:
                        data = self._post(request)
                    return divided(data, count)
                case OpenEvents():
                    stream = self._open_client().post(
                        request.path,
                        cast_to=object,
                        body=dict(request.body),
                        stream=True,
                        stream_cls=self._sdk.Stream[object],
                    )
                    return [_Events(stream, self._error)]
                case ReadEvent(stream):
                    return [cast(_Events, stream).read()] * count
                case Discover():
                    with self._threads.discovering:
                        if self.facts is None:
                            self.facts = run(self._discovery(), self)
                    return [self.facts] * count
                case _:
                    raise TypeError(f"an endpoint does not answer {type(request).__name__}")
        except Exception as error:
            return [Failed(self._error(error))] * count

    def _post(self, call: Call) -> Any:
        client = self._open_client()
        if call.body is None:
            return client.get(call.path, cast_to=object)
        return client.post(call.path, cast_to=object, body=dict(call.body))

    def _open_client(self) -> openai.OpenAI:
        with self._threads.opening:
            if self._client is None:
                self._client = self._sdk.OpenAI(
                    **self._client_arguments(), http_client=self._sdk.DefaultHttpxClient(**self._plain_http())
                )
                weakref.finalize(self, self._client.close)
            return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._threads.close()

    # --- on an event loop ---

    async def aanswer(self, batch: Batch) -> list[Any]:
        replies: list[Any] = [None] * len(batch)

        async def place(indices: list[int], request: Request[Any]) -> None:
            _place(replies, indices, await self._aanswer_one(request, len(indices)))

        plan = list(self._plan(batch))
        if len(plan) == 1:
            await place(*plan[0])
        else:
            async with asyncio.TaskGroup() as group:
                for indices, request in plan:
                    group.create_task(place(indices, request))
        failed = [index for index, reply in enumerate(replies) if _refused_merged(reply)]
        if failed:
            async with asyncio.TaskGroup() as group:
                for index in failed:
                    group.create_task(place([index], batch[index]))
        return replies

    async def _aanswer_one(self, request: Request[Any], count: int) -> list[Any]:
        loop = await self._loop()
        try:
            match request:
                case Call():
                    async with loop.slots:
                        if request.body is None:
                            data = await loop.client.get(request.path, cast_to=object)
                        else:
                            data = await loop.client.post(request.path, cast_to=object, body=dict(request.body))
                    return divided(data, count)
                case OpenEvents():
                    async with loop.slots:
                        stream = await loop.client.post(
                            request.path,
                            cast_to=object,
                            body=dict(request.body),
                            stream=True,
                            stream_cls=self._sdk.AsyncStream[object],
                        )
                    return [_AsyncEvents(stream, self._error)]
                case ReadEvent(stream):
                    return [await cast(_AsyncEvents, stream).aread()] * count
                case Discover():
                    async with loop.entering:  # many that begin together take turns, so that the loop goes on
                        await asyncio.sleep(0)
                    async with loop.discovering:
                        if self.facts is None:
                            self.facts = await arun(self._discovery(), self)
                    return [self.facts] * count
                case _:
                    raise TypeError(f"an endpoint does not answer {type(request).__name__}")
        except Exception as error:
            return [Failed(self._error(error))] * count

    async def _loop(self) -> _Loop:
        """This event loop's client: a client's connections belong to one loop, and are closed with it."""
        running = asyncio.get_running_loop()
        state = self._loops.get(running)
        if state is None:
            http = self._sdk.DefaultAsyncHttpxClient(**self._plain_http())
            client = self._sdk.AsyncOpenAI(**self._client_arguments(), http_client=http)
            state = self._loops[running] = _Loop(client, self._options.max_concurrency)
            await anext(state.keeper)
        return state

    async def aclose(self) -> None:
        state = self._loops.pop(asyncio.get_running_loop(), None)
        if state is not None:
            await state.keeper.aclose()
        self.close()

    # --- both ---

    def _client_arguments(self) -> dict[str, Any]:
        return {
            "api_key": self._options.api_key.reveal(),
            "base_url": self._options.base_url,
            "timeout": self._options.timeout,
            "max_retries": self._options.max_retries,
            "default_headers": dict(self._options.headers) or None,
        }

    def _plain_http(self) -> dict[str, Any]:
        """For plain http no certificates are loaded, which takes longer than a call; a redirect to https then fails."""
        arguments: dict[str, Any] = {"timeout": self._options.timeout}
        if self._address.startswith("http://"):
            arguments["verify"] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return arguments

    def _error(self, error: Exception) -> Exception:
        return as_error(error, self._address, self._options.api_key, self._options.timeout)

    def _plan(self, batch: Batch) -> Generator[tuple[list[int], Request[Any]]]:
        """Requests with the indices of those they answer: equal ones once, prompts of equal calls together."""
        merge = self.facts is not None and self.facts.capabilities.batched_prompts
        groups: dict[str, list[int]] = {}
        discover: list[int] = []
        for index, request in enumerate(batch):
            if isinstance(request, Discover):
                discover.append(index)
            elif merge and isinstance(request, Call) and request.path == COMPLETIONS and request.body is not None:
                key = _all_but_prompt(request.body)
                if len(groups.setdefault(key, [])) == _MOST_PROMPTS:
                    yield groups[key], merged(batch, groups.pop(key))
                groups.setdefault(key, []).append(index)
            else:
                yield [index], request
        if discover:
            yield discover, Discover()
        for indices in groups.values():
            yield indices, merged(batch, indices)

    def _ask_apart(self, batch: Batch, replies: list[Any]) -> None:
        """One unacceptable prompt has a merged request refused: ask for each alone."""
        failed = [index for index, reply in enumerate(replies) if _refused_merged(reply)]
        self._threads.run([lambda at=index: _place(replies, [at], self._answer_one(batch[at], 1)) for index in failed])


class _MergedRefused(ModelError):
    """A request for several prompts was refused as a whole."""


def _refused_merged(reply: Any) -> bool:
    return isinstance(reply, Failed) and isinstance(reply.error, _MergedRefused)


def _place(replies: list[Any], indices: list[int], answers: Sequence[Any]) -> None:
    apart = len(indices) > 1
    for index, answer in zip(indices, answers, strict=True):
        refused = isinstance(answer, Failed) and isinstance(answer.error, ModelError) and not answer.error.retryable
        replies[index] = Failed(_MergedRefused("refused together")) if apart and refused else answer


def _all_but_prompt(body: Json) -> str:
    prompt = body.get("prompt")
    rest = {name: value for name, value in body.items() if name != "prompt"}
    return type(prompt).__name__ + json.dumps(rest, sort_keys=True, default=str)


def merged(batch: Batch, indices: Sequence[int]) -> Call:
    """One call for the prompts of several."""
    calls = [cast(Call, batch[index]) for index in indices]
    if len(calls) == 1:
        return calls[0]
    body = dict(calls[0].body or {})
    body["prompt"] = [(call.body or {})["prompt"] for call in calls]
    return Call(calls[0].path, body)


def divided(data: Any, count: int) -> list[Any]:
    """The answer to each prompt of a merged call; usage is divided so that its sum stays what was paid.

    Raises `ModelError` where the answer is no JSON object, or has another number of choices than there were prompts.
    """
    if not isinstance(data, Mapping):
        raise ModelError(f"the answer is not a JSON object but {str(data)[:80]!r}: is this an OpenAI-compatible API?")
    answer = cast(Json, data)
    if count == 1:
        return [Answered(answer)]
    choices = sorted(cast(list[Json], answer.get("choices") or []), key=lambda choice: int(choice.get("index") or 0))
    if len(choices) != count:
        raise _MergedRefused(f"{count} prompts were sent and {len(choices)} answers came")
    usage = cast(Json, answer.get("usage") or {})
    parts: list[Any] = []
    for index, choice in enumerate(choices):
        share = {
            name: value // count + (index < value % count)
            for name, value in usage.items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        parts.append(Answered({**answer, "choices": [{**choice, "index": 0}], "usage": share or None}, int(index == 0)))
    return parts


class _Threads:
    """What calls in threads share."""

    def __init__(self, most: int) -> None:
        self.discovering = threading.Lock()
        self.opening = threading.Lock()
        self.slots = threading.BoundedSemaphore(most)
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Sequence[Callable[[], Any]]) -> None:
        """All of it, at most `most` at a time. A single piece runs in the caller's thread."""
        if len(work) <= 1:
            for piece in work:
                piece()
            return
        with self.opening:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="rlm-endpoint")
                weakref.finalize(self, self._pool.shutdown, wait=False)
            pool = self._pool
        for future in [pool.submit(piece) for piece in work]:
            future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class _Loop:
    """What calls on one event loop share."""

    def __init__(self, client: openai.AsyncOpenAI, most: int) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(most)
        self.entering = asyncio.Semaphore(most)
        self.discovering = asyncio.Lock()
        self.keeper = _closed_with_loop(client)


async def _closed_with_loop(client: openai.AsyncOpenAI) -> AsyncGenerator[None]:
    """A loop closes its open generators when it ends, and so this closes the client."""
    try:
        yield
    finally:
        await client.close()


class _Events:
    """Server-sent events read in a thread."""

    def __init__(self, stream: openai.Stream[object], error: Callable[[Exception], Exception]) -> None:
        self._stream = stream
        self._events = iter(stream)
        self._error = error

    def read(self) -> Any:
        try:
            return next(self._events, None)
        except Exception as error:
            return Failed(self._error(error))

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        self.close()


class _AsyncEvents:
    """Server-sent events read on an event loop."""

    def __init__(self, stream: openai.AsyncStream[object], error: Callable[[Exception], Exception]) -> None:
        self._stream = stream
        self._events = aiter(stream)
        self._error = error

    async def aread(self) -> Any:
        try:
            return await anext(self._events, None)
        except Exception as error:
            return Failed(self._error(error))

    def close(self) -> None:
        """Only an event loop can close what one has opened; the driver calls `aclose` there."""

    async def aclose(self) -> None:
        await self._stream.close()
