"""REPLUG over an endpoint, token by token, against the same ensemble over the model behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")

from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
from rlm_plugins.errors import Unsupported
from rlm_plugins.loopback import LoopbackEndpoint, Quirks
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.methods.replug.naive import ListedMixture, ListedRows, _listed
from rlm_plugins.requests import Sampling
from rlm_plugins.testing import ByteTokenizer, RandomModel
from rlm_plugins.texts import Generation, Passage, TokenLogprob

LOCAL = RandomModel({"Who founded Velgar?\nAnswer:": " Bora Tinel"}, confidence=0.6)
DOCUMENTS = [
    Passage("Bora Tinel founded Velgar.", score=0.9, score_kind="cosine"),
    Passage("Quorin trades in tin.", score=0.8, score_kind="cosine"),
    Passage("The flag is red.", score=0.7, score_kind="cosine"),
]


def over_endpoint(question: str, quirks: Quirks | None = None, how: str = "run", **fields: Any) -> Any:
    with LoopbackEndpoint(LOCAL, quirks=quirks) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, tokenizer=ByteTokenizer(), max_retries=0)
        ensemble = Replug(lm, trace="full", **fields)
        asked = {"documents": DOCUMENTS, "sampling": Sampling(max_tokens=14)}
        if how == "arun":
            found = asyncio.run(ensemble.agenerate(question, **asked))
        elif how == "stream":
            chunks = list(ensemble.stream(question, **asked))
            found = chunks[-1].final
            assert "".join(chunk.text for chunk in chunks) == found.text  # type: ignore[union-attr]
        else:
            found = ensemble.generate(question, **asked)
        lm.close()
        return found


@pytest.mark.parametrize("how", ["run", "arun", "stream"])
def test_the_loop_over_an_endpoint_is_the_local_ensemble(how: str) -> None:
    expected = Replug(LOCAL, trace="full").generate(
        "Who founded Velgar?", documents=DOCUMENTS, sampling=Sampling(max_tokens=14)
    )
    found = over_endpoint("Who founded Velgar?", how=how)
    assert found.text == expected.text == "Bora Tinel"
    assert [token.token_id for token in found.tokens] == [token.token_id for token in expected.tokens]
    for one, other in zip(found.tokens, expected.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.02)  # what is not listed is left out
    trace = found.trace
    assert trace["method"] == "naive"
    assert trace["exact"] is True
    assert trace["tokens"]["certified"] == [True] * len(found.tokens)
    assert trace["calls"] == 3 * (len(found.tokens) + 1)
    assert trace["robust_radius"] is None
    assert sum(document["weight"] for document in trace["documents"]) == pytest.approx(1.0)


def test_what_few_alternatives_cannot_decide_is_said_to_be_uncertain() -> None:
    found = over_endpoint("What is this?", Quirks(most_alternatives=2, too_many="fewer"))
    assert found.trace["exact"] is False
    assert not all(found.trace["tokens"]["certified"])


def test_impossible_entries_certify_nothing() -> None:
    found = over_endpoint("Who founded Velgar?", Quirks(impossible=True))
    assert found.trace["tokens"]["certified"] == [False] * len(found.tokens)


def test_an_endpoint_that_does_not_name_ids_is_refused() -> None:
    with pytest.raises(Unsupported, match="token ids"):
        over_endpoint("Who founded Velgar?", Quirks(names_ids=False))


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [({"posterior": True}, Sampling()), ({"pool": "geometric"}, Sampling()), ({}, Sampling(temperature=1.0))],
)
def test_what_needs_whole_distributions_is_refused(fields: Any, sampling: Sampling) -> None:
    with LoopbackEndpoint(LOCAL) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, tokenizer=ByteTokenizer())
        with pytest.raises(Unsupported, match="full_distribution"):
            Replug(lm, **fields).generate("Who?", documents=DOCUMENTS, sampling=sampling)
        lm.close()


def test_a_score_over_an_endpoint_is_the_local_score() -> None:
    expected = Replug(LOCAL).score("Who founded Velgar?", "Bora Tinel", documents=DOCUMENTS)
    with LoopbackEndpoint(LOCAL) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, tokenizer=ByteTokenizer())
        found = Replug(lm).score("Who founded Velgar?", "Bora Tinel", documents=DOCUMENTS)
        lm.close()
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)


def test_certified_choices_are_those_of_whole_distributions() -> None:
    """Random mixtures cut to their top n: a certificate is never false."""
    rng = np.random.default_rng(0)
    certified = 0
    for _ in range(300):
        k, size, n = int(rng.integers(1, 5)), 30, int(rng.integers(1, 12))
        weights = rng.dirichlet(np.ones(k))
        whole = rng.dirichlet(np.full(size, 0.2), size=k)
        cut = np.full((k, size), -np.inf)
        caps: list[float] = []
        for d in range(k):
            best = np.argsort(-whole[d])[:n]
            top = tuple((str(v), float(np.log(whole[d][v]))) for v in best)
            token = TokenLogprob(top[0][0], top[0][1], int(best[0]), top, tuple(int(v) for v in best))
            listed, cap = _listed(Generation("x", (token,)), n, frozenset())
            cut[d][list(listed)] = list(listed.values())
            caps.append(max(cap, 1e-9))
        rows = ListedRows([], unlisted=np.array(caps))
        mixer = ListedMixture(np.log(weights), replaceable=np.ones(k, bool), greedy=False, rows=rows)
        mixed = mixer.mix(cut)
        chosen = int(mixed.argmax())
        mixer.chosen(chosen, cut, mixed)
        if mixer.certified[-1]:
            certified += 1
            assert chosen == int((weights @ whole).argmax())
    assert certified > 100
