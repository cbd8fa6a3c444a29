"""ReplugRetriever and RLMEmbeddings."""

from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_rlm import ReplugRetriever, RLMEmbeddings
from langchain_rlm.embeddings import known_embeddings
from langchain_rlm.from_langchain import LangChainEmbedder, LangChainRetriever

from rlm_plugins.errors import RetrievalError, UsageError
from rlm_plugins.methods.replug.weights import document_weights

QUESTION = "Who founded Velgar?"


async def test_scores_and_weights(store: Any, embeddings: Any, no_threads: None) -> None:
    retriever = ReplugRetriever(vectorstore=store, k=3)
    found = retriever.invoke(QUESTION)
    assert await retriever.ainvoke(QUESTION) == found
    scores = [document.metadata["replug_score"] for document in found]
    assert scores == sorted(scores, reverse=True)
    query = np.array(embeddings.embed_query(QUESTION))
    for document, score in zip(found, scores, strict=True):
        vector = np.array(embeddings.embed_query(document.page_content))
        assert score == pytest.approx(query @ vector / np.linalg.norm(query) / np.linalg.norm(vector), abs=1e-6)
    weights = [document.metadata["replug_weight"] for document in found]
    assert weights == pytest.approx(document_weights(scores, "cosine").tolist())
    assert found[0].metadata["source"] == "s0"
    assert found[0].id == "d0"


def test_documents_of_the_store_are_not_changed(store: Any) -> None:
    ReplugRetriever(vectorstore=store).invoke(QUESTION)
    assert all("replug_score" not in document.metadata for document in store.similarity_search(QUESTION, k=9))


def test_sources(store: Any, embeddings: Any) -> None:
    texts = [
        [document.page_content for document in ReplugRetriever(k=2, **source).invoke(QUESTION)]
        for source in (
            {"vectorstore": store},
            {"retriever": store.as_retriever()},
            {"retriever": LangChainRetriever(store), "embeddings": embeddings},
            {"retriever": LangChainRetriever(store), "embeddings": LangChainEmbedder(embeddings)},
            {"retriever": ReplugRetriever(vectorstore=store)},
        )
    ]
    assert all(each == texts[0] for each in texts)
    ranked = ReplugRetriever(vectorstore=store, scores="rank", weight_temperature=2.0, k=2).invoke(QUESTION)
    assert [document.metadata["replug_score_kind"] for document in ranked] == ["rank", "rank"]
    assert known_embeddings(ReplugRetriever(vectorstore=store)) is store.embeddings


class Bare(BaseRetriever):
    found: tuple[Document, ...] = ()

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return list(self.found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"retriever": Bare(), "vectorstore": InMemoryVectorStore(RLMEmbeddings)}, "vectorstore|one of the two"),
        ({"retriever": Bare()}, "no embeddings to score"),
        ({"retriever": Bare(), "scores": "uniform", "k": 0}, "k must be at least 1"),
        ({"retriever": Bare(), "scores": "uniform", "top_k": 3}, "no argument 'top_k'"),
        ({"vectorstore": "folder"}, "vectorstore"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReplugRetriever(**arguments)


async def test_nothing_found_is_no_error() -> None:
    retriever = ReplugRetriever(retriever=Bare(), scores="uniform")
    assert retriever.invoke(QUESTION) == []
    assert await retriever.ainvoke(QUESTION) == []
    with pytest.raises(UsageError, match="k must"):
        retriever.invoke(QUESTION, k=0)


def test_embeddings_that_fail(embeddings: Any) -> None:
    class Failing(type(embeddings)):  # type: ignore[misc]
        def embed_query(self, text: str) -> list[float]:
            raise ConnectionError("gone")

    retriever = ReplugRetriever(retriever=Bare(found=(Document("x"),)), embeddings=Failing())
    with pytest.raises(RetrievalError, match="gone"):
        retriever.invoke(QUESTION)


async def test_embeddings_outward(embeddings: Any) -> None:
    outward = RLMEmbeddings(LangChainEmbedder(embeddings))
    assert outward.embed_query("the river") == embeddings.embed_query("the river")
    assert await outward.aembed_query("the river") == embeddings.embed_query("the river")
    assert outward.embed_documents(["flag", "x"]) == embeddings.embed_documents(["flag", "x"])
    assert await outward.aembed_documents(["flag"]) == embeddings.embed_documents(["flag"])
    assert outward.embed_documents([]) == await outward.aembed_documents([]) == []
    assert all(isinstance(value, float) for value in outward.embed_query("flag"))
    with pytest.raises(UsageError, match="takes an Embedder"):
        RLMEmbeddings(embeddings)
