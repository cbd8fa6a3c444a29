from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlm_plugins.errors import RetrievalError, UsageError
from rlm_plugins.flows import ask, run
from rlm_plugins.models import Embedder
from rlm_plugins.requests import Retrieve
from rlm_plugins.retrieval import DenseRetriever, content_id
from rlm_plugins.texts import Passage

WORDS = ["otter", "river", "stone", "moss", "heron", "reed", "trout", "willow", "frost", "ember"]
PASSAGES = [Passage(f"{a} {b}", id=f"{a}-{b}", title=a) for a in WORDS for b in WORDS if a != b]


class Given(Embedder):
    """Returns given vectors, by text."""

    def __init__(self, vectors: dict[str, Any]) -> None:
        self.vectors = vectors

    @property
    def fingerprint(self) -> str:
        return "given"

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return np.asarray(self.vectors[text], dtype=np.float32)

    def embed_documents(self, texts: Any) -> NDArray[np.float32]:
        return np.asarray([self.vectors[text] for text in texts], dtype=np.float32)


def test_finds_the_nearest_first_with_its_cosine(embedder: Any) -> None:
    retriever = DenseRetriever.from_passages(PASSAGES, embedder)
    found = retriever.retrieve("otter river", 3)
    assert [passage.id for passage in found[:2]] == ["otter-river", "river-otter"]
    assert found[0].score == pytest.approx(1.0, abs=1e-6)
    assert {passage.score_kind for passage in found} == {"cosine"}
    assert found[0].title == "otter"


def test_run_and_arun_agree_and_async_embeds_asynchronously(embedder: Any) -> None:
    retriever = DenseRetriever.from_passages(PASSAGES, embedder)
    request = Retrieve("heron on a stone", 7, frozenset({"heron-stone"}))
    assert embedder.asynchronous == 0
    found = asyncio.run(retriever.aretrieve(request.query, request.k, request.exclude))
    assert embedder.asynchronous == 1
    assert found == retriever.retrieve(request.query, request.k, request.exclude) == run(ask(request), retriever)


