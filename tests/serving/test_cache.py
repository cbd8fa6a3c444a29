"""The cache: nothing is asked twice, nothing is mistaken for something else, nothing secret is written."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlm_plugins.errors import ModelError, UsageError
from rlm_plugins.flows import Failed
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.prompts import CONTINUATION
from rlm_plugins.requests import Generate, GenerateIds, Sampling, Score
from rlm_plugins.serving import CachedModel, LimitedModel, RetryingModel
from rlm_plugins.testing import RandomModel
from rlm_plugins.texts import Generation, Passage, Usage

SHORT = Sampling(max_tokens=5)
BATCH = [
    Generate("Who founded Velgar?", sampling=SHORT, top_logprobs=3),
    Score("Who founded Velgar?", "Bora Tinel"),
    Generate("Who founded Velgar?", (Passage("Bora Tinel founded Velgar."),), sampling=SHORT),
    Generate("Who?", sampling=Sampling(max_tokens=5, temperature=1.0, seed=3)),
]


class Counting(RandomModel):
    """A model that counts what it is asked, and fails where it is told to."""

    def __init__(self, name: str = "random", **options: Any) -> None:
        super().__init__(**options)
        self.name = name
        self.asked = 0
        self.failing: set[str] = set()

    def answer(self, batch: Any) -> list[Any]:
        self.asked += len(batch)
        replies = super().answer(batch)
        failed = Failed(ModelError("down", retryable=True))
        return [
            failed if getattr(one, "prompt", None) in self.failing else reply
            for one, reply in zip(batch, replies, strict=True)
        ]

    async def aanswer(self, batch: Any) -> list[Any]:
        return self.answer(batch)


def answered(lm: CachedModel, batch: Any, how: str) -> list[Any]:
    return list(lm.answer(batch) if how == "run" else asyncio.run(lm.aanswer(batch)))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["run", "arun"])
def test_the_second_run_asks_nothing_and_gets_the_same(tmp_path: Path, how: str) -> None:
    inner = Counting()
    first = CachedModel(inner, tmp_path / "cache.sqlite")
    paid = answered(first, BATCH, how)
    first.close()
    assert inner.asked == len(BATCH)
    second = CachedModel(inner, tmp_path / "cache.sqlite")
    found = answered(second, BATCH, how)
    second.close()
    assert inner.asked == len(BATCH)
    assert (second.hits, second.misses) == (len(BATCH), 0)
    for one, other in zip(found, paid, strict=True):
        assert one.tokens == other.tokens
        assert one.usage == Usage()
        if isinstance(one, Generation):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)


def test_equal_requests_of_one_batch_are_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    lm = CachedModel(inner, tmp_path / "cache.sqlite")
    found = lm.answer([BATCH[0]] * 5)
    lm.close()
    assert inner.asked == 1
    assert len({generation.text for generation in found}) == 1
    assert sum((generation.usage for generation in found), Usage()).calls == 1


def test_errors_are_not_stored(tmp_path: Path) -> None:
    inner = Counting()
    inner.failing = {"Who?"}
    lm = CachedModel(inner, tmp_path / "cache.sqlite")
    batch = [Generate(prompt, sampling=SHORT) for prompt in ("Who?", "When?", "Where?")]
    first = lm.answer(batch)
    assert [isinstance(reply, Failed) for reply in first] == [True, False, False]
    inner.failing.clear()
    assert all(isinstance(reply, Generation) for reply in lm.answer(batch))
    lm.close()
    assert inner.asked == 4  # what was paid for was kept


def test_samples_are_drawn_anew_where_no_seed_says_which(tmp_path: Path) -> None:
    inner = Counting()
    lm = CachedModel(inner, tmp_path / "cache.sqlite")
    for _ in range(2):
        lm.answer([Generate("Who?", sampling=Sampling(max_tokens=5, temperature=1.0))])
    lm.close()
    assert inner.asked == 2


def test_minus_infinity_survives(tmp_path: Path) -> None:
    inner = Counting(follows={"Answer:": " x"}, confidence=1.0)
    lm = CachedModel(inner, tmp_path / "cache.sqlite")
    asked = Score("Who?", "y")
    first, again = lm.answer([asked])[0], lm.answer([asked])[0]
    lm.close()
    assert first.tokens == again.tokens
    assert math.isinf(first.logprob)


class Elsewhere(Counting):
    address = "http://127.0.0.1:1/v1"


def _elsewhere(address: str) -> Counting:
    lm = Elsewhere()
    lm.address = address  # type: ignore[misc]
    return lm


def _templated() -> Counting:
    lm = Counting()
    lm.template = CONTINUATION
    return lm


def test_keys_are_of_one_model_one_address_and_one_template(tmp_path: Path) -> None:
    models = [
        Counting(),
        Counting("other"),
        _templated(),
        _elsewhere("http://127.0.0.1:1/v1"),
        _elsewhere("http://127.0.0.1:2/v1"),
        Counting(context_window=512),
    ]
    for lm in models:
        cached = CachedModel(lm, tmp_path / "cache.sqlite")
        cached.answer(BATCH)
        cached.close()
        assert lm.asked == len(BATCH)
    marked = CachedModel(models[0], tmp_path / "cache.sqlite", fingerprint="another checkpoint")
    marked.answer(BATCH)
    marked.close()
    assert models[0].asked == 2 * len(BATCH)


@pytest.mark.parametrize(
    "other",
    [
        Generate("Who founded Velgar?", sampling=SHORT, top_logprobs=4),
        Generate("Who founded Velgar?", sampling=Sampling(max_tokens=6), top_logprobs=3),
        Generate("Who founded Velgar?", (), sampling=SHORT, top_logprobs=3),
        Generate("Who founded Velgar?", sampling=SHORT, top_logprobs=3, answer_so_far="B"),
        Generate(
            "Who founded Velgar?", (Passage("x", score=0.1, score_kind="cosine"),), sampling=SHORT, top_logprobs=3
        ),
        GenerateIds((256, 1), sampling=SHORT, top_logprobs=3),
        Score("Who founded Velgar?", "Bora Tinel", include_end=True),
    ],
)
def test_keys_hold_all_of_a_request(tmp_path: Path, other: Any) -> None:
    lm = CachedModel(Counting(), tmp_path / "cache.sqlite")
    lm.answer(BATCH)
    before = lm.misses
    lm.answer([other]) if not isinstance(other, GenerateIds) else lm._keys([other])
    assert lm.misses == before + (not isinstance(other, GenerateIds))
    lm.close()


def test_a_front_behind_the_cache_changes_no_key(tmp_path: Path) -> None:
    inner = Counting()
    for lm in (CachedModel(inner, tmp_path / "c"), CachedModel(RetryingModel(LimitedModel(inner)), tmp_path / "c")):
        lm.answer(BATCH[:2])
        lm.close()
    assert inner.asked == 2


def test_a_method_is_cached_below_not_above(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Replug\(CachedModel"):
        CachedModel(Replug(RandomModel()), tmp_path / "cache.sqlite")


_WORKER = """
import sys
from rlm_plugins.requests import Score
from rlm_plugins.serving import CachedModel
from rlm_plugins.testing import RandomModel
lm = CachedModel(RandomModel(), sys.argv[1])
for start in range(0, 60, 3):
    lm.answer([Score("Who?", f"text {n}") for n in range(start, start + 3)])
lm.close()
"""


def test_four_processes_at_once_lose_and_duplicate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    workers = [subprocess.Popen([sys.executable, "-c", _WORKER, str(path)]) for _ in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*), count(DISTINCT key) FROM answers").fetchone() == (60, 60)
    connection.close()
    inner = Counting()
    lm = CachedModel(inner, path)
    plain = RandomModel()
    for n in range(60):
        asked = Score("Who?", f"text {n}")
        assert lm.answer([asked])[0].tokens == plain.answer([asked])[0].tokens
    lm.close()


def test_no_key_reaches_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
    from rlm_plugins.loopback import LoopbackEndpoint

    canary = "sk-canary-0123456789"
    with LoopbackEndpoint(RandomModel()) as endpoint:
        inner = OpenAICompatibleLM("local", base_url=endpoint.base_url, api_key=canary, headers={"x-canary": canary})
        lm = CachedModel(inner, tmp_path / "cache.sqlite")
        lm.answer(BATCH)
        asked = len(endpoint.requests)
        lm.answer(BATCH)
        assert len(endpoint.requests) == asked
        assert canary not in repr(lm) + repr(vars(lm))
        lm.close()
        inner.close()
    for file in tmp_path.iterdir():
        assert canary.encode() not in file.read_bytes()
