"""REPLUG as a language model: retrieve, weigh, write one prompt per document, mix (Shi et al. 2023).

`Replug(lm)` is a `LanguageModel` over a `LanguageModel`: whatever takes a model takes an ensemble. What differs from
the paper, and why, stands in `weights` and `mixture`; the paper's own settings are
`Replug(lm, settings=PAPER)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

import numpy as np

from ...capabilities import Capabilities, choose_strategy
from ...decoding import Decoded, announce, decode_rows, scoring_rows
from ...errors import RetrievalError, Unsupported, UsageError
from ...flows import Flow, ask
from ...mixtures import log_weights
from ...models import Embedder, FlowModel, LanguageModel, Retriever, Router
from ...prompts import Prompt, PromptTemplate, question_of
from ...requests import Generate, Probe, Request, Retrieve, Sampling, Score, ScoreRows
from ...retrieval.scores import Scores, scored
from ...texts import Generation, Passage, Scoring, TokenLogprob, Usage
from ...tokens import TokenIds, Tokenizer, answer_lead, fit_prompt
from .mixture import Floats, Pool, TokenMixture, mixture_logprobs
from .naive import ListedMixture, decode_listed
from .weights import Weighting, passage_weights

TraceLevel = Literal["full", "summary", "off"]
EnsembleKind = Literal["auto", "token", "answer"]


@dataclass(frozen=True, slots=True)
class ReplugSettings:
    """What can be set on an ensemble, checked at construction; the same in every framework.

    Raises `UsageError` for a value that is not one of those listed or is out of range.
    """

    _: KW_ONLY
    k: int = 10
    """Documents to retrieve."""
    ensemble: EnsembleKind = "auto"
    """`token`: mix next-token distributions; `answer`: mix whole answers; `auto`: whatever the model makes possible."""
    weights: Weighting = "softmax"
    """`uniform` is the preset that is robust against poisoned documents."""
    weight_temperature: float | None = None
    """tau; None: by kind of score, see `rlm_plugins.methods.replug.weights`."""
    posterior: bool = False
    """Let the weights follow how well each document foretold the answer so far (RAG-Sequence)."""
    null_document: float | None = None
    """The weight of an expert without a document, between 0 and 1; None for no such expert."""
    pool: Pool = "probability"
    """`geometric` is the product of experts that averaging logits computes."""
    max_document_tokens: int | None = None
    trace: TraceLevel = "summary"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("ensemble", get_args(EnsembleKind)),
            ("weights", get_args(Weighting)),
            ("pool", get_args(Pool)),
            ("trace", get_args(TraceLevel)),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.k < 1:
            raise UsageError(f"k must be at least 1, got {self.k}")
        if self.weight_temperature is not None and not 0 < self.weight_temperature < float("inf"):
            raise UsageError(f"weight_temperature must be a finite number above 0, got {self.weight_temperature}")
        if self.null_document is not None and not 0 < self.null_document < 1:
            raise UsageError(f"null_document is a weight between 0 and 1, got {self.null_document}")
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise UsageError(f"max_document_tokens must be at least 1, got {self.max_document_tokens}")
        if self.posterior and self.pool == "geometric":
            raise UsageError('posterior=True is a mixture of probabilities: it cannot be used with pool="geometric"')


PAPER = ReplugSettings(k=10, max_document_tokens=128, weight_temperature=1.0)
"""As printed: 10 documents of 128 tokens, tau = 1."""


class ReplugFields(TypedDict, total=False):
    """The fields of `ReplugSettings`, as keywords."""

    k: int
    ensemble: EnsembleKind
    weights: Weighting
    weight_temperature: float | None
    posterior: bool
    null_document: float | None
    pool: Pool
    max_document_tokens: int | None
    trace: TraceLevel


@dataclass(frozen=True, slots=True)
class _Experts:
    """The rows of one ensemble: a prompt and a weight each. `sent[d]` is None for the null document."""

    sent: tuple[Passage | None, ...]
    prompts: tuple[TokenIds, ...]
    log_weights: Floats


class Replug(FlowModel):
    """An ensemble over `lm`.

    Documents come from the call (`documents=`) or else from `retriever`, and carry their scores; `scores` says how to
    score them anew ("embeddings" needs `embedder`; None keeps what they carry). Without scores the weights are uniform.
    `query` makes of the prompt the text that is looked up and scored against.

    Costs k prompts per answer; over an endpoint k one-token calls per token. Raises, before the model is called:
    `RetrievalError` when nothing was found and there is no null document, `UsageError` for scores that cannot be
    weighed, `Unsupported` where the model gives too little.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        retriever: Retriever | None = None,
        embedder: Embedder | None = None,
        scores: Scores | None = None,
        query: Callable[[Prompt], str] = question_of,
        template: PromptTemplate | None = None,
        sampling: Sampling | None = None,
        settings: ReplugSettings | None = None,
        **fields: Unpack[ReplugFields],
    ) -> None:
        unknown = sorted(fields.keys() - ReplugFields.__annotations__.keys())
        if unknown:
            known = ", ".join(ReplugFields.__annotations__)
            raise UsageError(f"Replug has no setting {', '.join(unknown)}; the settings are {known}")
        if scores == "embeddings" and embedder is None:
            raise UsageError(
                'scores="embeddings" needs an embedder: pass embedder=, or scores="rank" or "uniform", or a retriever '
                "whose passages carry scores"
            )
        self.settings = replace(settings or ReplugSettings(), **fields)
        self.lm = lm
        self.name = lm.name
        self.template = template or lm.template
        self.tokenizer = lm.tokenizer
        self.context_window = lm.context_window
        self.sampling = sampling or lm.sampling
        self.has_retriever = retriever is not None
        self._scores: Scores | None = scores
        self._query = query
        self.below = Router(lm, retriever=retriever, embedder=embedder)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(output_logprobs=True, prompt_logprobs=True, continuation="token_ids", top_logprobs=1 << 30)

    def interpret(self, request: Request[Any]) -> Flow[Any] | None:
        match request:
            case Generate():
                return self._generate(request)
            case Score():
                return self._score(request)
            case Probe():
                return self._probe()
            case _:
                return None

    def _probe(self) -> Flow[Capabilities]:
        yield from ask(Probe())  # reaches the model below, so that what it cannot do shows early
        return self.capabilities

    def _generate(self, request: Generate) -> Flow[Generation]:
        can = yield from ask(Probe())
        way = choose_strategy(can, self.settings.ensemble)
        passages = yield from self._passages(request.prompt, request.documents)
        sampling = request.sampling
        experts = self._experts(
            request.prompt, passages, reserve=sampling.max_tokens, answer_so_far=request.answer_so_far
        )
        whole = way == "native"
        kind = TokenMixture if whole else ListedMixture
        mixer = kind(
            experts.log_weights,
            replaceable=np.array([passage is not None for passage in experts.sent]),
            pool=self.settings.pool,
            posterior=self.settings.posterior,
            greedy=sampling.temperature == 0 and whole,
            explain=self.settings.trace == "full",
            tie_margin=can.repeatability,
        )
        wanted = max(request.top_logprobs, 5 if self.settings.trace == "full" else 0)
        decoding = decode_rows(
            experts.prompts,
            mixer,
            self._tokenizer(),
            sampling,
            top_logprobs=wanted,
            lead="" if request.answer_so_far else self._lead(request.prompt, experts),
        )
        if isinstance(mixer, ListedMixture):
            decoded = yield from decode_listed(decoding, mixer, can.top_logprobs, self._tokenizer().end_ids, sampling)
        else:
            decoded = yield from decoding
        trace = None
        if self.settings.trace != "off":
            trace = self._trace(request, way, experts, mixer, decoded)
        generation = Generation(decoded.text, decoded.tokens, decoded.finish_reason, decoded.usage, trace)
        yield from announce(generation)
        return generation

    def _score(self, request: Score) -> Flow[Scoring]:
        """Always at temperature 1. With `posterior` the sequence-level mixture, else the token-level one."""
        if self.settings.pool == "geometric":
            raise Unsupported(
                'scoring with pool="geometric"', "a normaliser per token", found=None, remedy='use pool="probability"'
            )
        can = yield from ask(Probe())
        choose_strategy(can, self.settings.ensemble)
        passages = yield from self._passages(request.prompt, request.documents)
        sent, weights = self._weighed(passages)
        sets = [() if passage is None else (passage,) for passage in sent]
        tokenizer = self._tokenizer()
        prompts, targets = scoring_rows(
            tokenizer,
            self.template,
            request,
            sets,
            context_window=self.context_window,
            max_document_tokens=self.settings.max_document_tokens,
        )
        if len(set(targets)) > 1:
            raise UsageError("the continuation is tokenized differently after different documents; begin it at a word")
        found = yield from ask(ScoreRows(prompts, targets))
        rows = np.stack(found)  # [k, n]
        mixed = mixture_logprobs(weights, rows, posterior=self.settings.posterior)
        tokens = tuple(
            TokenLogprob(tokenizer.decode([token]), float(logprob), token)
            for token, logprob in zip(targets[0], mixed, strict=True)
        )
        prompt_tokens = sum(map(len, prompts)) + sum(map(len, targets))
        usage = Usage(calls=len(prompts), prompt_tokens=prompt_tokens)
        documents = [
            {"id": passage and passage.id, "weight": _digits(weight), "logprob": _digits(logprob)}
            for passage, weight, logprob in zip(sent, np.exp(weights), rows.sum(axis=1), strict=True)
        ]
        return Scoring(tokens, usage, {"documents": documents})

    def _passages(self, prompt: Prompt, given: tuple[Passage, ...] | None) -> Flow[tuple[Passage, ...]]:
        """The documents, from the call or the retriever, scored."""
        query = self._query(prompt)
        passages = given
        if passages is None:
            if not self.has_retriever:
                raise UsageError("there is no retriever: pass documents=[...] to the call, or retriever= to Replug")
            found = yield from ask(Retrieve(query, self.settings.k))
            passages = found[: self.settings.k]  # some retrievers have a k of their own
        if not passages and self.settings.null_document is None:
            raise RetrievalError(
                f"no documents were found for {query[:80]!r}: check the index, pass documents=[...], or set "
                "null_document to a weight so that the model may answer without any"
            )
        if self._scores is not None and passages:
            passages = yield from scored(query, passages, self._scores)
        return passages

    def _weighed(self, passages: Sequence[Passage]) -> tuple[tuple[Passage | None, ...], Floats]:
        """Rows and their log-weights [k]; the null document, where there is one, comes last."""
        null = self.settings.null_document
        if not passages:
            return (None,), np.zeros(1)
        weights = passage_weights(passages, weights=self.settings.weights, temperature=self.settings.weight_temperature)
        if null is None:
            return tuple(passages), log_weights(weights)
        return (*passages, None), log_weights([*(weights * (1 - null)), null])

    def _experts(self, prompt: Prompt, passages: Sequence[Passage], *, reserve: int, answer_so_far: str) -> _Experts:
        rows, weights = self._weighed(passages)
        prompts: list[TokenIds] = []
        sent: list[Passage | None] = []
        for passage in rows:
            ids, cut = fit_prompt(
                self._tokenizer(),
                self.template,
                prompt,
                () if passage is None else (passage,),
                context_window=self.context_window,
                reserve=reserve,
                max_document_tokens=self.settings.max_document_tokens,
                answer_so_far=answer_so_far,
            )
            prompts.append(ids)
            sent.append(cut[0] if cut else None)
        return _Experts(tuple(sent), tuple(prompts), weights)

    def _lead(self, prompt: Prompt, experts: _Experts) -> str:
        return answer_lead(self._tokenizer(), self.template, prompt, experts.prompts[0])

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Unsupported("the token mixture", "tokenizer", found=None, remedy="pass the model's tokenizer")
        return self.tokenizer

    def _trace(
        self, request: Generate, way: str, experts: _Experts, mixer: TokenMixture, decoded: Decoded
    ) -> dict[str, Any]:
        full = self.settings.trace == "full"
        weights, posterior = np.exp(experts.log_weights), mixer.posterior_weights
        documents: list[dict[str, Any]] = []
        for d, passage in enumerate(experts.sent):
            entry: dict[str, Any] = {
                "id": passage and passage.id,
                "title": passage and passage.title,
                "score": None if passage is None or passage.score is None else float(passage.score),
                "score_kind": passage and passage.score_kind,
                "weight": float(weights[d]),
                "posterior_weight": float(posterior[d]),
            }
            if passage is None:
                entry["null_document"] = True
            if full:
                entry["text"] = passage.text if passage else ""
                entry["prompt"] = self._tokenizer().decode(experts.prompts[d])
            documents.append(entry)
        trace: dict[str, Any] = {
            "version": 1,
            "query": self._query(request.prompt),
            "answer": decoded.text,
            "model": self.name,
            "ensemble": "token",
            "method": way,
            "exact": all(mixer.certified),
            "ties": mixer.ties,
            "robust_radius": mixer.radius,
            "documents": documents,
            "calls": decoded.usage.calls,
            "requests": decoded.usage.requests,
            "prompt_tokens": decoded.usage.prompt_tokens,
            "completion_tokens": decoded.usage.completion_tokens,
        }
        if full:
            count = len(decoded.tokens)  # the mixer saw the end token too; the columns are the text's
            trace["tokens"] = {
                "text": [token.token for token in decoded.tokens],
                "logprob": [_digits(token.logprob) for token in decoded.tokens],
                "certified": mixer.certified[:count] or [True] * count,
                "responsibilities": [[_digits(share) for share in row] for row in mixer.decided[:count]],
                "decided_by": [int(row.argmax()) for row in mixer.decided[:count]],
                "changed_without": mixer.missed[:count] if mixer.greedy else [],
                "top": [
                    [[text, _digits(logprob)] for text, logprob in token.top if logprob > -math.inf]
                    for token in decoded.tokens
                ],
            }
        return trace


def _digits(value: float | None) -> float | None:
    """Four digits; None for what is not known, and for the logarithm of 0, which JSON cannot say."""
    return None if value is None or value == -math.inf else round(float(value), 4)