def test_adding_on_an_event_loop_is_the_same(embedder: Any) -> None:
    one = DenseRetriever.from_passages(PASSAGES, embedder, batch_size=7)
    other = DenseRetriever(embedder, batch_size=64)
    asyncio.run(other.aadd(PASSAGES[:50]))
    asyncio.run(other.aadd(PASSAGES[50:]))
    assert one.retrieve("moss", 20) == other.retrieve("moss", 20)
    assert len(one) == len(other) == len(PASSAGES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 12),
    k=st.integers(1, 15),
    seed=st.integers(0, 10_000),
    metric=st.sampled_from(["cosine", "inner_product"]),
    kind=st.sampled_from([None, "Flat", "IVF1,Flat"]),
    data=st.data(),
)
def test_equals_brute_force(count: int, k: int, seed: int, metric: Any, kind: str | None, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    vectors = {f"text {row}": rng.integers(-3, 4, size=4) + 0.5 for row in range(count)}
    vectors["query"] = rng.integers(-3, 4, size=4) + 0.25
    names = [f"p{row}" for row in range(count)]
    exclude = frozenset(data.draw(st.sets(st.sampled_from([*names, "unknown"]))))
    index = None if kind is None else faiss.index_factory(4, kind, faiss.METRIC_INNER_PRODUCT)
    if kind == "IVF1,Flat":
        index.cp.min_points_per_centroid = 1
    passages = [Passage(f"text {row}", id=name) for row, name in enumerate(names)]
    retriever = DenseRetriever.from_passages(passages, Given(vectors), metric=metric, index=index)

    scale = {text: np.linalg.norm(vector) if metric == "cosine" else 1.0 for text, vector in vectors.items()}
    expected = {
        passage.id: float(vectors[passage.text] @ vectors["query"] / scale[passage.text] / scale["query"])
        for passage in passages
        if passage.id not in exclude
    }
    found = retriever.retrieve("query", k, exclude)
    assert len(found) == min(k, len(expected))
    assert len({passage.id for passage in found}) == len(found)
    best = sorted(expected.values(), reverse=True)[:k]
    assert [passage.score for passage in found] == pytest.approx(best, abs=1e-5)
    assert all(passage.score == pytest.approx(expected[passage.id], abs=1e-5) for passage in found)


def test_equal_scores_keep_the_order_they_were_added(embedder: Any) -> None:
    passages = [Passage("otter", id=name) for name in "edcba"]
    found = DenseRetriever.from_passages(passages, embedder).retrieve("otter", 5)
    assert [passage.id for passage in found] == list("edcba")


def test_an_empty_corpus_finds_nothing_and_asks_for_nothing(embedder: Any) -> None:
    retriever = DenseRetriever.from_passages([], embedder)
    assert retriever.retrieve("otter", 3) == ()
    assert not embedder.queries


def test_everything_excluded_finds_nothing(embedder: Any) -> None:
    retriever = DenseRetriever.from_passages(PASSAGES[:2], embedder)
    assert retriever.retrieve("otter", 3, frozenset(str(passage.id) for passage in PASSAGES)) == ()


def test_passages_without_an_id_are_named_by_their_content(embedder: Any) -> None:
    [found] = DenseRetriever.from_passages([Passage("otter")], embedder).retrieve("otter", 1)
    assert found.id == content_id(Passage("otter"))
    assert content_id(Passage("otter")) != content_id(Passage("otter", title="otter"))


def test_the_callers_passages_and_index_are_left_alone(embedder: Any) -> None:
    metadata = {"page": 1}
    passage = Passage("otter", metadata=metadata)
    index = faiss.IndexFlatIP(32)
    DenseRetriever.from_passages([passage], embedder, index=index).retrieve("otter", 1)
    assert (passage.id, passage.score, metadata, index.ntotal) == (None, None, {"page": 1}, 0)


@pytest.mark.parametrize(
    "passages",
    [[Passage("a", id="1"), Passage("b", id="1")], [Passage("a"), Passage("a")], [Passage("new"), Passage("old")]],
)
def test_repeated_ids_are_refused_and_nothing_is_added(embedder: Any, passages: list[Passage]) -> None:
    retriever = DenseRetriever.from_passages([Passage("old")], embedder)
    with pytest.raises(UsageError, match="occurs twice"):
        retriever.add(passages)
    assert len(retriever) == 1
    assert embedder.documents == ["old"], "refused before anything was embedded"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([np.nan, 1.0], "NaN or infinity for 1 of 1 texts, the first 'bad'"),
        ([np.inf, 1.0], "NaN or infinity"),
        ([0.0, 0.0], "zero vector for 1 of 1 texts, the first 'bad'"),
        ([1.0, 0.0, 0.0], "returned vectors of 3 dimensions, expected 2"),
    ],
)
def test_unusable_vectors_are_refused(bad: list[float], message: str) -> None:
    retriever = DenseRetriever.from_passages([Passage("good")], Given({"good": [1.0, 0.0], "bad": bad}))
    with pytest.raises(RetrievalError, match=message):
        retriever.retrieve("bad", 1)
    with pytest.raises(RetrievalError, match=message):
        retriever.add([Passage("bad")])
    assert len(retriever) == 1


def test_a_wrong_number_of_vectors_is_refused() -> None:
    class Short(Given):
        def embed_documents(self, texts: Any) -> NDArray[np.float32]:
            return super().embed_documents(texts[:1])

    with pytest.raises(RetrievalError, match=r"given 2 texts and returned an array of shape \(1, 2\)"):
        DenseRetriever.from_passages([Passage("a"), Passage("b")], Short({"a": [1, 0], "b": [0, 1]}))


def test_inner_products_may_be_zero_but_not_nan() -> None:
    retriever = DenseRetriever.from_passages([Passage("a")], Given({"a": [0, 0], "q": [3, 4]}), metric="inner_product")
    [found] = retriever.retrieve("q", 1)
    assert (found.score, found.score_kind) == (0.0, "inner_product")


