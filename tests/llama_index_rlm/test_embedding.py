"""RLMEmbedding: an embedder of the core in LlamaIndex's indices."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_rlm import LlamaIndexEmbedder, RLMEmbedding

from rlm_plugins.errors import UsageError
from rlm_plugins.models import Embedder


def test_it_is_an_embedding_model_by_class_and_by_name(embedder: Any) -> None:
    embed_model = RLMEmbedding(embedder)
    assert isinstance(embed_model, BaseEmbedding)
    assert RLMEmbedding.class_name() == embed_model.to_dict()["class_name"] == "RLMEmbedding"
    assert embed_model.model_name == embed_model.to_dict()["model_name"] == "words-64"
    assert "embedder" not in embed_model.to_dict()


async def test_the_embedders_vectors_sync_and_async(embedder: Any, no_threads: None) -> None:
    embed_model, texts = RLMEmbedding(embedder), ["Bora Tinel", "the river Osk"]
    assert embed_model.get_query_embedding("Who?") == embedder.embed_query("Who?").tolist()
    assert embed_model.get_text_embedding(texts[0]) == embedder.embed_documents(texts)[0].tolist()
    assert embed_model.get_text_embedding_batch(texts) == embedder.embed_documents(texts).tolist()
    assert await embed_model.aget_query_embedding("Who?") == embed_model.get_query_embedding("Who?")
    assert await embed_model.aget_text_embedding(texts[0]) == embed_model.get_text_embedding(texts[0])
    assert await embed_model.aget_text_embedding_batch(texts) == embed_model.get_text_embedding_batch(texts)


def test_there_and_back(embedder: Any) -> None:
    again = LlamaIndexEmbedder(RLMEmbedding(embedder))
    np.testing.assert_array_equal(again.embed_documents(["a", "b"]), embedder.embed_documents(["a", "b"]))
    assert "words-64" in again.fingerprint


def test_in_an_index_and_in_a_pipeline(embedder: Any, index: VectorStoreIndex, question: str) -> None:
    found = index.as_retriever(similarity_top_k=1).retrieve(question)
    assert [one.node.node_id for one in found] == ["founder"]
    [node] = IngestionPipeline(transformations=[RLMEmbedding(embedder)]).run(nodes=[TextNode(text="Bora Tinel")])
    assert node.embedding == embedder.embed_query("Bora Tinel").tolist()
    assert isinstance(found[0], NodeWithScore)


def test_copies_and_pickles(embedder: Any) -> None:
    embed_model = RLMEmbedding(embedder)
    assert copy.deepcopy(embed_model).embedder is embedder
    embedder.lock = threading.Lock()
    with pytest.raises(pickle.PicklingError, match=r"RLMEmbedding\.embedder \(WordEmbedder\)"):
        pickle.dumps(embed_model)


def test_a_pickle_that_comes_back_whole() -> None:
    embed_model = pickle.loads(pickle.dumps(RLMEmbedding(Numbers())))
    assert embed_model.get_text_embedding("ab") == [2.0, 1.0]
    assert embed_model.model_name == "numbers"


class Numbers(Embedder):
    fingerprint = "numbers"

    def embed_query(self, text: str) -> Any:
        return np.array([len(text), 1], dtype=np.float32)

    def embed_documents(self, texts: Any) -> Any:
        return np.stack([self.embed_query(text) for text in texts])


def test_a_bad_argument_is_refused(embedder: Any) -> None:
    with pytest.raises(UsageError, match="RLMEmbedding has no argument batch_size"):
        RLMEmbedding(embedder, batch_size=3)
    with pytest.raises(UsageError, match="expected an Embedder"):
        RLMEmbedding("all-MiniLM-L6-v2")  # type: ignore[arg-type]
