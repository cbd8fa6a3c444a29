"""The embedded encoder: unit vectors, a stable fingerprint, the same numbers as sentence-transformers, and recall."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlm_plugins.errors import UsageError
from rlm_plugins.reader.static_encoder import ENCODER, StaticEncoder
from rlm_plugins.reader.world import World

TEXTS = [
    "Bora Tinel founded Velgar.",
    "Who founded Velgar?",
    "The price of tea in Köln, 東京 & elsewhere: 12.50 €",
    "x",
]


@pytest.fixture(scope="module")
def encoder() -> StaticEncoder:
    if not ENCODER.is_dir():
        pytest.skip("the embedded encoder is not in this checkout")
    return StaticEncoder()


def test_vectors_are_float32_of_unit_length(encoder: StaticEncoder) -> None:
    vectors = encoder.embed_documents(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.embed_query(TEXTS[1]), vectors[1], atol=1e-7)


def test_a_text_without_tokens_is_the_zero_vector(encoder: StaticEncoder) -> None:
    np.testing.assert_array_equal(encoder.embed_query(""), 0)
    assert encoder.embed_documents([]).shape == (0, encoder.dimension)


def test_a_vector_depends_on_its_text_alone(encoder: StaticEncoder) -> None:
    together = encoder.embed_documents(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.embed_documents([text])[0], together[row], atol=1e-7)


def test_it_equals_sentence_transformers(encoder: StaticEncoder) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(ENCODER), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), encoder.embed_documents(TEXTS), atol=1e-5)


def test_the_fingerprint_names_the_weights_and_the_tokenizer(encoder: StaticEncoder, tmp_path: Path) -> None:
    assert encoder.fingerprint == StaticEncoder(ENCODER).fingerprint
    copy = tmp_path / "encoder"
    shutil.copytree(ENCODER, copy)
    assert StaticEncoder(copy).fingerprint == encoder.fingerprint
    (tokenizer,) = copy.rglob("tokenizer.json")
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert StaticEncoder(copy).fingerprint != encoder.fingerprint


def test_it_finds_the_passage_that_holds_the_answer(encoder: StaticEncoder) -> None:
    world = World(99, split="held_out", entities=60)
    corpus = world.corpus(titled=0.0)
    vectors = encoder.embed_documents([passage.text for passage in corpus])
    rng = random.Random(0)
    hits = 0
    for _ in range(200):
        entity = rng.choice(world.entities)
        asked = rng.choice(list(entity.facts))
        best = corpus[int((vectors @ encoder.embed_query(world.question(entity, asked, rng))).argmax())]
        hits += best.metadata["entity"] == entity.id and asked in best.metadata["attributes"]
    assert hits >= 170


def test_the_folder_is_small(encoder: StaticEncoder) -> None:
    assert sum(file.stat().st_size for file in ENCODER.rglob("*") if file.is_file()) < 1_000_000


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder of sentence-transformers"):
        StaticEncoder(tmp_path)