def test_wrong_arguments_are_refused(embedder: Any) -> None:
    with pytest.raises(UsageError, match="metric must be"):
        DenseRetriever(embedder, metric="l2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="batch_size"):
        DenseRetriever(embedder, batch_size=0)
    with pytest.raises(UsageError, match="k must be at least 1"):
        DenseRetriever(embedder).retrieve("q", 0)
    with pytest.raises(UsageError, match="inner products"):
        DenseRetriever(embedder, index=faiss.IndexFlatL2(32))
    with pytest.raises(UsageError, match="must be a faiss index"):
        DenseRetriever(embedder, index=3)
    full = faiss.IndexFlatIP(32)
    full.add(np.ones((1, 32), dtype=np.float32))
    with pytest.raises(UsageError, match="must be empty"):
        DenseRetriever(embedder, index=full)


def test_an_index_that_refuses_vectors_is_told(embedder: Any) -> None:
    index = faiss.index_factory(32, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(UsageError, match=r"IndexIDMap.* refuses 2 vectors"):
        DenseRetriever.from_passages(PASSAGES[:2], embedder, index=index)


def test_searching_while_passages_are_added(embedder: Any) -> None:
    retriever = DenseRetriever.from_passages(PASSAGES[:1], embedder)
    errors: list[Exception] = []

    def search() -> None:
        try:
            for _ in range(30):
                found = retriever.retrieve("otter river", 5, frozenset({"otter-stone"}))
                assert found[0].id == "otter-river"
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for passage in PASSAGES[1:]:
        retriever.add([passage])
    for thread in threads:
        thread.join()
    assert not errors
    assert len(retriever) == len(PASSAGES)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, embedder: Any) -> Path:
    DenseRetriever.from_passages(PASSAGES, embedder).save(tmp_path / "there" / "index")
    return tmp_path / "there" / "index"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, embedder: Any, metric: Any) -> None:
    passages = [
        Passage(
            "Otter \u2028 naïve\r\n\ud800", id="1", title="Ünïcode", metadata={"page": 1, "deep": {"list": [None]}}
        ),
        Passage("river", score=0.3, score_kind="logit"),
    ]
    before = DenseRetriever.from_passages(passages, embedder, metric=metric)
    before.save(tmp_path)
    embedder.documents.clear()
    after = DenseRetriever.load(tmp_path, embedder)
    assert after.metric == metric
    assert before.retrieve("otter", 5) == after.retrieve("otter", 5)
    assert [passage.metadata for passage in after.passages] == [passage.metadata for passage in passages]
    assert not embedder.documents
    after.add([Passage("stone")])
    assert len(after) == 3


def test_an_empty_retriever_can_be_saved(tmp_path: Path, embedder: Any) -> None:
    DenseRetriever(embedder).save(tmp_path)
    retriever = DenseRetriever.load(tmp_path, embedder)
    assert retriever.retrieve("otter", 1) == ()
    retriever.add(PASSAGES[:3])
    assert len(retriever.retrieve("otter", 9)) == 3


def test_saving_again_replaces_and_leaves_strangers_alone(saved: Path, embedder: Any) -> None:
    (saved / "notes.txt").write_text("mine")
    DenseRetriever.from_passages(PASSAGES[:5], embedder).save(saved)
    assert len(DenseRetriever.load(saved, embedder)) == 5
    assert (saved / "notes.txt").read_text() == "mine"
    assert len(list(saved.iterdir())) == 4


