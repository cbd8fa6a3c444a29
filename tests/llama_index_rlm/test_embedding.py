"""RLMEmbedding: an embedder of the core in LlamaIndex's indices."""

from __future__ import annotations

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


def test_a_bad_argument_is_refused(embedder: Any) -> None:
    with pytest.raises(UsageError, match="RLMEmbedding has no argument batch_size"):
        RLMEmbedding(embedder, batch_size=3)
    with pytest.raises(UsageError, match="expected an Embedder"):
        RLMEmbedding("all-MiniLM-L6-v2")  # type: ignore[arg-type]
