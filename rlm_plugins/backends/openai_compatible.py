"""A model behind an OpenAI-compatible API: completions or chat, any server, whatever it can do.

    lm = OpenAICompatibleLM("my-model", base_url="http://127.0.0.1:8000/v1", tokenizer=tokenizer)

The first use finds out what the endpoint gives (`rlm_plugins.backends.probe`): a few one-token calls, judged by what
they answer. With a tokenizer and a server that takes them, prompts are sent as token ids, BOS included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from ..capabilities import Capabilities
from ..decoding import announce, scoring_rows
from ..errors import ModelError, Unsupported, UsageError
from ..flows import Flow, ask, together
from ..models import FlowModel
from ..prompts import QUESTION_ANSWER, Prompt, PromptTemplate, render_messages, render_text
from ..requests import Emit, Generate, GenerateIds, Probe, Request, Sampling, Score, ScoreRows
from ..texts import Chunk, FinishReason, Generation, Message, Passage, Scoring, TokenLogprob, Usage
from ..tokens import Tokenizer, conversation_as_text, fit_prompt
from .openai_errors import Secret
from .openai_requests import (
    CHAT_CONTINUATIONS,
    ChatOpening,
    Continuation,
    Endpoint,
    EndpointFacts,
    IdsOpening,
    Opening,
    ScoringWay,
    TextOpening,
    next_call,
)
from .openai_scoring import Scorer, Target
from .openai_transport import Answered, Call, ClientOptions, Discover, OpenEvents, ReadEvent, Transport
from .openai_wire import Choice, cover, read_choices, read_usage
from .probe import Wishes, discover

_OPENAI = "https://api.openai.com/v1"


class OpenAICompatibleLM(FlowModel):
    """A language model behind an OpenAI-compatible API.

    `base_url`: as for the `openai` package (None: its default). `api_key`: None takes OPENAI_API_KEY, but only for the
    default address: the key is not sent to any other. `endpoint`: "auto" prefers completions, which continue text and
    take k prompts in one request. `continuation`: how a chat goes on with a begun answer, by name; `scoring`: how a
    given text is scored; "auto" finds out. `tokenizer`: the served model's, for token ids, exact boundaries and cutting
    documents to `context_window`. `capabilities`: what the endpoint can do, when it need not be asked.
    `max_concurrency`: requests under way at once. `max_retries`: the SDK's own, for 429 and 5xx. `extra_body`: fields
    added to every request.

    Costs: one request per `Generate` (k prompts share one where the endpoint takes several), one per `Score`, or one
    per token of it by forced decoding. Raises `UsageError` here for bad arguments; in use `UsageError` for a refused
    key or an unknown model, `Unsupported` for what the endpoint lacks, `ModelError` for what fails.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        endpoint: Literal["auto"] | Endpoint = "auto",
        continuation: Literal["auto"] | Continuation | None = "auto",
        scoring: Literal["auto"] | ScoringWay | None = "auto",
        tokenizer: Tokenizer | None = None,
        context_window: int | None = None,
        capabilities: Capabilities | None = None,
        max_concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 2,
        template: PromptTemplate = QUESTION_ANSWER,
        sampling: Sampling | None = None,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        _one_of("endpoint", endpoint, ("auto", *get_args(Endpoint)))
        _one_of("continuation", continuation, ("auto", None, *get_args(Continuation)))
        _one_of("scoring", scoring, ("auto", None, *get_args(ScoringWay)))
        if not model:
            raise UsageError("model is empty: pass the name under which the endpoint serves the model")
        if max_concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise UsageError(
                "max_concurrency must be at least 1, timeout above 0 and max_retries at least 0, got "
                f"{max_concurrency}, {timeout} and {max_retries}"
            )
        url = base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI
        self.name = model
        self.address = _shown(url)
        self.tokenizer = tokenizer
        self.context_window = context_window
        self.template = template
        self.sampling = sampling or Sampling()
        self._extra = dict(extra_body or {})
        self.cache_identity = [endpoint, continuation, scoring, self._extra]
        """What answers depend on beside the address and the name."""
        wishes = Wishes(model, endpoint, continuation, scoring, tokenizer, self._extra)
        options = ClientOptions(
            url, _key(base_url, api_key), timeout, max_retries, max_concurrency, dict(headers or {})
        )
        self.below = self._transport = Transport(options, lambda: discover(wishes), self.address)
        if capabilities is not None:
            self._transport.facts = _stated(wishes, capabilities, context_window)

    def __repr__(self) -> str:
        return f"OpenAICompatibleLM({self.name!r}, base_url={self.address!r})"

    def close(self) -> None:
        """Close the connections used from threads. What an event loop opened closes with it, or by `aclose`."""
        self._transport.close()

    async def aclose(self) -> None:
        await self._transport.aclose()

    def interpret(self, request: Request[Any]) -> Flow[Any] | None:
        match request:
            case Generate():
                return self._generate(request)
            case GenerateIds():
                return self._generate_ids(request)
            case Score():
                return self._score(request)
            case ScoreRows():
                return self._score_rows(request)
            case Probe():
                return self._probe()
            case _:
                return None

    def interpret_stream(self, request: Generate) -> Flow[Generation]:
        return self._stream(request)

    def _facts(self) -> Flow[EndpointFacts]:
        facts = yield from ask(Discover())
        if self.context_window is None:
            self.context_window = facts.context_window
        return facts

    def _probe(self) -> Flow[Capabilities]:
        return (yield from self._facts()).capabilities

    # --- writing ---

    def _generate(self, request: Generate) -> Flow[Generation]:
        facts = yield from self._facts()
        answered = yield from ask(self._call(facts, request))
        choice = _only_choice(answered, self.tokenizer)
        strip = self._strips_space(facts, request)
        return _generation(choice, _usage(answered, choice), strip_first_space=strip)

    def _generate_ids(self, request: GenerateIds) -> Flow[Generation]:
        facts = yield from self._facts()
        _require_ids(facts, self.tokenizer)
        asked = _alternatives(facts, request.top_logprobs)
        call = next_call(
            self.name, facts, IdsOpening(request.prompt), request.sampling, logprobs=asked, ids=True, extra=self._extra
        )
        answered = yield from ask(call)
        choice = _only_choice(answered, self.tokenizer)
        return Generation(choice.text, choice.tokens, choice.finish_reason or "stop", _usage(answered, choice))

    def _stream(self, request: Generate) -> Flow[Generation]:
        facts = yield from self._facts()
        call = self._call(facts, request)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = yield from ask(OpenEvents(call.path, {**(call.body or {}), **options}))
        written = _Written(self._strips_space(facts, request))
        try:
            while (event := (yield from ask(ReadEvent(stream)))) is not None:
                usage = read_usage(event)
                if usage is not None:
                    written.usage = usage
                for choice in read_choices(event, self.tokenizer):
                    chunk = written.add(choice)
                    if chunk.text or chunk.tokens:
                        yield [Emit(chunk)]
        except ModelError as error:
            error.partial = written.generation()
            raise
        if written.finish is None:
            raise ModelError(
                f"the stream of {self.address} ended in the middle of an answer, after {len(written.text)} characters",
                retryable=True,
                partial=written.generation(),
            )
        generation = written.generation()
        yield from announce(generation)
        return generation

    def _call(self, facts: EndpointFacts, request: Generate) -> Call:
        opening, _ = self._opening(
            facts, request.prompt, request.documents or (), request.answer_so_far, request.sampling.max_tokens
        )
        asked = _alternatives(facts, request.top_logprobs)
        named = self.tokenizer is not None
        return next_call(self.name, facts, opening, request.sampling, logprobs=asked, ids=named, extra=self._extra)

    def _opening(
        self,
        facts: EndpointFacts,
        prompt: Prompt,
        documents: tuple[Passage, ...],
        answer_so_far: str,
        reserve: int,
    ) -> tuple[Opening, tuple[Passage, ...]]:
        """The prompt as it is sent, and the documents in it: cut to the window where tokenizer and window are known."""
        if facts.endpoint == "chat" and isinstance(prompt, str):
            prompt = (Message("user", prompt),)
        sent = documents
        if self.tokenizer is not None:
            ids, sent = fit_prompt(
                self.tokenizer,
                self.template,
                prompt,
                documents,
                context_window=self.context_window,
                reserve=reserve,
                answer_so_far=answer_so_far,
            )
            if facts.endpoint == "completions" and facts.capabilities.token_ids:
                return IdsOpening(ids), sent
        if facts.endpoint == "chat":
            assert not isinstance(prompt, str)
            return ChatOpening(render_messages(self.template, prompt, sent), answer_so_far), sent
        spaced = " " + answer_so_far if answer_so_far and self.template.answer_starts_with_space else answer_so_far
        if isinstance(prompt, str):
            return TextOpening(render_text(self.template, prompt, sent, answer_so_far=spaced)), sent
        return TextOpening(conversation_as_text(self.template, prompt, sent) + spaced), sent

    def _strips_space(self, facts: EndpointFacts, request: Generate) -> bool:
        """Whether the first space belongs to the template."""
        return facts.endpoint == "completions" and self.template.answer_starts_with_space and not request.answer_so_far

    # --- scoring ---

    def _scorer(self, facts: EndpointFacts) -> Scorer:
        return Scorer(self.name, facts, self.tokenizer, self._extra)

    def _score(self, request: Score) -> Flow[Scoring]:
        facts = yield from self._facts()
        if not request.continuation:
            raise UsageError("the continuation to score is empty: its log-probability would be 0 whatever the context")
        opening, target = self._scored_parts(facts, request)
        tokens, usage = yield from self._scorer(facts).score(opening, target)
        return Scoring(tokens, usage)

    def _scored_parts(self, facts: EndpointFacts, request: Score) -> tuple[Opening, Target]:
        """What stands before the continuation, and the continuation, cut at the true token boundary where a tokenizer
        is known."""
        documents = request.documents or ()
        if facts.endpoint == "completions" and self.tokenizer is not None:
            rows = scoring_rows(self.tokenizer, self.template, request, [documents], context_window=self.context_window)
            [ids], [target] = rows
            text = self.tokenizer.decode(target)
            if facts.capabilities.token_ids:
                return IdsOpening(ids), Target(text, target)
            if not request.include_end:
                return TextOpening(self.tokenizer.decode(ids)), Target(text, target)
        if request.include_end:
            raise Unsupported(
                "scoring the end of an answer",
                "token_ids",
                found=False,
                remedy="pass tokenizer= to a server that takes ids",
            )
        reserve = 0 if self.tokenizer is None else len(self.tokenizer.encode(request.continuation))
        opening, _ = self._opening(facts, request.prompt, documents, "", reserve)
        if isinstance(opening, ChatOpening):
            ids = None if self.tokenizer is None else tuple(self.tokenizer.encode(request.continuation))
            return opening, Target(request.continuation, ids)
        space = " " if self.template.answer_starts_with_space else ""
        return opening, Target(space + request.continuation)

    def _score_rows(self, request: ScoreRows) -> Flow[list[Any]]:
        import numpy as np

        facts = yield from self._facts()
        _require_ids(facts, self.tokenizer)
        found: list[Any] = []
        scorer = self._scorer(facts)
        flows = [
            scorer.score(IdsOpening(prompt), Target("", target))
            for prompt, target in zip(request.prompts, request.continuations, strict=True)
        ]
        for tokens, _ in (yield from together(flows)):
            found.append(np.asarray([token.logprob for token in tokens], dtype=np.float32))
        return found


