from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlm_plugins.errors import RetrievalError, UsageError
from rlm_plugins.flows import arun, run
from rlm_plugins.retrieval import (
    CachedEmbedder,
    ascore_by_embeddings,
    rescored,
    score_by_embeddings,
    score_by_rank,
    score_uniform,
    scored,
)
from rlm_plugins.texts import Passage

TEXTS = ["otter river", "river stone", "moss", "heron reed otter", "ember"]
PASSAGES = [Passage(text, id=str(row), score=99.0 - row, score_kind="distance") for row, text in enumerate(TEXTS)]


class Silent:
    """A handler that must not be asked."""

    def answer(self, batch: Any) -> Any:
        raise AssertionError(batch)

    async def aanswer(self, batch: Any) -> Any:
        raise AssertionError(batch)


def test_cosines_whatever_the_store_said(embedder: Any) -> None:
    found = score_by_embeddings("otter river", PASSAGES, embedder)
    query = embedder.embed_query("otter river").astype(float)
    for passage in found:
        document = embedder.embed_query(passage.text).astype(float)
        cosine = query @ document / np.linalg.norm(query) / np.linalg.norm(document)
        assert passage.score == pytest.approx(cosine, abs=1e-9)
        assert passage.score_kind == "cosine"
    assert [passage.score for passage in found] == sorted((p.score for p in found if p.score), reverse=True)
    assert found[0].text == "otter river"
    assert PASSAGES[0].score == 99.0, "the passages given are left alone"


def test_one_batch_and_equal_results_under_both_drivers(embedder: Any) -> None:
    flow = rescored("otter", PASSAGES)
    assert len(next(flow)) == 2, "query and documents are asked for at once"
    assert asyncio.run(arun(rescored("otter", PASSAGES), embedder)) == run(rescored("otter", PASSAGES), embedder)
    assert asyncio.run(ascore_by_embeddings("otter", PASSAGES, embedder)) == score_by_embeddings(
        "otter", PASSAGES, embedder
    )
    assert embedder.asynchronous == 4


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(PASSAGES))), size=st.integers(1, len(PASSAGES)))
def test_a_score_is_the_same_to_the_last_bit_in_any_company(embedder: Any, order: list[int], size: int) -> None:
    alone = {p.id: p.score for p in score_by_embeddings("otter stone", PASSAGES, embedder)}
    some = score_by_embeddings("otter stone", [PASSAGES[row] for row in order[:size]], embedder)
    assert {p.id: p.score for p in some}.items() <= alone.items()


def test_equal_scores_keep_the_order_given(embedder: Any) -> None:
    passages = [Passage("moss", id=name) for name in "dabc"]
    assert [p.id for p in score_by_embeddings("otter", passages, embedder)] == list("dabc")


@pytest.mark.parametrize("scores", ["embeddings", "rank", "uniform", lambda query, passages: 1 / 0])
def test_no_passages_cost_nothing(scores: Any) -> None:
    assert run(scored("q", [], scores), Silent()) == ()


def test_by_rank_and_uniform() -> None:
    ranked = run(scored("q", PASSAGES, "rank"), Silent())
    assert ranked == score_by_rank(PASSAGES)
    assert [(p.id, p.score, p.score_kind) for p in ranked] == [(str(row), row + 1.0, "rank") for row in range(5)]
    uniform = run(scored("q", PASSAGES, "uniform"), Silent())
    assert uniform == score_uniform(PASSAGES)
    assert {(p.score, p.score_kind) for p in uniform} == {(1.0, "uniform")}


def test_by_embeddings_is_the_default(embedder: Any) -> None:
    assert run(scored("otter", PASSAGES), embedder) == score_by_embeddings("otter", PASSAGES, embedder)


