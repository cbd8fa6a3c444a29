"""The token mixture over hand-made rows: likelihoods as RAG-Token and RAG-Sequence compute them, and its accounts."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.methods.replug.mixture import TokenMixture, mixture_logprobs
from rlm_plugins.mixtures import log_softmax

cases = st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(2, 7), st.integers(0, 2**32 - 1))


def made(case: tuple[int, int, int, int]) -> tuple[Any, Any, Any]:
    """Weights [k], rows of log-probabilities [n, k, V], a text [n]."""
    k, vocabulary, length, seed = case
    rng = np.random.default_rng(seed)
    weights = np.log(rng.dirichlet(np.ones(k)))
    rows = log_softmax(rng.normal(scale=4, size=(length, k, vocabulary)))
    return weights, rows, rng.integers(0, vocabulary, size=length)


def driven(mixer: TokenMixture, rows: Any, text: Any) -> list[float]:
    """What the mixer says of each token of a text, [n]."""
    said: list[float] = []
    for step, token in zip(rows, text, strict=True):
        mixed = mixer.mix(step)
        said.append(float(mixed[token]))
        mixer.chosen(int(token), step, mixed)
    return said


def mixture_of(weights: Any, **fields: Any) -> TokenMixture:
    return TokenMixture(weights, replaceable=np.ones(len(weights), dtype=bool), **fields)


@settings(max_examples=50, deadline=None)
@given(cases)
def test_likelihoods_are_those_of_rag_token_and_rag_sequence(case: tuple[int, int, int, int]) -> None:
    weights, rows, text = made(case)
    found = rows[np.arange(len(text)), :, text].T  # [k, n]
    token = mixture_logprobs(weights, found, posterior=False)
    sequence = mixture_logprobs(weights, found, posterior=True)
    assert token.sum() == pytest.approx(sum(np.log(np.exp(weights) @ np.exp(step)) for step in found.T), rel=1e-9)
    assert sequence.sum() == pytest.approx(np.log(np.exp(weights) @ np.exp(found.sum(axis=1))), rel=1e-9)
    for posterior, expected in ((False, token), (True, sequence)):
        np.testing.assert_allclose(driven(mixture_of(weights, posterior=posterior), rows, text), expected, rtol=1e-9)


def test_likelihoods_equal_what_the_rag_models_of_transformers_compute() -> None:
    torch = pytest.importorskip("torch")
    rag = pytest.importorskip("transformers.models.rag.modeling_rag")
    config = SimpleNamespace(n_docs=3, bos_token_id=0, generator=SimpleNamespace(pad_token_id=1, bos_token_id=0))
    rng = np.random.default_rng(5)
    length, vocabulary = 6, 11
    scores = rng.normal(size=3)
    text = rng.integers(2, vocabulary, size=length)  # neither BOS nor padding
    logits = rng.normal(scale=4, size=(3, length + 1, vocabulary))  # the last is for what follows: padding, not counted
    target = torch.tensor([[0, *text]])  # shifted left inside
    given = (torch.tensor(logits), torch.tensor(scores)[None], target)
    by_token = SimpleNamespace(config=config)
    by_token.marginalize = partial(rag.RagTokenForGeneration.marginalize, by_token)
    token = -rag.RagTokenForGeneration.get_nll(by_token, *given)
    sequence = -rag.RagSequenceForGeneration.get_nll(SimpleNamespace(config=config), *given)
    found = log_softmax(logits)[:, np.arange(length), text]
    weights = log_softmax(scores)
    assert mixture_logprobs(weights, found, posterior=False).sum() == pytest.approx(float(token), rel=1e-9)
    assert mixture_logprobs(weights, found, posterior=True).sum() == pytest.approx(float(sequence), rel=1e-9)
    assert abs(float(token) - float(sequence)) > 0.1, "the case does not tell the two apart"


@settings(max_examples=30, deadline=None)
@given(cases)
def test_the_weights_after_the_text_follow_how_well_each_document_foretold_it(case: tuple[int, int, int, int]) -> None:
    weights, rows, text = made(case)
    joint = weights + rows[np.arange(len(text)), :, text].sum(axis=0)
    expected = np.exp(joint - np.logaddexp.reduce(joint))
    for posterior in (False, True):
        mixer = mixture_of(weights, posterior=posterior)
        driven(mixer, rows, text)
        np.testing.assert_allclose(mixer.posterior_weights, expected, atol=1e-9)


def test_before_any_token_the_posterior_is_the_prior() -> None:
    np.testing.assert_allclose(mixture_of(np.log([0.3, 0.7])).posterior_weights, [0.3, 0.7])


def test_a_text_that_no_single_document_allows_has_the_prior_as_posterior_and_no_nan() -> None:
    with np.errstate(divide="ignore"):
        rows = np.log([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    mixer = mixture_of(np.log([0.6, 0.4]), greedy=False)
    driven(mixer, rows, [0, 1])
    np.testing.assert_allclose(mixer.posterior_weights, [0.6, 0.4])


def test_identical_rows_make_the_weights_irrelevant() -> None:
    row = log_softmax(np.random.default_rng(0).normal(size=9))
    for weights in ([0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        with np.errstate(divide="ignore"):
            logs = np.log(weights)
        for pool in ("probability", "geometric"):
            np.testing.assert_allclose(mixture_of(logs, pool=pool).mix(np.stack([row] * 3)), row, atol=1e-12)


def test_near_choices_are_counted_as_ties() -> None:
    rows = np.log([[[0.50, 0.49, 0.01]], [[0.9, 0.05, 0.05]], [[0.5, 0.5, 1e-9]]])
    weights = np.zeros(1)
    for margin, ties in ((0.0, 1), (0.1, 2), (9.0, 3)):
        mixer = mixture_of(weights, tie_margin=margin)
        driven(mixer, rows, [0, 0, 0])
        assert mixer.ties == ties
    sampled = mixture_of(weights, greedy=False)
    driven(sampled, rows, [0, 0, 0])
    assert (sampled.ties, sampled.radius) == (0, None)


def test_the_radius_of_a_text_is_that_of_its_weakest_token_and_never_below_0() -> None:
    sure = np.log(np.tile([1 - 2e-9, 1e-9, 1e-9], (5, 1)))
    shaky = np.log(np.tile([0.55, 0.44, 0.01], (5, 1)))
    tie = np.log(np.tile([0.5, 0.5, 1e-9], (5, 1)))
    weights = np.log(np.full(5, 0.2))
    radii: list[int | None] = []
    for rows in ([sure], [sure, shaky], [shaky, sure], [sure, tie]):
        mixer = mixture_of(weights)
        driven(mixer, rows, [0] * len(rows))
        radii.append(mixer.radius)
    assert radii == [2, 0, 0, 0]


@pytest.mark.parametrize("fields", [{"posterior": True}, {"pool": "geometric"}, {"greedy": False}])
def test_without_fixed_weights_greedy_choice_and_probabilities_there_is_no_radius(fields: dict[str, Any]) -> None:
    mixer = mixture_of(np.log([0.5, 0.5]), **fields)
    driven(mixer, [np.log([[0.9, 0.1], [0.9, 0.1]])], [0])
    assert mixer.radius is None
