"""REPLUG as a model: against plain prompting, against brute force, and its account of itself."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.errors import RetrievalError, Unsupported, UsageError
from rlm_plugins.methods.replug.ensemble import PAPER, Replug, ReplugFields, ReplugSettings
from rlm_plugins.methods.replug.weights import document_weights
from rlm_plugins.models import Embedder, Retriever
from rlm_plugins.prompts import QUESTION_ANSWER, render_text
from rlm_plugins.requests import Sampling
from rlm_plugins.testing import END, VOCABULARY, ScriptedModel
from rlm_plugins.texts import Generation, Message, Passage
from rlm_plugins.traces import ReplugTrace, dump, load_trace

QUESTION = "Who founded Velgar?"
SCORES = (0.9, 0.8, 0.65)
DOCUMENTS = tuple(
    Passage(text, id=f"d{i}", title=f"T{i}", score=score, score_kind="cosine")
    for i, (text, score) in enumerate(
        zip(("Bora Tinel founded Velgar.", "Velgar trades in salt.", "The flag is red."), SCORES, strict=True)
    )
)
SHORT = Sampling(max_tokens=12)


def scripted(**options: Any) -> ScriptedModel:
    """What it says depends on the document: a name, another name, or nothing much."""
    return ScriptedModel({"Bora Tinel founded": "Bora Tinel", "salt": "Bora Quil", "red": "red"}, **options)


def prompt_ids(lm: Any, *documents: Passage) -> list[int]:
    return [lm.tokenizer.bos_id, *lm.tokenizer.encode(render_text(QUESTION_ANSWER, QUESTION, documents))]


def scripted_row(lm: ScriptedModel, written: Sequence[int], *documents: Passage) -> Any:
    """p_d(v) after `written`, float64 [V]."""
    script = lm.runner.script(tuple(prompt_ids(lm, *documents)))
    return np.exp(lm.runner.distribution(script, list(written)).astype(np.float64))


def ids_of(generation: Generation) -> list[int]:
    return [token.token_id for token in generation.tokens if token.token_id is not None]


def trace_of(generation: Generation) -> dict[str, Any]:
    """The trace, which must be plain JSON and fit its schema, there and back."""
    assert generation.trace is not None
    text = json.dumps(generation.trace, allow_nan=False)
    trace = load_trace(text)
    assert isinstance(trace, ReplugTrace)
    assert dump(load_trace(dump(trace))) == dump(trace)
    assert json.loads(dump(trace)) == json.loads(text)
    return json.loads(text)


# --- what must hold of any ensemble ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_one_document_is_plain_prompting(temperature: float) -> None:
    lm, sampling = scripted(), Sampling(temperature=temperature, max_tokens=12, seed=3)
    plain = lm.generate(QUESTION, documents=DOCUMENTS[:1], sampling=sampling)
    ours = Replug(lm, trace="off").generate(QUESTION, documents=DOCUMENTS[:1], sampling=sampling)
    assert ids_of(ours) == ids_of(plain)
    np.testing.assert_allclose([t.logprob for t in ours.tokens], [t.logprob for t in plain.tokens], atol=1e-6)
    assert (ours.text, ours.finish_reason, ours.usage) == (plain.text, plain.finish_reason, plain.usage)
    assert Replug(lm).score(QUESTION, "Bora", documents=DOCUMENTS[:1]).logprob == pytest.approx(
        lm.score(QUESTION, "Bora", documents=DOCUMENTS[:1]).logprob, abs=1e-6
    )


@pytest.mark.parametrize("fields", [{}, {"posterior": True}, {"pool": "geometric"}])
def test_identical_documents_make_the_weights_irrelevant(fields: Any) -> None:
    lm = scripted()
    same = [dataclasses.replace(DOCUMENTS[0], id=str(i), score=score) for i, score in enumerate(SCORES)]
    plain = lm.generate(QUESTION, documents=same[:1], sampling=SHORT)
    ours = Replug(lm, **fields).generate(QUESTION, documents=same, sampling=SHORT)
    assert ours.text == plain.text
    np.testing.assert_allclose([t.logprob for t in ours.tokens], [t.logprob for t in plain.tokens], atol=1e-5)
    assert [d["posterior_weight"] for d in trace_of(ours)["documents"]] == pytest.approx(
        document_weights(SCORES, "cosine").tolist(), abs=1e-6
    )


@cache
def tiny_llama() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from models_for_tests import hf_tokenizer, tiny

    from rlm_plugins.backends.transformers_local import TransformersLM

    return TransformersLM(tiny("llama"), tokenizer=hf_tokenizer())


def straight_rows(lm: Any, text: Sequence[int], document_sets: Sequence[Sequence[Passage]]) -> Any:
    """log p_d of every token of the vocabulary at every place of `text`, by one forward pass each: fp32 [k, n, V]."""
    import torch

    rows: list[Any] = []
    for documents in document_sets:
        prompt = prompt_ids(lm, *documents)
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*prompt, *text]])).logits[0].float()
        rows.append(torch.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + len(text)], dim=-1).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_a_brute_force_fp32_mixture(posterior: bool, temperature: float) -> None:
    lm = tiny_llama()
    import torch

    replug = Replug(lm, posterior=posterior, null_document=0.2, trace="full")
    sampling = Sampling(temperature=temperature, max_tokens=16, seed=1)
    generation = replug.generate(QUESTION, documents=DOCUMENTS, sampling=sampling)
    ids = ids_of(generation)
    assert len(ids) >= 4, "too short to show anything"
    rows = torch.tensor(straight_rows(lm, ids, [*[(d,) for d in DOCUMENTS], ()]))
    weights = torch.log(torch.tensor([*(document_weights(SCORES, "cosine") * 0.8), 0.2], dtype=torch.float32))
    responsibilities: list[Any] = []
    for step, token in enumerate(generation.tokens):
        joint = weights[:, None] + rows[:, step]
        mixed = torch.logsumexp(joint, dim=0)
        assert abs(token.logprob - float(mixed[ids[step]])) < 1e-5
        assert float(torch.logsumexp(mixed, dim=0)) == pytest.approx(0, abs=1e-5)
        if temperature == 0:
            assert int(mixed.argmax()) == ids[step]
        share = torch.softmax(joint[:, ids[step]], dim=0)
        responsibilities.append(share)
        if posterior:
            weights = torch.log(share)
    found = trace_of(generation)["tokens"]["responsibilities"]
    np.testing.assert_allclose(found, torch.stack(responsibilities).numpy(), atol=1e-4)


@pytest.mark.parametrize("posterior", [False, True])
def test_scores_are_the_likelihoods_of_rag_token_and_rag_sequence(posterior: bool) -> None:
    lm = tiny_llama()
    text = "Bora Tinel, salt"
    scored = Replug(lm, posterior=posterior).score(QUESTION, text, documents=DOCUMENTS)
    ids = lm.tokenizer.encode(" " + text)
    assert [token.token_id for token in scored.tokens] == ids
    rows = straight_rows(lm, ids, [(d,) for d in DOCUMENTS]).astype(np.float64)
    each = rows[:, np.arange(len(ids)), ids]
    weights = np.log(document_weights(SCORES, "cosine"))[:, None]
    whole = np.logaddexp.reduce(weights[:, 0] + each.sum(axis=1))
    by_token = np.logaddexp.reduce(weights + each, axis=0).sum()
    assert scored.logprob == pytest.approx(whole if posterior else by_token, abs=1e-4)
    assert abs(whole - by_token) > 1e-2, "the case does not tell the two apart"


@pytest.mark.parametrize("posterior", [False, True])
def test_the_score_of_what_was_written_is_the_sum_of_its_tokens(posterior: bool) -> None:
    replug = Replug(scripted(), posterior=posterior, null_document=0.1)
    written = replug.generate(QUESTION, documents=DOCUMENTS, sampling=SHORT)
    scored = replug.score(QUESTION, written.text, documents=DOCUMENTS)
    assert ids_of(written) == [token.token_id for token in scored.tokens]
    assert scored.logprob == pytest.approx(sum(token.logprob or 0 for token in written.tokens), abs=1e-4)
    assert scored.trace is not None
    ended = replug.score(QUESTION, written.text, documents=DOCUMENTS, include_end=True)
    assert len(ended.tokens) == len(scored.tokens) + 1
    assert ended.tokens[-1].token_id in replug.tokenizer.end_ids  # type: ignore[union-attr]
    assert ended.logprob < scored.logprob


def test_posterior_sampling_draws_whole_texts_from_the_tempered_sequence_mixture() -> None:
    """Texts of two tokens over three letters, 1,200 draws, chi-square with 8 degrees of freedom at the level .001. The
    token mixture differs by up to .2 in one of the nine: it would be rejected with a power above .99."""
    lm = scripted()
    rng = np.random.default_rng(11)
    firsts, seconds = rng.dirichlet([0.4] * 3, size=2), rng.dirichlet([0.4] * 3, size=(2, 3))

    def distribution(script: list[int], written: list[int]) -> Any:
        d = 0 if bytes(script[:-1]) == b" Bora Tinel" else 1
        row = np.full(VOCABULARY, -np.inf, dtype=np.float32)
        row[97:100] = np.log(firsts[d] if not written else seconds[d][written[0] - 97])
        return row

    lm.runner.distribution = distribution  # type: ignore[method-assign]
    temperature, draws = 1.5, 1200

    def tempered(rows: Any) -> Any:
        return rows ** (1 / temperature) / (rows ** (1 / temperature)).sum(axis=-1, keepdims=True)

    weights = document_weights(SCORES[:2], "cosine")
    pairs = np.stack([tempered(firsts[d])[:, None] * tempered(seconds[d]) for d in range(2)])
    expected = np.tensordot(weights, pairs, axes=1)
    replug = Replug(lm, posterior=True, trace="off")
    counts = np.zeros((3, 3))
    for seed in range(draws):
        sampling = Sampling(temperature=temperature, max_tokens=2, seed=seed)
        first, second = replug.generate(QUESTION, documents=DOCUMENTS[:2], sampling=sampling).text
        counts[ord(first) - 97, ord(second) - 97] += 1
    assert ((counts - draws * expected) ** 2 / (draws * expected)).sum() < 26.12
    shares = np.tensordot(weights, np.stack([tempered(firsts[d]) for d in range(2)]), axes=1)
    conditional = np.tensordot(weights, np.stack([tempered(seconds[d]) for d in range(2)]), axes=1)
    assert abs(shares[:, None] * conditional - expected).max() > 0.05, "the case does not tell the two apart"


def test_the_geometric_pool_is_the_softmax_of_averaged_logits() -> None:
    lm = scripted()
    generation = Replug(lm, pool="geometric").generate(QUESTION, documents=DOCUMENTS, sampling=SHORT)
    weights = document_weights(SCORES, "cosine")
    for step, token in enumerate(generation.tokens):
        with np.errstate(divide="ignore"):
            rows = np.log(np.stack([scripted_row(lm, ids_of(generation)[:step], d) for d in DOCUMENTS]))
        product = np.exp(weights @ rows)
        assert token.token_id == product.argmax()
        assert math.exp(token.logprob or 0) == pytest.approx(product.max() / product.sum(), rel=1e-4)
    assert trace_of(generation)["robust_radius"] is None
    with pytest.raises(Unsupported, match="geometric"):
        Replug(lm, pool="geometric").score(QUESTION, "Bora", documents=DOCUMENTS)


# --- the null document -----------------------------------------------------------------------------------------------


def test_the_null_document_is_the_model_without_documents_with_a_weight_of_its_own() -> None:
    lm = scripted()
    generation = Replug(lm, null_document=0.4, trace="full").generate(QUESTION, documents=DOCUMENTS, sampling=SHORT)
    rows = np.stack([*(scripted_row(lm, [], d) for d in DOCUMENTS), scripted_row(lm, [])])
    weights = np.array([*(document_weights(SCORES, "cosine") * 0.6), 0.4])
    mixed = weights @ rows
    first = generation.tokens[0]
    assert first.token_id == mixed.argmax()
    assert math.exp(first.logprob or 0) == pytest.approx(mixed.max(), rel=1e-5)
    null = trace_of(generation)["documents"][-1]
    assert (null["null_document"], null["id"], null["text"]) == (True, None, "")
    assert null["weight"] == pytest.approx(0.4)
    assert null["prompt"] == "Question: Who founded Velgar?\nAnswer:"


def test_with_a_null_document_nothing_found_is_closed_book() -> None:
    lm = scripted()
    ours = Replug(lm, null_document=0.4).generate(QUESTION, documents=[], sampling=SHORT)
    assert ours.text == lm.generate(QUESTION, sampling=SHORT).text
    assert [d["weight"] for d in trace_of(ours)["documents"]] == [1.0]


# --- the trace -------------------------------------------------------------------------------------------------------


def test_the_full_trace_explains_the_answer() -> None:
    lm = scripted()
    generation = Replug(lm, trace="full").generate(QUESTION, documents=DOCUMENTS, sampling=SHORT)
    trace = trace_of(generation)
    assert trace["query"] == QUESTION
    assert trace["answer"] == generation.text
    assert (trace["ensemble"], trace["method"], trace["exact"], trace["ties"]) == ("token", "native", True, 0)
    assert trace["calls"] == 3
    assert trace["completion_tokens"] == generation.usage.completion_tokens
    assert trace["prompt_tokens"] == sum(len(prompt_ids(lm, d)) for d in DOCUMENTS)
    assert sum(d["weight"] for d in trace["documents"]) == pytest.approx(1)
    assert sum(d["posterior_weight"] for d in trace["documents"]) == pytest.approx(1)
    assert [d["weight"] for d in trace["documents"]] == pytest.approx(document_weights(SCORES, "cosine").tolist())
    ids = [*ids_of(generation), END]
    likelihoods = [math.prod(scripted_row(lm, ids[:n], d)[ids[n]] for n in range(len(ids))) for d in DOCUMENTS]
    joint = document_weights(SCORES, "cosine") * likelihoods
    assert [d["posterior_weight"] for d in trace["documents"]] == pytest.approx(joint / joint.sum(), rel=1e-3)
    for entry, passage in zip(trace["documents"], DOCUMENTS, strict=True):
        assert (entry["id"], entry["title"], entry["text"]) == (passage.id, passage.title, passage.text)
        assert (entry["score"], entry["score_kind"]) == (passage.score, "cosine")
        assert entry["prompt"] == render_text(QUESTION_ANSWER, QUESTION, [passage])
    columns = trace["tokens"]
    assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(columns, len(generation.tokens))
    for step, shares in enumerate(columns["responsibilities"]):
        assert sum(shares) == pytest.approx(1, abs=5e-4)
        assert columns["decided_by"][step] == int(np.argmax(shares))
        assert columns["top"][step][0][0] == columns["text"][step]
        assert len(columns["top"][step]) == 5


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9), st.booleans())
def test_changed_without_is_what_really_removing_the_document_does(seed: int, confidence: float, null: bool) -> None:
    rng = np.random.default_rng(seed)
    lm = scripted(confidence=confidence)
    documents = [
        dataclasses.replace(DOCUMENTS[i % 3], text=f"{DOCUMENTS[i % 3].text} {seed}.{i}", score=float(rng.random()))
        for i in range(3)
    ]
    weight = 0.3 if null else None
    replug = Replug(lm, trace="full", null_document=weight)
    generation = replug.generate(QUESTION, documents=documents, sampling=Sampling(max_tokens=4))
    columns, ids = trace_of(generation)["tokens"], ids_of(generation)
    weights = document_weights([d.score or 0 for d in documents], "cosine")
    sets = [*((d,) for d in documents), *([()] if null else [])]
    everyone = np.array([*(weights * (1 - (weight or 0))), *([weight] if null else [])])
    for step, token in enumerate(ids):
        rows = np.stack([scripted_row(lm, ids[:step], *sent) for sent in sets])
        for d in range(len(rows)):
            rest = [e for e in range(len(rows)) if e != d]
            changed = int((everyone[rest] @ rows[rest]).argmax()) != token
            assert (d in columns["changed_without"][step]) == changed


@pytest.mark.parametrize("null", [None, 0.2])
def test_within_the_radius_no_replacement_of_documents_changes_the_answer(null: float | None) -> None:
    """Adversaries who write any next token with certainty, at every step, in every set of documents of that size; and
    one document more than the radius is enough for some adversary."""
    answers = {f"document {i}": "yes" for i in range(5)} | {"Question": "yes"}
    documents = [Passage(f"document {i}") for i in range(5)]
    lm = ScriptedModel(answers, confidence=0.9)
    replug = Replug(lm, weights="uniform", null_document=null)
    honest = replug.generate(QUESTION, documents=documents, sampling=SHORT)
    radius = trace_of(honest)["robust_radius"]
    assert honest.text == "yes"
    assert 1 <= radius <= 3

    def attacked(lost: Sequence[int], rival: str) -> str:
        changed = [Passage("evil") if i in lost else d for i, d in enumerate(documents)]
        evil = ScriptedModel(
            lambda prompt: rival if "evil" in prompt else "yes",
            confidence=1.0,
        )
        own, other = lm.runner.distribution, evil.runner.distribution

        def distribution(script: list[int], written: list[int]) -> Any:
            return (other if bytes(script[:-1]) == f" {rival}".encode() else own)(script, written)

        evil.runner.distribution = distribution  # type: ignore[method-assign]
        attack = Replug(evil, weights="uniform", null_document=null)
        return attack.generate(QUESTION, documents=changed, sampling=SHORT).text

    for rival in ("no", "yet", "yes!", "y"):
        for lost in itertools.combinations(range(5), radius):
            assert attacked(lost, rival) == "yes"
    assert any(attacked(range(radius + 1), rival) != "yes" for rival in ("no", "yet", "yes!", "y"))


def test_trace_levels_say_more_or_less_and_the_text_is_the_same() -> None:
    lm = scripted()
    made = {
        level: Replug(lm, trace=level).generate(QUESTION, documents=DOCUMENTS, sampling=SHORT)
        for level in ("off", "summary", "full")
    }
    assert made["off"].trace is None
    summary, full = trace_of(made["summary"]), trace_of(made["full"])
    assert "tokens" not in summary
    assert not {"text", "prompt"} & summary["documents"][0].keys()
    assert {**full, "tokens": None, "documents": None} == {**summary, "tokens": None, "documents": None}
    assert made["off"].text == made["summary"].text == made["full"].text
    assert Replug(lm).settings.trace == "summary"


def test_a_trace_is_plain_json_whatever_the_retriever_gave() -> None:
    lm = scripted(confidence=1.0)
    documents = [dataclasses.replace(d, score=np.float32(d.score)) for d in DOCUMENTS]
    generation = Replug(lm, trace="full").generate(QUESTION, documents=documents, sampling=SHORT)
    trace = trace_of(generation)
    assert trace["documents"][0]["score"] == pytest.approx(0.9)
    scored = Replug(lm).score(QUESTION, "zzz", documents=DOCUMENTS)
    json.dumps(scored.trace, allow_nan=False)


def test_a_sampled_answer_has_no_radius_and_no_leave_one_out() -> None:
    sampling = Sampling(temperature=1.0, max_tokens=5, seed=1)
    trace = trace_of(Replug(scripted(), trace="full").generate(QUESTION, documents=DOCUMENTS, sampling=sampling))
    assert trace["robust_radius"] is None
    assert trace["tokens"]["changed_without"] == []


# --- documents and weights -------------------------------------------------------------------------------------------


class Shelf(Retriever):
    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages, self.asked = passages, list[tuple[str, int]]()

    def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> Sequence[Passage]:
        self.asked.append((query, k))
        return self.passages[:k]

    async def aretrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> Sequence[Passage]:
        return self.retrieve(query, k, exclude)


class Lengths(Embedder):
    fingerprint = "lengths"

    def embed_query(self, text: str) -> Any:
        return np.array([1.0, 0.0], dtype=np.float32)

    def embed_documents(self, texts: Sequence[str]) -> Any:
        return np.array([[len(text), 10.0] for text in texts], dtype=np.float32)


def test_documents_come_from_the_retriever_unless_the_call_brings_them() -> None:
    shelf = Shelf(DOCUMENTS)
    replug = Replug(scripted(), retriever=shelf, k=2)
    trace = trace_of(replug.generate(QUESTION, sampling=SHORT))
    assert [d["id"] for d in trace["documents"]] == ["d0", "d1"]
    replug.generate([Message("system", "S"), Message("user", "and Quorin?")], sampling=SHORT)
    assert shelf.asked == [(QUESTION, 2), ("and Quorin?", 2)]
    given = trace_of(replug.generate(QUESTION, documents=DOCUMENTS[2:], sampling=SHORT))
    assert [d["id"] for d in given["documents"]] == ["d2"]
    assert len(shelf.asked) == 2
    assert replug.score(QUESTION, "Bora").trace == replug.score(QUESTION, "Bora", documents=DOCUMENTS[:2]).trace


def test_scores_are_computed_anew_on_request() -> None:
    bare = [Passage("long " * 9, id="long"), Passage("s", id="short")]
    found = trace_of(
        Replug(scripted(), embedder=Lengths(), scores="embeddings").generate(QUESTION, documents=bare, sampling=SHORT)
    )["documents"]
    cosines = [45 / math.hypot(45, 10), 1 / math.hypot(1, 10)]
    assert [d["score"] for d in found] == pytest.approx(cosines)
    assert [d["weight"] for d in found] == pytest.approx(document_weights(cosines, "cosine").tolist(), abs=1e-6)
    ranked = Replug(scripted(), scores="rank", weight_temperature=1.0).generate(
        QUESTION, documents=bare, sampling=SHORT
    )
    assert [d["score"] for d in trace_of(ranked)["documents"]] == [1, 2]


def test_a_document_is_cut_to_its_limit_and_the_trace_shows_what_was_sent() -> None:
    replug = Replug(scripted(), max_document_tokens=4, trace="full")
    trace = trace_of(replug.generate(QUESTION, documents=DOCUMENTS, sampling=SHORT))
    assert [d["text"] for d in trace["documents"]] == ["Bora", "Velg", "The "]
    small = Replug(scripted(context_window=80), trace="full")
    longer = trace_of(small.generate(QUESTION, documents=[Passage("word " * 50)], sampling=SHORT))
    assert longer["prompt_tokens"] == 80 - SHORT.max_tokens


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 0},
        {"ensemble": "tokens"},
        {"weights": "linear"},
        {"weight_temperature": 0.0},
        {"weight_temperature": math.inf},
        {"weight_temperature": math.nan},
        {"posterior": True, "pool": "geometric"},
        {"null_document": 0.0},
        {"null_document": 1.0},
        {"null_document": math.nan},
        {"pool": "logits"},
        {"max_document_tokens": 0},
        {"trace": "everything"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_at_construction(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        ReplugSettings(**fields)
    with pytest.raises(UsageError, match=next(iter(fields))):
        Replug(scripted(), **fields)


def test_a_misspelt_setting_is_refused_with_the_list_of_settings() -> None:
    with pytest.raises(UsageError, match=r"no setting posterio; the settings are k, ensemble"):
        Replug(scripted(), posterio=True)  # type: ignore[call-arg]


def test_fields_and_settings_are_the_same_and_fields_win() -> None:
    names = [field.name for field in dataclasses.fields(ReplugSettings)]
    assert names == list(ReplugFields.__annotations__)
    assert get_type_hints(ReplugFields) == {name: get_type_hints(ReplugSettings)[name] for name in names}
    replug = Replug(scripted(), settings=PAPER, k=3)
    assert (replug.settings.k, replug.settings.max_document_tokens, replug.settings.weight_temperature) == (3, 128, 1.0)


def test_nothing_found_is_an_error_before_the_model_is_asked() -> None:
    lm = scripted()
    for call in (
        lambda: Replug(lm).generate(QUESTION, documents=[]),
        lambda: Replug(lm, retriever=Shelf([])).generate(QUESTION),
        lambda: Replug(lm, retriever=Shelf([])).score(QUESTION, "x"),
    ):
        with pytest.raises(RetrievalError, match="no documents were found"):
            call()
    assert lm.computed == 0


def test_no_retriever_and_no_documents_is_the_callers_to_mend() -> None:
    lm = scripted()
    with pytest.raises(UsageError, match="there is no retriever: pass documents"):
        Replug(lm).generate(QUESTION)
    with pytest.raises(UsageError, match="needs an embedder"):
        Replug(lm, scores="embeddings")
    assert lm.computed == 0


def test_scores_that_cannot_be_weighed_are_an_error_before_the_model_is_asked() -> None:
    lm = scripted()
    mixed = [DOCUMENTS[0], Passage("b", score=1.0, score_kind="rank")]
    for documents, message in (
        (mixed, "different kinds of score"),
        ([DOCUMENTS[0], Passage("b")], "different kinds of score"),
        ([Passage("b", score=1.0, score_kind="rank")] * 2, "pass weight_temperature"),
    ):
        with pytest.raises(UsageError, match=message):
            Replug(lm).generate(QUESTION, documents=documents)
        Replug(lm, weights="uniform").generate(QUESTION, documents=documents, sampling=Sampling(max_tokens=1))
    with pytest.raises(UsageError, match="not finite"):
        Replug(lm, scores=lambda query, passages: [math.nan] * len(passages)).generate(QUESTION, documents=DOCUMENTS)


def test_whole_answers_are_not_mixed_by_a_model_that_mixes_tokens() -> None:
    with pytest.raises(Unsupported, match="ensemble='answer'"):
        Replug(scripted(), ensemble="answer").generate(QUESTION, documents=DOCUMENTS)


def test_what_the_retriever_raises_is_what_the_caller_sees() -> None:
    class Broken(Shelf):
        def retrieve(self, query: str, k: int, exclude: frozenset[str] = frozenset()) -> Sequence[Passage]:
            raise OSError("the index is gone")

    with pytest.raises(OSError, match="the index is gone"):
        Replug(scripted(), retriever=Broken(())).generate(QUESTION)


# --- one meaning, every way of calling -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [scripted, tiny_llama], ids=["scripted", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_and_async_give_what_generate_gives(make: Any, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=8, seed=2)
    replug = Replug(make(), retriever=Shelf(DOCUMENTS), null_document=0.1, trace="full")
    whole = replug.generate(QUESTION, sampling=sampling)
    chunks = list(replug.stream(QUESTION, sampling=sampling))

    async def asynchronously() -> tuple[Generation, list[Any], Any]:
        streamed = [chunk async for chunk in replug.astream(QUESTION, sampling=sampling)]
        return (
            await replug.agenerate(QUESTION, sampling=sampling),
            streamed,
            await replug.ascore(QUESTION, "Bora"),
        )

    later, streamed, scored = asyncio.run(asynchronously())
    for other in (chunks[-1].final, streamed[-1].final, later):
        assert other is not None
        assert (other.text, ids_of(other), other.finish_reason) == (whole.text, ids_of(whole), whole.finish_reason)
        np.testing.assert_allclose([t.logprob for t in other.tokens], [t.logprob for t in whole.tokens], atol=1e-5)
        assert other.trace is not None
        assert other.trace.keys() == (whole.trace or {}).keys()
    for pieces in (chunks, streamed):
        assert "".join(chunk.text for chunk in pieces) == whole.text
        assert [t.token_id for chunk in pieces for t in chunk.tokens] == ids_of(whole)[
            : sum(len(c.tokens) for c in pieces)
        ]
    assert scored.logprob == pytest.approx(replug.score(QUESTION, "Bora").logprob, abs=1e-5)


def test_an_ensemble_goes_on_from_an_answer_begun() -> None:
    lm = ScriptedModel(lambda prompt: "Tinel" if prompt.endswith("Answer: Bora") else "Bora Tinel")
    replug = Replug(lm, trace="full")
    generation = replug.generate(QUESTION, documents=DOCUMENTS, answer_so_far="Bora", sampling=SHORT)
    assert generation.text == " Tinel"
    assert trace_of(generation)["documents"][0]["prompt"].endswith("Answer: Bora")


def test_an_ensemble_of_an_ensemble_is_refused_with_a_reason() -> None:
    with pytest.raises(Unsupported, match="full_distribution"):
        Replug(Replug(scripted())).generate(QUESTION, documents=DOCUMENTS)


def test_questions_asked_together_are_answered_as_if_asked_alone() -> None:
    from rlm_plugins.flows import ask, run, together
    from rlm_plugins.requests import Generate

    replug = Replug(scripted())
    questions = [Generate(q, DOCUMENTS, sampling=SHORT) for q in (QUESTION, "And who else?", QUESTION)]
    answers = run(together([ask(question) for question in questions]), replug)
    assert [answer.text for answer in answers] == [
        replug.generate(str(q.prompt), documents=DOCUMENTS, sampling=SHORT).text for q in questions
    ]