def test_a_function_says_larger_is_better_unless_told_otherwise() -> None:
    def own(query: str, passages: Sequence[Passage]) -> list[float]:
        assert query == "q"
        return [passage.score or 0.0 for passage in passages]

    logits = run(scored("q", PASSAGES, own), Silent())
    assert [(p.id, p.score_kind) for p in logits] == [(str(row), "logit") for row in range(5)]
    distances = run(scored("q", PASSAGES, own, kind="distance"), Silent())
    assert [(p.id, p.score_kind) for p in distances] == [(str(row), "distance") for row in reversed(range(5))]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda query, passages: [1.0], "given 5 passages and returned 1 scores"),
        (lambda query, passages: [float("nan")] * 5, "not finite"),
        (lambda query, passages: [None] * 5, "one number for each passage"),
        (lambda query, passages: None, "one number for each passage"),
        ("cosine", 'scores must be "embeddings", "rank", "uniform" or a function'),
        (None, "scores must be"),
    ],
)
def test_unusable_scores_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(scored("q", PASSAGES, scores), Silent())


def test_unusable_embeddings_are_refused(embedder: Any, make_embedder: Any) -> None:
    class Broken(make_embedder):
        def embed_query(self, text: str) -> NDArray[np.float32]:
            return super().embed_query(text)[:5]

    with pytest.raises(RetrievalError, match="zero vector for 1 of 2 texts, the first ''"):
        score_by_embeddings("otter", [Passage("river"), Passage("")], embedder)
    with pytest.raises(RetrievalError, match="zero vector for 1 of 1 texts"):
        score_by_embeddings("", [Passage("river")], embedder)
    with pytest.raises(RetrievalError, match="32 dimensions, expected 5"):
        score_by_embeddings("otter", PASSAGES, Broken())


# --- the cache -------------------------------------------------------------------------------------------------------


def test_no_document_is_embedded_twice(embedder: Any) -> None:
    cached = CachedEmbedder(embedder)
    first = score_by_embeddings("otter", PASSAGES, cached)
    again = asyncio.run(ascore_by_embeddings("otter", [*PASSAGES, Passage("new"), Passage("new")], cached))
    assert embedder.documents == [*TEXTS, "new"]
    assert embedder.queries == ["otter", "otter"]
    assert first == score_by_embeddings("otter", PASSAGES, embedder)
    assert set(first) < set(again)
    assert cached.fingerprint == embedder.fingerprint


def test_the_least_recently_used_go_first(embedder: Any) -> None:
    cached = CachedEmbedder(embedder, max_items=2)
    for texts in (["a"], ["b"], ["a"], ["c"], ["a"], ["b"]):
        cached.embed_documents(texts)
    assert embedder.documents == ["a", "b", "c", "b"]
    assert cached.embed_documents(["x", "y", "z"]).shape == (3, 32), "more at once than are kept"


def test_what_is_returned_can_be_changed_without_harm(embedder: Any) -> None:
    cached = CachedEmbedder(embedder)
    cached.embed_documents(["otter"])[:] = 0
    assert np.array_equal(cached.embed_documents(["otter"]), embedder.embed_documents(["otter"]))


def test_a_failure_is_not_remembered(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = CachedEmbedder(embedder)

    def fail(texts: Any) -> Any:
        raise TimeoutError

    with monkeypatch.context() as broken:
        broken.setattr(embedder, "embed_documents", fail)
        with pytest.raises(TimeoutError):
            cached.embed_documents(["otter"])
    assert cached.embed_documents(["otter"]).shape == (1, 32)


def test_no_documents_and_no_room(embedder: Any) -> None:
    assert CachedEmbedder(embedder).embed_documents([]).shape == (0, 32)
    with pytest.raises(UsageError, match="max_items"):
        CachedEmbedder(embedder, max_items=0)


def test_the_cache_in_several_threads(embedder: Any) -> None:
    cached = CachedEmbedder(embedder, max_items=3)
    expected = embedder.embed_documents(TEXTS)
    wrong: list[int] = []

    def embed(start: int) -> None:
        for step in range(100):
            rows = [(start + step + offset) % len(TEXTS) for offset in range(3)]
            if not np.array_equal(cached.embed_documents([TEXTS[row] for row in rows]), expected[rows]):
                wrong.append(step)

    threads = [threading.Thread(target=embed, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