def test_an_interrupted_save_leaves_the_old_retriever(
    saved: Path, embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlm_plugins.retrieval.saved as module

    real, puts = module._put, 0  # pyright: ignore[reportPrivateUsage]

    def put(path: Path, data: bytes) -> None:
        nonlocal puts
        puts += 1
        if puts == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(module, "_put", put)
    with pytest.raises(KeyboardInterrupt):
        DenseRetriever.from_passages(PASSAGES[:5], embedder).save(saved)
    assert len(DenseRetriever.load(saved, embedder)) == len(PASSAGES)


def test_another_embedder_is_refused(saved: Path, make_embedder: Any) -> None:
    with pytest.raises(UsageError, match="made with the embedder 'hashing-32', got 'other'"):
        DenseRetriever.load(saved, make_embedder(name="other"))


def test_metadata_that_is_not_json_is_refused(tmp_path: Path, embedder: Any) -> None:
    retriever = DenseRetriever.from_passages([Passage("otter", id="a", metadata={"x": {1, 2}})], embedder)
    with pytest.raises(UsageError, match="metadata of the passage 'a' cannot be saved as JSON"):
        retriever.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, embedder: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot save"):
        DenseRetriever(embedder).save(tmp_path / "file")


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_folder_without_a_retriever_is_refused(tmp_path: Path, embedder: Any, folder: str) -> None:
    with pytest.raises(UsageError, match="holds no saved retriever"):
        DenseRetriever.load(tmp_path / folder, embedder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format of version 2, this library reads 1"),
        ({"version": "1"}, "not the manifest"),
        ({"metric": "l2"}, "not the manifest"),
        ({"extra": 1}, "not the manifest"),
        ({"count": 3}, "has 90 passages, the manifest says 3"),
        ({"dimension": 31}, "its index has"),
        ({"dimension": 0}, "its index has"),
        ({"index_sha256": None}, "passages without an index"),
        ({"index_sha256": "../../etc/passwd"}, "not the manifest"),
        ({"passages_sha256": "0" * 64}, "cannot be read"),
    ],
)
def test_a_changed_manifest_is_refused(saved: Path, embedder: Any, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(UsageError, match=message):
        DenseRetriever.load(saved, embedder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(saved: Path, embedder: Any, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match="is damaged"):
        DenseRetriever.load(saved, embedder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["index", "passages"]), place=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_any_flipped_byte_is_noticed(saved: Path, embedder: Any, kind: str, place: float, flip: int) -> None:
    [path] = saved.glob(f"{kind}-*")
    data = path.read_bytes()
    broken = bytearray(data)
    broken[int(place * len(data))] ^= flip
    path.write_bytes(broken)
    with pytest.raises(UsageError, match="not what was saved"):
        DenseRetriever.load(saved, embedder)
    path.write_bytes(data)


def replaced(folder: Path, kind: str, data: bytes) -> None:
    """What an attacker would write: a data file of his own, with a manifest that agrees."""
    import hashlib

    sha = hashlib.sha256(data).hexdigest()
    suffix = "faiss" if kind == "index" else "jsonl"
    (folder / f"{kind}-{sha[:16]}.{suffix}").write_bytes(data)
    edit(folder, **{f"{kind}_sha256": sha})


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"",
        b'{"id": null, "text": "a", "title": null, "metadata": {}}',
        b'{"id": "a", "text": 3, "title": null, "metadata": {}}',
        b'{"id": "a", "text": "a"}',
        b'{"id": "a", "text": "a", "title": null, "metadata": {}, "score": 1}',
        b"\x80\x04K\x01.",
    ],
)
def test_hostile_passages_are_refused(saved: Path, embedder: Any, line: bytes) -> None:
    replaced(saved, "passages", line + b"\n" + line)
    with pytest.raises(UsageError, match="line 1 is not a passage"):
        DenseRetriever.load(saved, embedder)


def test_repeated_ids_in_a_file_are_refused(saved: Path, embedder: Any) -> None:
    [path] = saved.glob("passages-*")
    first = path.read_bytes().splitlines(keepends=True)[0]
    replaced(saved, "passages", first * len(PASSAGES))
    with pytest.raises(UsageError, match="the same id"):
        DenseRetriever.load(saved, embedder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 44), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_a_hostile_exact_index_never_reaches_faiss(
    saved: Path, embedder: Any, place: int, value: int, cut: int
) -> None:
    [path] = saved.glob("index-*")
    before = (saved / "manifest.json").read_bytes()
    data = bytearray(path.read_bytes())
    data[place] = value
    if cut < 20:
        data = data[: len(data) - cut]
    replaced(saved, "index", bytes(data))
    with contextlib.suppress(UsageError):  # a byte that is not used, or the same byte, may pass
        assert len(DenseRetriever.load(saved, embedder)) == len(PASSAGES)
    for other in set(saved.glob("index-*")) - {path}:
        other.unlink()
    (saved / "manifest.json").write_bytes(before)


def test_nan_in_a_saved_index_is_refused(saved: Path, embedder: Any) -> None:
    [path] = saved.glob("index-*")
    replaced(saved, "index", path.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(UsageError, match="NaN"):
        DenseRetriever.load(saved, embedder)


def test_other_indices_are_read_only_when_trusted(tmp_path: Path, embedder: Any) -> None:
    index = faiss.index_factory(32, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.nprobe = 2
    before = DenseRetriever.from_passages(PASSAGES, embedder, index=index)
    before.save(tmp_path)
    with pytest.raises(UsageError, match="trust_index=True"):
        DenseRetriever.load(tmp_path, embedder)
    after = DenseRetriever.load(tmp_path, embedder, trust_index=True)
    exact = DenseRetriever.from_passages(PASSAGES, embedder)
    exclude = frozenset({"otter-river"})
    names = [passage.id for passage in after.retrieve("otter river", 5, exclude)]
    assert names == [passage.id for passage in before.retrieve("otter river", 5, exclude)]
    assert names == [passage.id for passage in exact.retrieve("otter river", 5, exclude)]
    replaced(tmp_path, "index", b"garbage that is no index")
    with pytest.raises(UsageError, match="faiss cannot read"):
        DenseRetriever.load(tmp_path, embedder, trust_index=True)


def test_importing_loads_no_faiss() -> None:
    code = "import sys, rlm_plugins.retrieval; assert not {'faiss', 'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
