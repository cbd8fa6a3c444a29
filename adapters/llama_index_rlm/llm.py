"""REPLUG as a LlamaIndex LLM: for engines that build their own synthesizer, and wherever an LLM is asked for."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, Unpack, cast, get_args

from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    LogProb,
    MessageRole,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index.core.schema import BaseComponent, BaseNode, MetadataMode, NodeWithScore
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_serializer

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.ensemble import EnsembleKind, Replug, ReplugFields, ReplugSettings, TraceLevel
from rlm_plugins.methods.replug.mixture import Pool
from rlm_plugins.methods.replug.weights import Weighting
from rlm_plugins.models import Embedder, Retriever
from rlm_plugins.prompts import Prompt, PromptTemplate
from rlm_plugins.retrieval import CachedEmbedder, Scores, identified
from rlm_plugins.texts import Chunk, Generation, Message, Passage, ScoreKind, TokenLogprob

from .from_llama_index import LlamaIndexEmbedder, LlamaIndexRetriever, passage_from_node
from .frozen_lm import FrozenLM, messages_from_chat

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Document = NodeWithScore | BaseNode | Passage | str
"""What can be passed as a document."""


class EnsembleFields(ReplugFields, total=False):
    """What a `ReplugSynthesizer` and a `ReplugLLM` have in common, as keywords; see `ReplugLLM` for their meaning."""

    embed_model: BaseEmbedding | Embedder | None
    scores: Scores | None
    score_kind: ScoreKind | None
    metadata_mode: MetadataMode
    template: PromptTemplate | None
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    stop: Sequence[str] | None
    seed: int | None


class LLMFields(EnsembleFields, total=False):
    """The above, and what every LLM of LlamaIndex has."""

    query: Callable[[Sequence[ChatMessage]], str] | None
    callback_manager: Any
    system_prompt: str | None
    output_parser: Any
    pydantic_program_mode: Any
    rate_limiter: Any


# The decorators of LlamaIndex are untyped; this keeps the type of what they decorate.
def _completion(method: Callable[P, R]) -> Callable[P, R]:
    return cast(Callable[P, R], llm_completion_callback()(method))


def _chat(method: Callable[P, R]) -> Callable[P, R]:
    return cast(Callable[P, R], llm_chat_callback()(method))


_SCORES = ("embeddings", "rank", "uniform")
_SAMPLING = ("temperature", "top_p", "max_tokens", "stop", "seed")
_CALL = frozenset({*_SAMPLING, "documents"})


class ReplugLLM(LLM):
    """A REPLUG ensemble over a frozen model, as an LLM.

    Each call retrieves for the question (the prompt, or the last user message), or takes `documents=[...]`: nodes,
    passages or strings. Each document gets a prompt of its own and the next-token distributions are mixed. The trace is
    in `response.raw["replug"]`, the tokens counted in `response.raw["usage"]`. A call may override the sampling fields;
    any other keyword is refused.

    Raises `UsageError` for an unknown or unusable argument, `RetrievalError` where nothing was found and there is no
    null document, `Unsupported` where the model gives too little.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: Any = Field(description="A language model of rlm_plugins, or an LLM that `FrozenLM.from_llm` takes.")
    retriever: Any = Field(default=None, exclude=True, description="A retriever, an index, or one of rlm_plugins.")
    embed_model: Any = Field(
        default=None,
        exclude=True,
        description="What scores the documents; None: the retriever's own, else Settings.embed_model where it is set.",
    )
    scores: Any = Field(
        default=None,
        description='"embeddings", "rank", "uniform" or a function of query and passages; None: "embeddings".',
    )
    query: Any = Field(
        default=None,
        exclude=True,
        description="A function of the chat messages that gives what is looked up; None: the last user message.",
    )
    score_kind: ScoreKind | None = Field(
        default=None, description="Take the nodes' own scores, which are of this kind; excludes `scores`."
    )
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.NONE, description="How much of a node's metadata stands in its text."
    )
    template: PromptTemplate | None = Field(
        default=None, exclude=True, description="The words around document and question; None: the model's."
    )
    k: int = 10
    ensemble: EnsembleKind = "auto"
    weights: Weighting = "softmax"
    weight_temperature: float | None = None
    posterior: bool = False
    null_document: float | None = None
    pool: Pool = "probability"
    max_document_tokens: int | None = None
    trace: TraceLevel = "summary"
    temperature: float | None = Field(default=None, description="None: the model's, like all sampling fields.")
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None

    _kept: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict[str, tuple[Any, Any]])

    def __init__(
        self,
        *,
        llm: Any,
        retriever: BaseRetriever | BaseIndex[Any] | Retriever | None = None,
        **fields: Unpack[LLMFields],
    ) -> None:
        refuse_unknown("ReplugLLM", fields, type(self).model_fields)
        prompts = (fields.get("messages_to_prompt"), fields.get("completion_to_prompt"))
        if any(prompt not in (None, messages_to_prompt, default_completion_to_prompt) for prompt in prompts):
            raise UsageError(
                "messages_to_prompt and completion_to_prompt are not used here: say the words in template="
            )
        given: dict[str, Any] = {"llm": llm, "retriever": retriever, **fields}
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise UsageError(f"ReplugLLM: {_reasons(error)}") from error
        if self.embed_model is None:
            self.embed_model = _own_embed_model(retriever) or settings_embed_model()
        self.scores = self._how_to_score()
        self._replug()  # what is wrong with the fields shows here

    @classmethod
    def class_name(cls) -> str:
        return "ReplugLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """A chat model, so that engines hand over whole conversations and the last user message is looked up."""
        lm = self.language_model
        return LLMMetadata(
            context_window=lm.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=lm.sampling.max_tokens,
            is_chat_model=True,
            model_name=lm.name,
        )

    @property
    def language_model(self) -> Replug:
        """The ensemble as a language model of the core, as the fields describe it now."""
        return self._replug()

    # --- completions ---

    @_completion
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        call = self._call([ChatMessage(content=prompt)], kwargs)
        return _completed(call.lm.generate(prompt, documents=call.documents))

    @_completion
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        call = self._call([ChatMessage(content=prompt)], kwargs)
        return _completed(await call.lm.agenerate(prompt, documents=call.documents))

    @_completion
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        call = self._call([ChatMessage(content=prompt)], kwargs)
        return _pieces(call.lm.stream(prompt, documents=call.documents), _completion_piece)

    @_completion
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        call = self._call([ChatMessage(content=prompt)], kwargs)
        return _apieces(call.lm.astream(prompt, documents=call.documents), _completion_piece)

    # --- chat ---

    @_chat
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        return _chatted(call.lm.generate(call.messages, documents=call.documents))

    @_chat
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        return _chatted(await call.lm.agenerate(call.messages, documents=call.documents))

    @_chat
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        call = self._call(messages, kwargs)
        return _pieces(call.lm.stream(call.messages, documents=call.documents), _chat_piece)

    @_chat
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        call = self._call(messages, kwargs)
        return _apieces(call.lm.astream(call.messages, documents=call.documents), _chat_piece)

    # --- how the core is asked ---

    def _replug(self, query: str | None = None, call: Mapping[str, Any] | None = None) -> Replug:
        """Built anew for each call, so that `model_copy(update=...)` is honoured; the parts with a memory are kept."""
        lm = self._converted("llm", FrozenLM.from_llm)
        said = {name: (call or {}).get(name, getattr(self, name)) for name in _SAMPLING}
        if said["stop"] is not None and not isinstance(said["stop"], str):
            said["stop"] = tuple(said["stop"])
        named: dict[str, Any] = {} if query is None else {"query": _always(query)}
        return Replug(
            lm,
            retriever=as_retriever(self.retriever, score_kind=self.score_kind, metadata_mode=self.metadata_mode),
            embedder=None if self.embed_model is None else self._converted("embed_model", as_embedder),
            scores=self.scores,
            template=self.template,
            sampling=replace(lm.sampling, **{name: value for name, value in said.items() if value is not None}),
            settings=ReplugSettings(**{name: getattr(self, name) for name in ReplugFields.__annotations__}),
            **named,
        )

    def _converted(self, name: str, convert: Callable[[Any], T]) -> T:
        """A part of LlamaIndex as a part of the core: the same one as long as the field holds the same object."""
        source = getattr(self, name)
        if name not in self._kept or self._kept[name][0] is not source:
            self._kept[name] = (source, convert(source))
        return cast(T, self._kept[name][1])

    def _how_to_score(self) -> Scores | None:
        """`scores`, or what it is where nothing was said; None keeps the scores the nodes carry."""
        scores: Scores | None = self.scores
        if self.score_kind is not None:
            if scores is not None:
                raise UsageError("score_kind takes the scores that the nodes carry: leave scores unset beside it")
            if self.score_kind not in get_args(ScoreKind):
                raise UsageError(f"score_kind must be one of {', '.join(get_args(ScoreKind))}, got {self.score_kind!r}")
            return None
        if scores is None:
            scores = "uniform" if self.weights == "uniform" else "embeddings"
        if not callable(scores) and scores not in _SCORES:
            raise UsageError(f"scores must be one of {', '.join(_SCORES)} or a function, got {scores!r}")
        if scores == "embeddings" and self.embed_model is None:
            raise UsageError(
                "nothing says how to score the documents, and what a store says is not comparable: pass embed_model= "
                '(or set Settings.embed_model), or scores="rank" with weight_temperature=, or scores="uniform", or a '
                "function, or score_kind= where you know what the nodes' own scores are"
            )
        return scores

    def _call(self, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> _Call:
        refuse_unknown("a call of ReplugLLM", given, _CALL)
        query = None if self.query is None else self.query(messages)
        documents = given.get("documents")
        passages = None
        if documents is not None:
            passages = passages_from(documents, score_kind=self.score_kind, metadata_mode=self.metadata_mode)
        return _Call(self._replug(query, given), messages_from_chat(messages), passages)

    # --- copies ---

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ReplugLLM:
        """The same frozen model and retriever under new settings: neither is copied."""
        return self.model_copy()

    def __getstate__(self) -> dict[Any, Any]:
        refuse_unpicklable(self, ("llm", "retriever", "embed_model", "scores", "query"))
        self._kept.clear()
        return cast("dict[Any, Any]", super().__getstate__())

    @field_serializer("llm")
    def _name_of_llm(self, llm: Any) -> str:
        return self._converted("llm", FrozenLM.from_llm).name

    @field_serializer("scores")
    def _name_of_scores(self, scores: Any) -> Any:
        return getattr(scores, "__qualname__", repr(scores)) if callable(scores) else scores


@dataclass(frozen=True, slots=True)
class _Call:
    lm: Replug
    messages: tuple[Message, ...]
    documents: tuple[Passage, ...] | None


# --- inward ----------------------------------------------------------------------------------------------------------


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"{owner} has no argument {', '.join(unknown)}; the arguments are {', '.join(sorted(known))}")


def refuse_unpicklable(component: BaseComponent, parts: Iterable[str]) -> None:
    """LlamaIndex would leave out what cannot be pickled, and the copy would fail when it is used."""
    for name in parts:
        part = getattr(component, name)
        try:
            pickle.dumps(part)
        except Exception as error:
            raise pickle.PicklingError(
                f"{component.class_name()}.{name} ({type(part).__name__}) cannot be pickled ({error}): "
                f"build the {component.class_name()} in the process that uses it"
            ) from error


def as_retriever(
    source: object, *, score_kind: ScoreKind | None = None, metadata_mode: MetadataMode = MetadataMode.NONE
) -> Retriever | None:
    if source is None or isinstance(source, Retriever):
        return source
    if isinstance(source, BaseRetriever | BaseIndex):
        return LlamaIndexRetriever(cast(Any, source), score_kind=score_kind, metadata_mode=metadata_mode)
    raise UsageError(
        f"retriever must be a LlamaIndex retriever or index, or a Retriever of rlm_plugins, got {type(source).__name__}"
    )


def as_embedder(source: object) -> Embedder:
    """With a memory for documents, so that none is embedded for every question anew."""
    if isinstance(source, CachedEmbedder):
        return source
    if isinstance(source, Embedder):
        return CachedEmbedder(source)
    if isinstance(source, BaseEmbedding):
        return CachedEmbedder(LlamaIndexEmbedder(source))
    raise UsageError(
        f"embed_model must be a LlamaIndex embedding model or an Embedder of rlm_plugins, got {type(source).__name__}"
    )


def passages_from(
    documents: Sequence[Document],
    *,
    score_kind: ScoreKind | None = None,
    metadata_mode: MetadataMode = MetadataMode.NONE,
) -> tuple[Passage, ...]:
    """Nodes, passages or strings as passages. Raises `UsageError` for anything else, and for a node without a score
    where `score_kind` says that nodes carry one."""
    if isinstance(documents, str):
        raise UsageError("documents must be a list of nodes, passages or strings, got one string")
    found: list[Passage] = []
    for document in documents:
        if isinstance(document, NodeWithScore | BaseNode):
            passage = passage_from_node(document, score_kind=score_kind, metadata_mode=metadata_mode)
            if score_kind is not None and passage.score is None:
                raise UsageError(
                    f"node {passage.id!r} carries no score of the kind {score_kind!r}: leave score_kind unset, and the "
                    "documents are scored by their embeddings"
                )
            found.append(passage)
        elif isinstance(document, Passage):
            found.append(document)
        elif isinstance(document, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            found.append(identified(Passage(document)))
        else:
            raise UsageError(f"a document must be a node, a passage or a string, got {type(document).__name__}")
    return tuple(found)


def settings_llm() -> LLM | None:
    """`Settings.llm` where somebody set it: to touch it unset would load OpenAI."""
    return cast("LLM | None", getattr(Settings, "_llm", None))


def settings_embed_model() -> BaseEmbedding | None:
    return cast("BaseEmbedding | None", getattr(Settings, "_embed_model", None))


def _own_embed_model(retriever: object) -> BaseEmbedding | None:
    """What the index, or a retriever over one, embeds its queries with."""
    own = getattr(retriever, "_embed_model", None)
    return own if isinstance(own, BaseEmbedding) else None


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}, got {reason['input']!r}" for reason in error.errors()
    )


def _always(query: str) -> Callable[[Prompt], str]:
    return lambda prompt: query


# --- outward ---------------------------------------------------------------------------------------------------------


def _raw(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    raw: dict[str, Any] = {
        "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        "finish_reason": generation.finish_reason,
    }
    if generation.trace is not None:
        raw["replug"] = dict(generation.trace)
    return raw


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[list[LogProb]]:
    """Per token the chosen one, then the listed alternatives."""
    return [
        [
            LogProb(token=text, logprob=logprob, bytes=list(text.encode()))
            for text, logprob in [(token.token, token.logprob), *token.top]
            if logprob is not None
        ]
        for token in tokens
    ]


def _completed(generation: Generation) -> CompletionResponse:
    return CompletionResponse(text=generation.text, raw=_raw(generation), logprobs=_logprobs(generation.tokens) or None)


def _chatted(generation: Generation) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=generation.text)
    return ChatResponse(message=message, raw=_raw(generation), logprobs=_logprobs(generation.tokens) or None)


def _completion_piece(text: str, chunk: Chunk) -> CompletionResponse:
    if chunk.final is not None:
        return _completed(chunk.final).model_copy(update={"delta": chunk.text})
    return CompletionResponse(text=text, delta=chunk.text, logprobs=_logprobs(chunk.tokens) or None)


def _chat_piece(text: str, chunk: Chunk) -> ChatResponse:
    if chunk.final is not None:
        return _chatted(chunk.final).model_copy(update={"delta": chunk.text})
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=chunk.text, logprobs=_logprobs(chunk.tokens) or None)


def _pieces(chunks: Iterator[Chunk], piece: Callable[[str, Chunk], T]) -> Generator[T, None, None]:
    """Each with the text so far; the last one has the whole response, trace and usage included."""
    text = ""
    with closing(cast("Generator[Chunk]", chunks)) as reading:
        for chunk in reading:
            text += chunk.text
            yield piece(text, chunk)


async def _apieces(chunks: AsyncIterator[Chunk], piece: Callable[[str, Chunk], T]) -> AsyncGenerator[T, None]:
    text = ""
    async with aclosing(cast("AsyncGenerator[Chunk]", chunks)) as reading:
        async for chunk in reading:
            text += chunk.text
            yield piece(text, chunk)
