"""REPLUG as a LangChain chat model: an answer written from one prompt per document, the distributions mixed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, fields, replace
from typing import Any, Literal
from uuid import uuid4

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.embeddings import Embeddings
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import PromptTemplate as LangChainPrompt
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.ensemble import EnsembleKind, Replug, ReplugSettings, TraceLevel
from rlm_plugins.methods.replug.mixture import Pool
from rlm_plugins.methods.replug.weights import Weighting
from rlm_plugins.models import Embedder, LanguageModel, Retriever
from rlm_plugins.prompts import Prompt, PromptTemplate, question_of
from rlm_plugins.requests import Sampling
from rlm_plugins.retrieval.scores import Scores

from .answers import Question
from .arguments import refused, unknown
from .document_prompts import template_from
from .frozen_lm import FrozenLM
from .messages import conversation
from .sources import Embedders, passages_from, retriever_from, scoring
from .tracing import ParentRun, announced

_SETTINGS = tuple(field.name for field in fields(ReplugSettings))
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")
_CALL = ("documents", *_SAMPLING, "stop", "timeout", "logprobs", "top_logprobs", "stream", *_SETTINGS)
"""What a call can say beside the messages."""


class ChatReplug(BaseChatModel):
    """A chat model over a frozen language model that reads each retrieved document in a prompt of its own.

        p(y_t | x, D') = sum_{d in D'} lambda(d, x) p(y_t | d o x, y_<t)

    The trace of an answer is `message.response_metadata["replug"]`, in a stream on the last chunk. What a call says
    (`invoke(..., documents=[...], temperature=0.7)`, `.bind(...)`) wins over what stands here. Settings are those of
    `rlm_plugins.methods.replug.ensemble.ReplugSettings`.

    Raises `UsageError` at construction for arguments that are unknown or cannot work together, and at a call for
    unknown options and for content that is not text; `RetrievalError` where nothing is found or the search fails;
    `Unsupported` where the model gives too little.
    """

    llm: Any
    """A language model of rlm_plugins, or a LangChain model that `FrozenLM` can take."""
    retriever: BaseRetriever | VectorStore | Retriever | None = None
    embeddings: Embeddings | Embedder | None = None
    """None: the vector store's own."""
    scores: Scores | None = None
    """None: "embeddings" where embeddings are known, else what the documents carry, uniform where they carry none."""
    query: Literal["last_human"] | Callable[[list[BaseMessage]], str] = "last_human"
    """What is looked up: the last human message, or what a function makes of the messages."""
    document_prompt: PromptTemplate | LangChainPrompt | None = None
    """None: the template of the language model."""

    k: int = 10
    ensemble: EnsembleKind = "auto"
    weights: Weighting = "softmax"
    weight_temperature: float | None = None
    posterior: bool = False
    null_document: float | None = None
    pool: Pool = "probability"
    max_document_tokens: int | None = None
    trace: TraceLevel = "summary"

    temperature: float | None = None
    """None, here and below: as the inner model does."""
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    timeout: float | None = None
    """Seconds an answer may take; past it `DeadlineExceeded` is raised. None: no limit."""
    streaming: bool | None = None
    """True: `invoke` streams inside, False: `stream` gives one chunk, None: each does what its name says."""

    max_retries: int | None = None
    """Taken because every chat model is given one, and not used: trying again is the inner model's affair."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Taken because every chat model is given one, and not used: it belongs to the inner model."""
    cache: BaseCache | bool | None = Field(default=False, exclude=True)
    """Off: a cache does not see that a corpus changed. Where it is on, no two instances share answers."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    _model_of: tuple[Any, LanguageModel] | None = PrivateAttr(default=None)
    _embedders: Embedders = PrivateAttr(default_factory=Embedders)
    _parent: ParentRun | None = PrivateAttr(default=None)
    _identity: str = PrivateAttr(default_factory=lambda: uuid4().hex)

    def __init__(self, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            raise refused("ChatReplug", error, _arguments(type(self))) from None
        self._ensemble()

    # --- what is computed ---------------------------------------------------------------------------------------------

    def as_language_model(self) -> Replug:
        """The same ensemble as a language model of the core, for methods that stand on one."""
        if self.query == "last_human":
            return self._ensemble()
        raise UsageError("a function of LangChain messages as query cannot be used below another method: leave it out")

    def _language_model(self) -> LanguageModel:
        last = self._model_of
        if last is None or last[0] is not self.llm:
            self._model_of = last = self.llm, FrozenLM.from_model(self.llm)
        return last[1]

    def _ensemble(
        self,
        messages: Sequence[BaseMessage] = (),
        options: dict[str, Any] | None = None,
        config: RunnableConfig | None = None,
    ) -> Replug:
        """The ensemble of one call: what it starts runs under `config`."""
        given = options or {}
        settings = ReplugSettings(**{name: given.get(name, getattr(self, name)) for name in _SETTINGS})
        scores, embeddings = scoring(
            "ChatReplug",
            self.scores,
            self.embeddings,
            self.retriever,
            weights=settings.weights,
            weight_temperature=settings.weight_temperature,
        )
        lm = self._language_model()
        return Replug(
            lm,
            retriever=None if self.retriever is None else retriever_from(self.retriever, config),
            embedder=None if embeddings is None else self._embedders.of(embeddings),
            scores=scores,
            query=self._query_of(messages),
            sampling=self._sampling(None, {}),
            template=None if self.document_prompt is None else template_from(self.document_prompt, lm.template),
            settings=settings,
        )

    def _query_of(self, messages: Sequence[BaseMessage]) -> Callable[[Prompt], str]:
        if self.query == "last_human":
            return question_of
        make = self.query

        def query(_: Prompt) -> str:
            found = make(list(messages))
            if not isinstance(found, str) or not found:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(f"query must make a text of the messages, got {found!r}")
            return found

        return query

    def _sampling(self, stop: Sequence[str] | None, options: dict[str, Any]) -> Sampling:
        said = {name: options[name] if name in options else getattr(self, name) for name in _SAMPLING}
        values = {name: value for name, value in said.items() if value is not None}
        stop = stop if stop is not None else self.stop
        if stop is not None:
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return replace(self._language_model().sampling, **values)

    def _question(
        self, messages: list[BaseMessage], stop: list[str] | None, run: BaseRunManager | None, options: dict[str, Any]
    ) -> Question:
        _known_options(options)
        parent = self._parent if run is None else ParentRun.of(run)
        timeout = options.get("timeout", self.timeout)
        top = options.get("top_logprobs") or 0
        return Question(
            self._ensemble(messages, options, None if parent is None else parent.child_config()),
            {
                "prompt": conversation(messages),
                "documents": passages_from(options.get("documents")),
                "sampling": self._sampling(stop, options),
                "top_logprobs": top,
                "deadline": None if timeout is None else time.monotonic() + timeout,
            },
            logprobs=top if options.get("logprobs") or top else None,
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question = self._question(messages, stop, run_manager, kwargs)
        return question.result(question.generate())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question = self._question(messages, stop, run_manager, kwargs)
        return question.result(await question.agenerate())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        question = self._question(messages, stop, run_manager, kwargs)
        with closing(question.stream()) as chunks:
            for chunk in chunks:
                yield question.chunk(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        question = self._question(messages, stop, run_manager, kwargs)
        async with aclosing(question.astream()) as chunks:
            async for chunk in chunks:
                yield question.chunk(chunk)

    # --- which run this is: the base class tells `_generate`, but not `_stream` ---------------------------------------

    def _under(self, parent: ParentRun | None) -> ChatReplug:
        if parent is None:
            return self
        copy = self.model_copy()
        copy._parent = parent
        return copy

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        config, parent = announced(config)
        return super(ChatReplug, self._under(parent)).stream(input, config, stop=stop, **kwargs)

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        config, parent = announced(config)
        return super(ChatReplug, self._under(parent)).astream(input, config, stop=stop, **kwargs)

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        this = self._under(run_manager and ParentRun.of(run_manager))
        return super(ChatReplug, this)._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        this = self._under(run_manager and ParentRun.of(run_manager))
        return await super(ChatReplug, this)._agenerate_with_cache(messages, stop, run_manager, **kwargs)

    # --- what LangChain asks of a model -------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "replug"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Plain JSON, without keys, documents or objects."""
        sampling = asdict(self._sampling(None, {}))
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {
            "model": self._language_model().name,
            "retriever": None if self.retriever is None else type(self.retriever).__name__,
            "embeddings": None if self.embeddings is None else type(self.embeddings).__name__,
            "scores": _named(self.scores),
            "query": _named(self.query),
            **settings,
            **sampling,
            "stop": list(sampling["stop"]),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        found = super()._get_ls_params(stop=stop, **kwargs)
        found["ls_provider"] = "rlm_plugins"
        found.setdefault("ls_model_name", self._language_model().name)
        sampling = self._sampling(stop, {})
        found.setdefault("ls_temperature", sampling.temperature)
        found.setdefault("ls_max_tokens", sampling.max_tokens)
        if sampling.stop:
            found["ls_stop"] = list(sampling.stop)
        return found

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache key: nothing in the parameters tells one corpus from another, so each instance has its own."""
        return f"{super()._get_llm_string(stop, **kwargs)}---{self._identity}"

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of the inner model's tokenizer. Raises `UsageError` where it has none."""
        tokenizer = self._language_model().tokenizer
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        if tokenizer is None:
            raise UsageError(f"{self._language_model().name} has no tokenizer here: pass custom_get_token_ids")
        return tokenizer.encode(text)


def _known_options(options: dict[str, Any]) -> None:
    names = [name for name in options if name not in _CALL]
    if not names:
        return
    advice = ""
    if {"tools", "tool_choice", "functions", "response_format"}.intersection(names):
        advice = ": an ensemble writes text, it calls no tools and keeps to no schema"
    raise UsageError(unknown("a call of ChatReplug", "option", names, _CALL) + advice)


def _arguments(kind: type[BaseChatModel]) -> list[str]:
    """The arguments worth naming: ours first, then LangChain's."""
    return sorted(kind.model_fields, key=lambda name: name in BaseChatModel.model_fields)


def _named(value: Any) -> Any:
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value
