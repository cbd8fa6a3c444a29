"""REPLUG as a response synthesizer: one prompt per retrieved node, the next-token distributions mixed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing, contextmanager
from inspect import signature
from typing import Any, Unpack, cast

from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.instrumentation import get_dispatcher  # pyright: ignore[reportPrivateImportUsage]
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle

from rlm_plugins.errors import UsageError
from rlm_plugins.models import LanguageModel

from .llm import Document, EnsembleFields, ReplugLLM, refuse_unknown, settings_llm

dispatcher = get_dispatcher(__name__)

_OWN = ("llm", "streaming", "empty_response", "chat", "callback_manager")
_CALL = ("temperature", "top_p", "max_tokens", "stop", "seed")

Answer = Response | StreamingResponse | AsyncStreamingResponse
Finish = Callable[[Answer], None]


class ReplugSynthesizer(BaseSynthesizer):
    """Answers from retrieved nodes by a REPLUG ensemble: in query engines, routers, condense-question chat and tools.

    - `llm`: what `FrozenLM.from_llm` takes; None: `Settings.llm`, where it is set.
    - `chat`: whether the question reaches the model as a user message, through its chat template; None: what the LLM's
      metadata says, False for a language model of rlm_plugins.
    - `streaming`, `empty_response`: as in every synthesizer of LlamaIndex. No nodes give the empty response, unless
      `null_document` lets the model answer without any.
    - `k`: use only the first k nodes; None: all that were retrieved.
    - all other fields: as in `ReplugLLM`. A call of `synthesize` may override the sampling fields.

    The trace is in `response.metadata["replug"]`, with streaming once the stream has ended; nodes are neither changed
    nor reordered in `source_nodes`. The caller's LLM gets no callback manager: one LLM event is sent per answer.
    Raises `UsageError` for an unknown or unusable argument.
    """

    def __init__(
        self,
        *,
        llm: LLM | LanguageModel | None = None,
        streaming: bool = False,
        empty_response: str | None = None,
        chat: bool | None = None,
        callback_manager: CallbackManager | None = None,
        **fields: Unpack[EnsembleFields],
    ) -> None:
        refuse_unknown("ReplugSynthesizer", fields, {*EnsembleFields.__annotations__, *_OWN})
        model = settings_llm() if llm is None else llm
        if model is None:
            raise UsageError("there is no model: pass llm=, or set Settings.llm first")
        self._first = fields.get("k")
        self._chat = isinstance(model, LLM) and model.metadata.is_chat_model if chat is None else chat
        manager = callback_manager or Settings.callback_manager
        self._ensemble = ReplugLLM(llm=model, callback_manager=manager, **fields)
        # A prompt is written for each node, by the core: nothing is packed, so that no tokenizer has to be loaded.
        helpers = {"prompt_helper", "chat_prompt_helper"} & signature(BaseSynthesizer.__init__).parameters.keys()
        idle: dict[str, Any] = dict.fromkeys(helpers, PromptHelper(tokenizer=str.split))
        super().__init__(
            llm=self._ensemble,
            callback_manager=manager,
            streaming=streaming,
            **idle,
        )
        self._empty_response = empty_response or "Empty Response"  # newer releases alone take it as an argument

    def synthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> Response | StreamingResponse:
        refuse_unknown("synthesize", response_kwargs, _CALL)
        sources = [*nodes, *(additional_source_nodes or ())]
        with self._events(query) as finish:
            if self._nothing(nodes):
                empty = self._empty_response
                response = StreamingResponse(_said(empty)) if self._streaming else Response(empty)
            elif self._streaming:
                metadata = _metadata(sources)
                stream = self._ask_stream(_text(query), self._used(nodes), response_kwargs)
                response = StreamingResponse(_deltas(stream, metadata), sources, metadata)
            else:
                answer = self._ask(_text(query), self._used(nodes), response_kwargs)
                response = Response(_answer(answer), sources, _metadata(sources, answer))
            finish(response)
        return response

    async def asynthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> Response | AsyncStreamingResponse:
        refuse_unknown("asynthesize", response_kwargs, _CALL)
        sources = [*nodes, *(additional_source_nodes or ())]
        with self._events(query) as finish:
            if self._nothing(nodes):
                empty = self._empty_response
                response = AsyncStreamingResponse(_asaid(empty)) if self._streaming else Response(empty)
            elif self._streaming:
                metadata = _metadata(sources)
                stream = await self._aask_stream(_text(query), self._used(nodes), response_kwargs)
                response = AsyncStreamingResponse(_adeltas(stream, metadata), sources, metadata)
            else:
                answer = await self._aask(_text(query), self._used(nodes), response_kwargs)
                response = Response(_answer(answer), sources, _metadata(sources, answer))
            finish(response)
        return response

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> str | Generator[str, None, None]:
        """The answer alone, from texts: for callers that hold no nodes."""
        refuse_unknown("get_response", response_kwargs, _CALL)
        if self._streaming:
            return _deltas(self._ask_stream(query_str, text_chunks, response_kwargs), {})
        return _answer(self._ask(query_str, text_chunks, response_kwargs))

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> str | AsyncGenerator[str, None]:
        refuse_unknown("aget_response", response_kwargs, _CALL)
        if self._streaming:
            return _adeltas(await self._aask_stream(query_str, text_chunks, response_kwargs), {})
        return _answer(await self._aask(query_str, text_chunks, response_kwargs))

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        if prompts_dict:
            raise UsageError("a ReplugSynthesizer has no prompts of LlamaIndex: say the words in template=")

    # --- the ensemble, as a completion model or as a chat model ---

    def _ask(
        self, query: str, documents: Sequence[Document], call: dict[str, Any]
    ) -> CompletionResponse | ChatResponse:
        if self._chat:
            return self._ensemble.chat([ChatMessage(content=query)], documents=documents, **call)
        return self._ensemble.complete(query, documents=documents, **call)

    async def _aask(
        self, query: str, documents: Sequence[Document], call: dict[str, Any]
    ) -> CompletionResponse | ChatResponse:
        if self._chat:
            return await self._ensemble.achat([ChatMessage(content=query)], documents=documents, **call)
        return await self._ensemble.acomplete(query, documents=documents, **call)

    def _ask_stream(
        self, query: str, documents: Sequence[Document], call: dict[str, Any]
    ) -> Generator[CompletionResponse | ChatResponse, None, None]:
        if self._chat:
            return self._ensemble.stream_chat([ChatMessage(content=query)], documents=documents, **call)
        return self._ensemble.stream_complete(query, documents=documents, **call)

    async def _aask_stream(
        self, query: str, documents: Sequence[Document], call: dict[str, Any]
    ) -> AsyncGenerator[CompletionResponse | ChatResponse, None]:
        if self._chat:
            return await self._ensemble.astream_chat([ChatMessage(content=query)], documents=documents, **call)
        return await self._ensemble.astream_complete(query, documents=documents, **call)

    def _nothing(self, nodes: Sequence[NodeWithScore]) -> bool:
        return not nodes and self._ensemble.null_document is None

    def _used(self, nodes: Sequence[NodeWithScore]) -> Sequence[NodeWithScore]:
        return nodes if self._first is None else nodes[: self._first]

    @contextmanager
    def _events(self, query: str | QueryBundle) -> Generator[Finish]:
        """What every synthesizer of LlamaIndex tells of itself."""
        dispatcher.event(SynthesizeStartEvent(query=query))
        finished: list[Answer] = []
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: _text(query)}
        ) as event:
            yield finished.append
            event.on_end(payload={EventPayload.RESPONSE: finished[0]})
        dispatcher.event(SynthesizeEndEvent(query=query, response=finished[0]))


def _text(query: str | QueryBundle) -> str:
    return query if isinstance(query, str) else query.query_str


def _answer(response: CompletionResponse | ChatResponse) -> str:
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


def _metadata(
    sources: Sequence[NodeWithScore], answer: CompletionResponse | ChatResponse | None = None
) -> dict[str, Any]:
    """Each node's metadata by its id, as LlamaIndex has it, but copied; and the trace."""
    metadata: dict[str, Any] = {source.node.node_id: dict(source.node.metadata) for source in sources}
    if answer is not None:
        _add_trace(metadata, answer)
    return metadata


def _add_trace(metadata: dict[str, Any], answer: CompletionResponse | ChatResponse) -> None:
    raw = cast("dict[str, Any] | None", answer.raw)
    if raw and "replug" in raw:
        metadata["replug"] = raw["replug"]


def _deltas(
    stream: Generator[CompletionResponse | ChatResponse, None, None], metadata: dict[str, Any]
) -> Generator[str, None, None]:
    with closing(stream):
        for piece in stream:
            _add_trace(metadata, piece)
            if piece.delta:
                yield piece.delta


async def _adeltas(
    stream: AsyncGenerator[CompletionResponse | ChatResponse, None], metadata: dict[str, Any]
) -> AsyncGenerator[str, None]:
    async with aclosing(stream):
        async for piece in stream:
            _add_trace(metadata, piece)
            if piece.delta:
                yield piece.delta


def _said(text: str) -> Generator[str, None, None]:
    yield text


async def _asaid(text: str) -> AsyncGenerator[str, None]:
    yield text
