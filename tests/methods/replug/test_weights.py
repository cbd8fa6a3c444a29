"""Document weights: a softmax of scores at the temperature of their kind."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.weights import TEMPERATURES, document_weights, passage_weights
from rlm_plugins.texts import Passage, ScoreKind

scores = st.lists(st.floats(-3, 3), min_size=1, max_size=10)
modest = settings(max_examples=50, deadline=None)


@modest
@given(scores, st.floats(0.05, 10))
def test_weights_are_the_softmax_of_scores_over_tau(values: list[float], tau: float) -> None:
    expected = np.exp(np.array(values) / tau - max(values) / tau)
    np.testing.assert_allclose(
        document_weights(values, "inner_product", temperature=tau), expected / expected.sum(), rtol=1e-10
    )


@modest
@given(scores, st.floats(-100, 100))
def test_weights_ignore_a_shift_of_all_scores_and_sum_to_1(values: list[float], shift: float) -> None:
    weights = document_weights(values, "logit")
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(document_weights([s + shift for s in values], "logit"), weights, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(ScoreKind))
def test_better_scores_weigh_more_whatever_the_kind(kind: ScoreKind) -> None:
    first, second = document_weights([1.0, 2.0], kind, temperature=1.0)
    if kind == "uniform":
        assert first == second
    else:
        assert (first > second) == (kind in ("distance", "rank"))


def test_the_default_tau_depends_on_the_kind_of_score() -> None:
    assert TEMPERATURES == {"cosine": 0.1, "logit": 1.0}
    ratio = document_weights([0.85, 0.75], "cosine")
    assert ratio[0] / ratio[1] == pytest.approx(math.e)
    paper = document_weights([0.85, 0.75], "cosine", temperature=1.0)
    assert paper[0] / paper[1] == pytest.approx(1.105, abs=1e-3)


@pytest.mark.parametrize("kind", sorted(set(get_args(ScoreKind)) - {"cosine", "logit", "uniform"}))
def test_kinds_without_a_scale_need_a_temperature_or_uniform_weights(kind: ScoreKind) -> None:
    with pytest.raises(UsageError, match="no natural scale: pass weight_temperature"):
        document_weights([1.0, 2.0], kind)
    assert document_weights([1.0, 2.0], kind, weights="uniform").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="must be finite"):
        document_weights([0.5, bad], "cosine")
    with pytest.raises(UsageError, match="must be finite"):
        Passage("text", score=bad, score_kind="cosine")


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_a_finite_number_above_0(tau: float) -> None:
    with pytest.raises(UsageError, match="weight_temperature must be"):
        document_weights([0.5, 0.4], "cosine", temperature=tau)


def test_no_documents_cannot_be_weighed() -> None:
    for call in (lambda: document_weights([], "cosine"), lambda: passage_weights([])):
        with pytest.raises(UsageError, match="no documents"):
            call()


@pytest.mark.parametrize(("values", "tau"), [([1e308, -1e308], 0.1), ([1.0, 0.0], 5e-324), ([3.0, 3.0], 1e-300)])
def test_extreme_scores_and_temperatures_give_the_limit(values: list[float], tau: float) -> None:
    expected = [0.5, 0.5] if values[0] == values[1] else [1.0, 0.0]
    assert document_weights(values, "logit", temperature=tau).tolist() == expected


def test_passages_without_scores_weigh_the_same() -> None:
    assert passage_weights([Passage("a"), Passage("b")], temperature=0.1).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "other", [Passage("b"), Passage("b", score=1.0, score_kind="rank")], ids=["unscored", "another kind"]
)
def test_mixed_kinds_of_score_are_refused_unless_the_weights_are_uniform_anyway(other: Passage) -> None:
    passages = [Passage("a", score=0.5, score_kind="cosine"), other]
    with pytest.raises(UsageError, match="different kinds of score"):
        passage_weights(passages)
    assert passage_weights(passages, weights="uniform").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("fields", [{"score": 0.5}, {"score_kind": "cosine"}])
def test_a_score_needs_its_kind(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs its kind"):
        Passage("a", **fields)
