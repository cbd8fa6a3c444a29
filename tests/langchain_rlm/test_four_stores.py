"""Four stores with four notions of a score, one set of weights."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_rlm.from_langchain import LangChainEmbedder, LangChainRetriever, document_from_passage

from rlm_plugins.methods.replug.weights import document_weights
from rlm_plugins.models import Retriever
from rlm_plugins.retrieval import CachedEmbedder, DenseRetriever, scored
from rlm_plugins.retrieval.scores import ascore_by_embeddings, score_by_embeddings
from rlm_plugins.texts import Passage

QUERY = "where does the otter sleep"
PASSAGES = [
    Passage("the otter sleeps where the river is slow", id="00000000-0000-0000-0000-000000000001", title="Otter"),
    Passage("where moss grows the otter does not sleep", id="00000000-0000-0000-0000-000000000002"),
    Passage("the heron stands in the reeds", id="00000000-0000-0000-0000-000000000003"),
    Passage("trout sleep under the willow", id="00000000-0000-0000-0000-000000000004"),
    Passage("frost on the ember", id="00000000-0000-0000-0000-000000000005"),
    Passage("a stone does not sleep", id="00000000-0000-0000-0000-000000000006"),
]


class HashingEmbeddings(Embeddings):
    """Words hashed into a vector whose length is not one."""

    model = "hashing-48"

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(48)
        for word in text.split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            vector += np.random.default_rng(seed).standard_normal(48)
        return vector.tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def documents() -> list[Document]:
    return [document_from_passage(passage) for passage in PASSAGES]


def ids() -> list[str]:
    return [str(passage.id) for passage in PASSAGES]


def faiss_store(embeddings: Embeddings) -> Retriever:
    return DenseRetriever.from_passages(PASSAGES, LangChainEmbedder(embeddings))


def in_memory_store(embeddings: Embeddings) -> Any:
    store = InMemoryVectorStore(embeddings)
    store.add_documents(documents(), ids=ids())
    return store


def chroma_store(embeddings: Embeddings) -> Any:
    chromadb = pytest.importorskip("chromadb")
    langchain_chroma = pytest.importorskip("langchain_chroma")
    client = chromadb.EphemeralClient(chromadb.config.Settings(anonymized_telemetry=False))
    store = langchain_chroma.Chroma("four-stores", embeddings, client=client)
    store.reset_collection()
    store.add_documents(documents(), ids=ids())
    return store


def qdrant_store(embeddings: Embeddings) -> Any:
    qdrant_client = pytest.importorskip("qdrant_client")
    langchain_qdrant = pytest.importorskip("langchain_qdrant")
    client = qdrant_client.QdrantClient(":memory:")
    vectors = qdrant_client.models.VectorParams(size=48, distance=qdrant_client.models.Distance.EUCLID)
    client.create_collection("four-stores", vectors_config=vectors)
    store = langchain_qdrant.QdrantVectorStore(client, "four-stores", embeddings, distance=vectors.distance)
    store.add_documents(documents(), ids=ids())
    return store


STORES = {"faiss": faiss_store, "in_memory": in_memory_store, "chroma": chroma_store, "qdrant": qdrant_store}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = STORES[request.param](HashingEmbeddings())
    yield made
    client = getattr(made, "client", None)
    if request.param == "qdrant" and client is not None:
        client.close()


def bridged(store: Any) -> Retriever:
    """As a retriever of the core. Qdrant's documents have their id in the metadata only."""
    return store if isinstance(store, Retriever) else LangChainRetriever(store, id_key="_id")


def expected() -> dict[str, float]:
    embeddings = HashingEmbeddings()
    query = np.asarray(embeddings.embed_query(QUERY))
    rows = np.asarray(embeddings.embed_documents([passage.text for passage in PASSAGES]))
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return dict(zip(ids(), cosines.tolist(), strict=True))


def test_identical_weights_whatever_the_store(store: Any) -> None:
    embedder = CachedEmbedder(LangChainEmbedder(HashingEmbeddings()))
    candidates = bridged(store).retrieve(QUERY, len(PASSAGES))
    found = score_by_embeddings(QUERY, candidates, embedder)
    best = sorted(expected().items(), key=lambda item: -item[1])
    assert [passage.id for passage in found] == [name for name, _ in best]
    assert [passage.score for passage in found] == pytest.approx([cosine for _, cosine in best], abs=1e-6)
    weights = document_weights([passage.score or 0.0 for passage in found], "cosine")
    assert weights == pytest.approx(document_weights([cosine for _, cosine in best], "cosine"), abs=1e-6)
    assert next(passage for passage in found if passage.id == ids()[0]).title == "Otter"


def test_the_same_asynchronously(store: Any) -> None:
    embedder = LangChainEmbedder(HashingEmbeddings())

    async def search() -> tuple[Passage, ...]:
        candidates = await bridged(store).aretrieve(QUERY, len(PASSAGES))
        return await ascore_by_embeddings(QUERY, candidates, embedder)

    if type(store).__name__ == "QdrantVectorStore":
        pytest.skip("an in-memory Qdrant has no asynchronous client")
    candidates = bridged(store).retrieve(QUERY, len(PASSAGES))
    assert asyncio.run(search()) == score_by_embeddings(QUERY, candidates, embedder)


def test_excluded_passages_do_not_cost_places(store: Any) -> None:
    best = sorted(expected(), key=lambda name: -expected()[name])
    if type(store).__name__ in ("Chroma", "QdrantVectorStore"):  # these search by euclidean distance
        found = bridged(store).retrieve(QUERY, 3, frozenset(best[:2]))
        assert len(found) == 3
        assert not {passage.id for passage in found} & set(best[:2])
    else:
        assert [passage.id for passage in bridged(store).retrieve(QUERY, 3, frozenset(best[:2]))] == best[2:5]


def test_the_stores_themselves_disagree() -> None:
    """The reason for all this: the same query, the same vectors, and three answers."""
    embeddings = HashingEmbeddings()
    said = {
        name: LangChainRetriever(STORES[name](embeddings), score_kind="cosine").retrieve(QUERY, 1)[0].score
        for name in ("in_memory", "chroma")
    }
    assert said["in_memory"] == pytest.approx(max(expected().values()), abs=1e-6)
    assert said["chroma"] is not None
    assert said["chroma"] > 1, "a squared distance"


def test_a_store_score_with_an_explicit_direction() -> None:
    store = LangChainRetriever(chroma_store(HashingEmbeddings()), score_kind="distance")
    candidates = store.retrieve(QUERY, 3)
    assert {passage.score_kind for passage in candidates} == {"distance"}
    assert [passage.score for passage in candidates] == sorted(passage.score or 0.0 for passage in candidates)
    flow = scored(QUERY, candidates[::-1], lambda query, passages: [p.score or 0.0 for p in passages], kind="distance")
    with pytest.raises(StopIteration) as stop:
        next(flow)
    assert stop.value.value == candidates
