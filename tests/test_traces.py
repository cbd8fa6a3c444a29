"""Traces read as hostile input. That every trace an ensemble makes fits is tested with the ensemble."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.requests import Sampling
from rlm_plugins.testing import ScriptedModel
from rlm_plugins.texts import Passage
from rlm_plugins.traces import MAX_BYTES, ReplugTrace, TracedDocument, TracedTokens, dump, load_trace


def example() -> dict[str, Any]:
    lm = ScriptedModel({"salt": "tin", "one": "tea"})
    documents = [Passage("one", id="a", score=0.5, score_kind="cosine"), Passage("salt")]
    generation = Replug(lm, trace="full", null_document=0.2, weights="uniform").generate(
        "q?", documents=documents, sampling=Sampling(max_tokens=3)
    )
    return json.loads(json.dumps(generation.trace))


EXAMPLE = example()


def test_a_trace_comes_back_as_it_was() -> None:
    trace = load_trace(EXAMPLE)
    assert json.loads(dump(trace)) == EXAMPLE
    assert load_trace(dump(trace)) == load_trace(dump(trace).encode()) == load_trace(MappingProxyType(EXAMPLE)) == trace
    assert trace.documents[2].null_document
    assert trace.tokens is not None
    assert trace.tokens.top[0][0][0] == trace.tokens.text[0]


def test_the_schema_knows_every_field_that_an_ensemble_writes() -> None:
    trace = load_trace(EXAMPLE)
    assert trace.model_extra == {}
    assert all(document.model_extra == {} for document in trace.documents)
    assert trace.tokens is not None
    assert trace.tokens.model_extra == {}


def test_every_field_of_the_contract_is_in_the_schema() -> None:
    assert ReplugTrace.model_fields.keys() == {
        *("version", "query", "answer", "model", "ensemble", "method", "exact", "ties", "robust_radius", "documents"),
        *("tokens", "calls", "requests", "prompt_tokens", "completion_tokens"),
    }
    assert TracedDocument.model_fields.keys() == {
        *("id", "title", "text", "prompt", "score", "score_kind", "weight", "posterior_weight", "null_document"),
    }
    assert TracedTokens.model_fields.keys() == {
        *("text", "logprob", "certified", "responsibilities", "decided_by", "changed_without", "top"),
    }


def test_fields_of_a_later_version_are_kept() -> None:
    later = {**EXAMPLE, "uncached_prompt_tokens": 7}
    assert json.loads(dump(load_trace(later))) == later


def changed(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(trace: dict[str, Any]) -> None:
        place: Any = trace
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("version", to=2), "version"),
        (changed("version", to="1"), "version"),
        (changed("ties", to=-1), "ties"),
        (changed("ties", to=True), "ties"),
        (changed("calls", to="3"), "calls"),
        (changed("exact", to=1), "exact"),
        (changed("method", to="magic"), "method"),
        (changed("robust_radius", to=-1), "robust_radius"),
        (changed("answer", to=None), "answer"),
        (changed("answer", to="\ud800"), "half a character"),
        (changed("documents", to=[]), "documents"),
        (changed("documents", 0, "weight", to=0.9), "weight must sum to 1"),
        (changed("documents", 0, "weight", to=-0.5), "documents.0.weight"),
        (changed("documents", 0, "posterior_weight", to=0.9999), "posterior_weight must sum to 1"),
        (changed("documents", 1, "score_kind", to="vibes"), "documents.1.score_kind"),
        (changed("tokens", "logprob", to=[]), "tokens.logprob must have one entry a token"),
        (changed("tokens", "certified", 0, to="yes"), "tokens.certified.0"),
        (changed("tokens", "responsibilities", 0, to=[1.0]), "one share for each of the 3 documents"),
        (changed("tokens", "decided_by", 0, to=3), "beyond the 3"),
        (changed("tokens", "changed_without", 0, to=[7]), "beyond the 3"),
        (changed("tokens", "top", 0, to=[["a", 0.0, 1]]), "tokens.top.0"),
        (changed("documents", 0, to={"id": "a"}), "documents.0.weight"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_place_named(change: Any, message: str) -> None:
    trace = copy.deepcopy(EXAMPLE)
    change(trace)
    with pytest.raises(UsageError, match=message):
        load_trace(trace)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "source",
    [
        "",
        "no json",
        "[]",
        "null",
        "3",
        b"\xff\xfe",
        '{"version": NaN}',
        '{"version": 1e999}',
        '{"version": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"version": 1, "x": ' + "[" * 500 + "]" * 500 + "}",
        {"version": object()},
        {"version": float("nan")},
        {**EXAMPLE, "extra": nested(40)},
        {**EXAMPLE, "extra": nested(5000)},
    ],
    ids=lambda source: repr(source)[:20] if isinstance(source, str | bytes) else "mapping",
)
def test_anything_else_is_a_usage_error(source: Any) -> None:
    with pytest.raises(UsageError, match="trace"):
        load_trace(source)


def test_a_trace_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = dict(EXAMPLE)
    loop["loop"] = loop
    with pytest.raises(UsageError, match="Circular"):
        load_trace(loop)


def test_a_trace_too_long_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(UsageError, match=f"at most {MAX_BYTES} bytes"):
        load_trace("[" * (MAX_BYTES + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*EXAMPLE, "id", "text"]), inner),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(EXAMPLE)), json_values)
def test_any_value_in_any_field_loads_or_is_a_usage_error(field: str, value: Any) -> None:
    try:
        trace = load_trace({**EXAMPLE, field: value})
    except UsageError:
        return
    assert load_trace(dump(trace)) == trace