class _Written:
    """What of a stream has arrived."""

    def __init__(self, strip_first_space: bool) -> None:
        self.text = ""
        self.finish: FinishReason | None = None
        self.usage: Usage | None = None
        self._tokens: list[TokenLogprob] = []
        self._lead = " " if strip_first_space else ""
        self._pieces = 0

    def add(self, choice: Choice) -> Chunk:
        piece = choice.text
        if piece and self._lead:
            piece, self._lead = piece.removeprefix(self._lead), ""
        self._pieces += bool(choice.text)
        self.text += piece
        self._tokens += choice.tokens
        self.finish = choice.finish_reason or self.finish
        return Chunk(piece, choice.tokens)

    def generation(self) -> Generation:
        count = len(self._tokens) or self._pieces
        usage = self.usage or Usage(1, 1, completion_tokens=count, estimated=True)
        choice = Choice(self.text, tuple(self._tokens), self.finish)
        return _generation(choice, usage, strip_first_space=False)


def _generation(choice: Choice, usage: Usage, *, strip_first_space: bool) -> Generation:
    tokens = choice.tokens
    if choice.finish_reason == "stop" and tokens:
        spelled = "".join(token.token for token in tokens[:-1])
        if not tokens[-1].token or (choice.text and spelled.endswith(choice.text)):
            tokens = tokens[:-1]  # the end token has an entry on some servers; it is no part of the text
    tokens = cover(choice.text, tokens)
    text = choice.text.removeprefix(" ") if strip_first_space else choice.text
    return Generation(text, tokens, choice.finish_reason or "stop", usage)


