"""The arithmetic of mixtures against naive float64 references and brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlm_plugins.errors import UsageError
from rlm_plugins.mixtures import (
    geometric_mixture,
    leave_one_out_choices,
    log_softmax,
    log_weights,
    mixture,
    mixture_bounds,
    nucleus,
    poisoning_radius,
    posterior_log_weights,
    responsibilities,
    temper,
    unlisted_bound,
)

Rows = NDArray[np.float64]
INF = math.inf
modest = settings(max_examples=60, deadline=None)


@st.composite
def ensembles(draw: st.DrawFn, max_k: int = 5, max_v: int = 7, concentration: float = 0.5) -> tuple[Rows, Rows]:
    """Weights [k] and rows of probabilities [k, V], from peaked to flat."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, v = draw(st.integers(1, max_k)), draw(st.integers(2, max_v))
    sharp = draw(st.sampled_from([0.05, concentration, 5.0]))
    return rng.dirichlet(np.full(k, sharp + 0.5)), rng.dirichlet(np.full(v, sharp), size=k)


def logs(values: Any) -> Rows:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


# --- mixing ----------------------------------------------------------------------------------------------------------


@modest
@given(ensembles())
def test_the_mixture_is_the_weighted_sum_of_probabilities_and_sums_to_1(case: tuple[Rows, Rows]) -> None:
    weights, rows = case
    mixed = mixture(logs(weights), logs(rows))
    assert np.exp(mixed).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.exp(mixed), weights @ rows, rtol=1e-12, atol=1e-300)


@modest
@given(ensembles())
def test_the_mixture_in_float32_is_within_1e_5_nats_and_stays_float32(case: tuple[Rows, Rows]) -> None:
    weights, rows = case
    rows32 = logs(rows).astype(np.float32)
    mixed = mixture(logs(weights), rows32)
    assert mixed.dtype == np.float32
    exact = mixture(logs(weights), rows32.astype(np.float64))
    np.testing.assert_allclose(mixed[exact > -80], exact[exact > -80], atol=1e-5)


@modest
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), st.floats(-2000, 2000))
def test_log_softmax_is_normalised_and_ignores_a_shift(values: list[float], shift: float) -> None:
    found = log_softmax(values)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(log_softmax(np.asarray(values) + shift), found, atol=1e-8)


def test_log_softmax_takes_whole_numbers_and_halves_to_float64_and_keeps_float32() -> None:
    assert log_softmax([1, 2]).dtype == np.float64
    assert log_softmax(np.zeros(2, np.float16)).dtype == np.float64
    assert log_softmax(np.zeros(2, np.float32)).dtype == np.float32


def test_far_below_what_a_float_can_hold_the_mixture_is_still_exact() -> None:
    rows = np.array([[-1000.0, -1001.0], [-1002.0, -999.0]])
    mixed = mixture(logs([0.5, 0.5]), rows)
    np.testing.assert_allclose(
        mixed, rows.max(0) + np.log1p(np.exp(-np.abs(rows[0] - rows[1]))) - np.log(2), rtol=1e-12
    )