def _only_choice(answered: Answered, tokenizer: Tokenizer | None) -> Choice:
    choices = read_choices(answered.data, tokenizer)
    if len(choices) != 1:
        raise ModelError(f"one answer was asked for and {len(choices)} came: {str(answered.data)[:120]}")
    return choices[0]


def _usage(answered: Answered, choice: Choice) -> Usage:
    said = read_usage(answered.data, requests=answered.requests)
    return said or Usage(1, answered.requests, completion_tokens=len(choice.tokens), estimated=True)


def _alternatives(facts: EndpointFacts, wanted: int) -> int | None:
    """How many alternatives to ask for: as many as are given; None where log-probs are not given.

    Raises `Unsupported` where alternatives are wanted and there are none.
    """
    can = facts.capabilities
    if not can.output_logprobs:
        if wanted:
            raise Unsupported(
                "listing alternatives",
                "output_logprobs",
                found=False,
                remedy="use an endpoint that answers with log-probs; `probe` shows what it gives",
            )
        return None
    return min(wanted, can.top_logprobs)


def _require_ids(facts: EndpointFacts, tokenizer: Tokenizer | None) -> None:
    if not facts.capabilities.token_ids:
        remedy = "pass tokenizer=" if tokenizer is None else "use a server whose completions take token ids (vLLM)"
        raise Unsupported("a prompt given as token ids", "token_ids", found=False, remedy=remedy)


def _stated(wishes: Wishes, can: Capabilities, context_window: int | None) -> EndpointFacts:
    """The facts where the caller says what the endpoint can do."""
    endpoint = wishes.endpoint
    if endpoint == "auto":
        endpoint = "chat" if can.continuation in CHAT_CONTINUATIONS else "completions"
    scoring = wishes.scoring
    if scoring == "auto":
        forced = "forced" if can.logit_bias == "raw" and can.continuation else None
        given = "echo" if endpoint == "completions" else "prompt_logprobs"
        scoring = given if can.prompt_logprobs else forced
    return EndpointFacts(endpoint, can, scoring, names_ids=can.token_ids, context_window=context_window)


def _key(base_url: str | None, api_key: str | None) -> Secret:
    if api_key is None and base_url is None and "OPENAI_BASE_URL" not in os.environ:
        api_key = os.environ.get("OPENAI_API_KEY")
        if not api_key:
            raise UsageError("there is no key: pass api_key=, set OPENAI_API_KEY, or pass base_url= for another server")
    return Secret(api_key or "none")


def _shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query. `UsageError` for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("base_url must be an http or https address such as http://127.0.0.1:8000/v1")
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