def test_impossible_tokens_stay_impossible_without_a_warning() -> None:
    mixed = mixture(logs([0.25, 0.75]), logs([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(mixed, [np.log(0.25), np.log(0.75), -INF])


def test_a_document_of_weight_0_has_no_say() -> None:
    rows = logs([[0.9, 0.1], [0.0, 1.0]])
    np.testing.assert_allclose(mixture(logs([1.0, 0.0]), rows), rows[0])
    np.testing.assert_allclose(geometric_mixture(logs([1.0, 0.0]), rows), rows[0])


@modest
@given(ensembles(), st.integers(0, 2**32 - 1))
def test_the_geometric_mixture_is_the_softmax_of_averaged_logits(case: tuple[Rows, Rows], seed: int) -> None:
    weights, rows = case
    logits = np.random.default_rng(seed).normal(scale=8, size=rows.shape)
    averaged = weights @ logits
    expected = np.exp(averaged - averaged.max()) / np.exp(averaged - averaged.max()).sum()
    np.testing.assert_allclose(np.exp(geometric_mixture(logs(weights), log_softmax(logits))), expected, rtol=1e-9)


def test_one_document_can_veto_in_the_geometric_mixture_and_all_tokens_vetoed_is_an_error() -> None:
    np.testing.assert_allclose(
        np.exp(geometric_mixture(logs([0.5, 0.5]), logs([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]))), [0, 1, 0]
    )
    with pytest.raises(UsageError, match="impossible under some document"):
        geometric_mixture(logs([0.5, 0.5]), logs([[1.0, 0.0], [0.0, 1.0]]))


# --- temperature and nucleus -----------------------------------------------------------------------------------------


@modest
@given(ensembles(), st.floats(0.05, 20))
def test_tempering_raises_probabilities_to_the_power_one_over_t(case: tuple[Rows, Rows], temperature: float) -> None:
    _, rows = case
    scaled = logs(rows) / temperature
    expected = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(temper(logs(rows), temperature)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-6, 1e30, 1e300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_temperatures_give_the_limits_and_no_nan(temperature: float, dtype: Any) -> None:
    rows = logs([[0.5, 0.3, 0.2, 0.0]]).astype(dtype)
    tempered = temper(rows, temperature)
    assert tempered.dtype == dtype
    limit = [1, 0, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 1 / 3, 0]
    np.testing.assert_allclose(np.exp(tempered[0]), limit, atol=1e-6)


@modest
@given(ensembles(max_k=1, max_v=12), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(case: tuple[Rows, Rows], top_p: float) -> None:
    row = case[1][0]
    kept = np.isfinite(nucleus(logs(row), top_p))
    order = sorted(range(len(row)), key=lambda token: -row[token])
    size = next(n for n in range(1, len(row) + 1) if sum(row[order[:n]]) >= top_p - 1e-12 or n == len(row))
    expected = set(order[:size]) if top_p < 1 else set(order)
    assert {int(token) for token in np.flatnonzero(kept)} == {token for token in expected if row[token] > 0}
    np.testing.assert_allclose(np.exp(nucleus(logs(row), top_p))[kept], row[kept] / row[kept].sum(), rtol=1e-9)


def test_the_nucleus_always_holds_the_best_token() -> None:
    assert np.exp(nucleus(logs([0.2, 0.5, 0.3]), 1e-9)).tolist() == [0, 1, 0]


# --- who decided -----------------------------------------------------------------------------------------------------


@modest
@given(ensembles())
def test_responsibilities_are_bayes_rule(case: tuple[Rows, Rows]) -> None:
    weights, rows = case
    token = int(rows[0].argmax())
    joint = weights * rows[:, token]
    np.testing.assert_allclose(
        responsibilities(logs(weights), logs(rows)[:, token]), joint / joint.sum(), rtol=1e-9, atol=1e-15
    )


@modest
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_posterior_conditionals_chain_to_the_sequence_mixture(k: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, steps = logs(rng.dirichlet(np.ones(k))), -rng.exponential(40, size=(length, k))
    current, total = weights, 0.0
    for step in steps:
        total += float(np.logaddexp.reduce(current + step))
        current = posterior_log_weights(current, step)
        assert np.exp(current).sum() == pytest.approx(1, abs=1e-9)
    assert total == pytest.approx(float(np.logaddexp.reduce(weights + steps.sum(axis=0))), rel=1e-10)


def test_what_no_document_can_have_written_leaves_the_weights() -> None:
    weights = logs([0.3, 0.7])
    assert posterior_log_weights(weights, np.array([-INF, -INF])).tolist() == weights.tolist()
    assert np.exp(posterior_log_weights(weights, np.array([-INF, -3.0]))).tolist() == [0, 1]


@modest
@given(ensembles(max_k=6))
def test_leave_one_out_is_the_argmax_of_the_mixture_of_the_others(case: tuple[Rows, Rows]) -> None:
    weights, rows = case
    found = leave_one_out_choices(logs(weights), logs(rows))
    for d in range(len(weights)):
        others = [e for e in range(len(weights)) if e != d] or [d]
        mixed = weights[others] @ rows[others]
        assert mixed[found[d]] >= mixed.max() * (1 - 1e-9)


@pytest.mark.parametrize("gap", [0, 30, 400, 5000])
def test_leave_one_out_sees_the_others_however_heavy_one_document_is(gap: float) -> None:
    rows = logs([[0.9, 0.06, 0.04], [0.1, 0.2, 0.7], [0.1, 0.8, 0.1]])
    weights = log_softmax([0.0, -gap, -gap - 1])
    assert leave_one_out_choices(weights, rows).tolist()[0] == 2


def test_leave_one_out_with_no_weight_left_counts_the_others_alike() -> None:
    rows = logs([[0.9, 0.06, 0.04], [0.1, 0.2, 0.7], [0.1, 0.3, 0.6]])
    assert leave_one_out_choices(logs([1.0, 0.0, 0.0]), rows).tolist() == [2, 0, 0]
    assert leave_one_out_choices(logs([1.0]), rows[:1]).tolist() == [0]


# --- the poisoning radius --------------------------------------------------------------------------------------------


def survives(weights: Rows, rows: Rows, token: int, lost: tuple[int, ...]) -> bool:
    """Whether `token` stays strictly best when the documents `lost` put all their mass on the worst single token."""
    kept = [d for d in range(len(weights)) if d not in lost]
    base = weights[kept] @ rows[kept] if kept else np.zeros(rows.shape[1])
    for rival in range(rows.shape[1]):
        poisoned = base.copy()
        poisoned[rival] += weights[list(lost)].sum()
        others = np.delete(poisoned, token)
        if poisoned[token] <= others.max():
            return False
    return True


def brute_radius(weights: Rows, rows: Rows, token: int, replaceable: NDArray[np.bool_]) -> int:
    exposed = [d for d in range(len(weights)) if replaceable[d] and weights[d] > 0]
    radius = -1
    for m in range(len(exposed) + 1):
        if not all(survives(weights, rows, token, lost) for lost in itertools.combinations(exposed, m)):
            break
        radius = m
    return radius


@settings(max_examples=120, deadline=None)
@given(ensembles(max_k=6, max_v=5), st.integers(0, 63), st.booleans())
def test_the_radius_is_what_brute_force_finds(case: tuple[Rows, Rows], mask: int, agree: bool) -> None:
    weights, rows = case
    if agree:  # make the documents agree, so that radii above 0 occur
        rows = 0.2 * rows + 0.8 * np.eye(rows.shape[1])[0]
    replaceable = np.array([bool(mask >> d & 1) for d in range(len(weights))])
    token = int((weights @ rows).argmax())
    found = poisoning_radius(logs(weights), logs(rows), token, replaceable=replaceable)
    assert found == brute_radius(weights, rows, token, replaceable)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from([65, 80, 150]), st.booleans(), st.booleans())
def test_the_radius_is_exact_beyond_the_tokens_looked_at_first(
    seed: int, k: int, size: int, null: bool, flat: bool
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(k, 3.0))
    rows = rng.dirichlet(np.full(size, 0.3 if flat else 0.02), size=k)
    rows = 0.5 * rows + 0.5 * np.eye(size)[3] * rng.uniform(0, 1, size=(k, 1))
    rows /= rows.sum(axis=1, keepdims=True)
    token = int((weights @ rows).argmax())
    replaceable = np.array([True] * (k - 1) + [not null])
    found = poisoning_radius(logs(weights), logs(rows), token, replaceable=replaceable)
    assert found == brute_radius(weights, rows, token, replaceable)


def test_the_radius_sees_the_rival_that_is_nowhere_among_the_most_probable() -> None:
    """The worst token is one to which the replaced document gave the least, not one that was nearly chosen: here, one
    of those that no document gives anything."""
    rows = np.full((3, 100), 0.0)
    rows[:, 0] = 0.70
    rows[:, 1:70] = 0.30 / 69
    weights = np.array([0.40, 0.35, 0.25])
    replaceable = np.ones(3, dtype=bool)
    for heavy in (0.70, 0.50, 0.42):
        rows[:, 0], rows[:, 1:70] = heavy, (1 - heavy) / 69
        found = poisoning_radius(logs(weights), logs(rows), 0, replaceable=replaceable)
        assert found == brute_radius(weights, rows, 0, replaceable)


def test_ten_uniform_documents_that_agree_withstand_four_and_no_more() -> None:
    rows = logs(np.tile([1.0, 0.0, 0.0], (10, 1)))
    weights = logs(np.full(10, 0.1))
    assert poisoning_radius(weights, rows, 0) == 4
    assert poisoning_radius(weights, rows, 1) == -1
    assert poisoning_radius(weights, logs(np.tile([0.5, 0.5, 0.0], (10, 1))), 0) == -1


# --- bounds ----------------------------------------------------------------------------------------------------------


@modest
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(0, 8), st.sampled_from([0.1, 1.0, 10.0]))
def test_no_unlisted_token_ever_exceeds_its_bound(seed: int, size: int, listed: int, sharp: float) -> None:
    full = np.sort(np.random.default_rng(seed).dirichlet(np.full(size, sharp)))[::-1]
    listed = min(listed, size - 1)
    assert full[listed:].max() <= unlisted_bound(full[:listed]) + 1e-12
    shuffled = np.random.default_rng(seed + 1).permutation(full)
    assert shuffled[listed:].max() <= unlisted_bound(shuffled[:listed], ordered=False) + 1e-12


def test_a_sampled_token_of_low_rank_breaks_the_order_but_keeps_its_mass() -> None:
    full = [0.5, 0.3, 0.15, 0.05]  # the top 2 and a sampled token of rank 4 are listed; .15 is not
    assert unlisted_bound([0.5, 0.3, 0.05]) < 0.15, "taking it for the third best would be a false certificate"
    honest = min(unlisted_bound(full[:2]), unlisted_bound([0.5, 0.3, 0.05], ordered=False))
    assert honest == pytest.approx(0.15)


def test_a_list_that_lost_entries_bounds_by_what_is_left_alone() -> None:
    assert unlisted_bound([0.5, 0.1], ordered=False) == pytest.approx(0.4)
    assert unlisted_bound([], ordered=True) == 1.0
    assert unlisted_bound([0.7, 0.4]) == 0.0  # rounded values may sum to more than 1: nothing is left, not less


@modest
@given(ensembles(max_k=4, max_v=9), st.integers(1, 4), st.booleans())
def test_mixture_bounds_hold_for_every_token(case: tuple[Rows, Rows], listed: int, ordered: bool) -> None:
    weights, rows = case
    listed = min(listed, rows.shape[1])
    rng = np.random.default_rng(listed)
    shown = [[int(v) for v in (np.argsort(-row) if ordered else rng.permutation(len(row)))[:listed]] for row in rows]
    lists = [{v: float(row[v]) for v in tokens} for row, tokens in zip(rows, shown, strict=True)]
    caps = [unlisted_bound(list(one.values()), ordered=ordered) for one in lists]
    bounds, rest = mixture_bounds(weights, lists, caps)
    assert set(bounds) == {v for tokens in shown for v in tokens}
    for token, probability in enumerate(weights @ rows):
        lower, upper = bounds.get(token, (0.0, rest))
        assert lower - 1e-12 <= probability <= upper + 1e-12
    if listed == rows.shape[1]:
        assert all(upper - lower < 1e-12 for lower, upper in bounds.values())


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [[], [0.5, 0.6], [0.5, 0.4], [-0.5, 1.5], [math.nan, 1.0], [INF, 0.0], [[0.5, 0.5]], 1.0, [0.0, 0.0]]
)
def test_what_is_no_distribution_is_refused_as_weights(weights: Any) -> None:
    with pytest.raises(UsageError, match="document weights must"):
        log_weights(weights)


def test_weights_of_0_are_minus_infinity() -> None:
    assert log_weights([1.0, 0.0]).tolist() == [0.0, -INF]
