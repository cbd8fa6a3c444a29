"""ChatReplug in chains, graphs of runs and event streams: what starts what, and what arrives."""

from typing import Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_rlm import ChatReplug, ReplugRetriever

from rlm_plugins.errors import RetrievalError
from rlm_plugins.testing import ScriptedModel

QUESTION = "Who founded Velgar?"


async def _each_way(chat: Any, config: Any, way: str) -> None:
    if way == "invoke":
        chat.invoke(QUESTION, config)
    elif way == "ainvoke":
        await chat.ainvoke(QUESTION, config)
    elif way == "stream":
        list(chat.stream(QUESTION, config))
    elif way == "astream":
        [chunk async for chunk in chat.astream(QUESTION, config)]
    elif way == "batch":
        chat.batch([QUESTION], config)
    elif way == "invoke that streams":
        chat.invoke(QUESTION, config, stream=True)
    elif way == "ainvoke that streams":
        await chat.ainvoke(QUESTION, config, stream=True)
    elif way == "events":
        [event async for event in chat.astream_events(QUESTION, config, version="v2")]


WAYS = ["invoke", "ainvoke", "stream", "astream", "batch", "invoke that streams", "ainvoke that streams", "events"]


@pytest.mark.parametrize("way", WAYS)
async def test_the_search_is_a_run_below_the_models(lm: ScriptedModel, store: Any, runs: Any, way: str) -> None:
    chat = ChatReplug(llm=lm, retriever=store, k=2)
    await _each_way(chat, {"callbacks": [runs], "tags": ["mine"], "metadata": {"user": "ann"}}, way)
    model, search = runs.of("model"), runs.of("retriever")
    assert model["parent"] is None
    assert search["parent"] == model["id"]
    assert "mine" in model["tags"]
    assert "mine" in search["tags"]
    assert search["metadata"]["user"] == "ann"
    assert model["metadata"]["ls_provider"] == "rlm_plugins"
    assert not {"ls_provider", "ls_model_name", "ls_model_type"} & search["metadata"].keys()
    assert runs.ended == ["retriever", "model"]


@pytest.mark.parametrize("way", WAYS)
async def test_in_a_chain(lm: ScriptedModel, store: Any, runs: Any, way: str) -> None:
    chat = ChatReplug(llm=lm, retriever=ReplugRetriever(vectorstore=store, k=2), k=2)
    chain = RunnableLambda(lambda question: question) | chat
    await _each_way(chain.with_config(tags=["chain"]), {"callbacks": [runs]}, "invoke" if "that" in way else way)
    model = runs.of("model")
    outer, inner = (run for run in runs.started if run["kind"] == "retriever")
    assert model["parent"] in [run["id"] for run in runs.started if run["kind"] == "chain"]
    assert (outer["name"], outer["parent"]) == ("ReplugRetriever", model["id"])
    assert (inner["name"], inner["parent"]) == ("VectorStoreRetriever", outer["id"])
    assert all("chain" in run["tags"] for run in (model, outer, inner))


def test_a_run_id_of_the_callers_is_kept(lm: ScriptedModel, store: Any, runs: Any) -> None:
    from langchain_core.utils.uuid import uuid7

    mine = uuid7()
    list(ChatReplug(llm=lm, retriever=store).stream(QUESTION, {"callbacks": [runs], "run_id": mine}))
    assert runs.of("model")["id"] == mine


def test_callbacks_of_the_instance_stay_with_it(lm: ScriptedModel, store: Any, runs: Any) -> None:
    list(ChatReplug(llm=lm, retriever=store, callbacks=[runs], tags=["local"]).stream(QUESTION))
    assert [run["kind"] for run in runs.started] == ["model"]
    assert runs.of("model")["tags"] == ["local"]


async def test_a_chain_of_the_usual_shape(lm: ScriptedModel, store: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Known so far: {context}"), ("human", "{question}")])
    chain = (
        {"context": RunnableLambda(lambda _: "nothing"), "question": RunnablePassthrough()}
        | prompt
        | ChatReplug(llm=lm, retriever=store, k=2)
        | StrOutputParser()
    )
    assert chain.invoke(QUESTION) == "Bora Tinel"
    assert await chain.ainvoke(QUESTION) == "Bora Tinel"
    pieces = list(chain.stream(QUESTION))
    assert len(pieces) > 2
    assert "".join(pieces) == "Bora Tinel"
    assert "".join([piece async for piece in chain.astream(QUESTION)]) == "Bora Tinel"


async def test_events(lm: ScriptedModel, store: Any) -> None:
    chain = ChatReplug(llm=lm, retriever=store, k=2) | StrOutputParser()
    events = [event async for event in chain.astream_events(QUESTION, version="v2")]
    model = next(event for event in events if event["event"] == "on_chat_model_start")
    search = next(event for event in events if event["event"] == "on_retriever_start")
    assert search["parent_ids"][-1] == model["run_id"]
    pieces = [event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(pieces) == "Bora Tinel"
    [end] = [event for event in events if event["event"] == "on_chat_model_end"]
    assert end["data"]["output"].response_metadata["replug"]["answer"] == "Bora Tinel"


def test_the_trace_survives_the_third_event_protocol(lm: ScriptedModel, store: Any, runs: Any) -> None:
    chat = ChatReplug(llm=lm, retriever=store, k=2)
    try:
        stream = chat.stream_events(QUESTION, {"callbacks": [runs]}, version="v3")
    except (TypeError, ValueError, AttributeError):
        pytest.skip("this langchain-core has no stream_events v3")
    message = stream.output
    assert message.text == "Bora Tinel"
    assert message.response_metadata["replug"]["calls"] == 2
    assert runs.of("retriever")["parent"] == runs.of("model")["id"]


def test_retries_and_fallbacks_around_the_ensemble(lm: ScriptedModel, store: Any) -> None:
    failing = ChatReplug(llm=lm)  # there is nothing to retrieve from
    chat = ChatReplug(llm=lm, retriever=store)
    assert failing.with_fallbacks([chat]).invoke(QUESTION).content == "Bora Tinel"
    assert chat.with_retry(stop_after_attempt=2).invoke(QUESTION).content == "Bora Tinel"
    tried: list[str] = []

    def scores(query: str, passages: Any) -> list[float]:
        tried.append(query)
        if len(tried) < 2:
            raise RetrievalError("not now")
        return [1.0] * len(passages)

    flaky = ChatReplug(llm=lm, retriever=store, scores=scores, k=1)
    assert flaky.with_retry(wait_exponential_jitter=False).invoke(QUESTION).content == "Bora Tinel"
    assert len(tried) == 2


@pytest.mark.filterwarnings("ignore:This API is in beta")
def test_as_a_tool_and_with_config(lm: ScriptedModel, store: Any, runs: Any) -> None:
    chat = ChatReplug(llm=lm, retriever=store, k=2).with_config(tags=["tagged"], run_name="named")
    chat.invoke(QUESTION, {"callbacks": [runs]})
    assert runs.of("model")["name"] == "named"
    assert "tagged" in runs.of("retriever")["tags"]
    tool = (RunnableLambda(lambda asked: asked["question"]) | chat | StrOutputParser()).as_tool(
        name="ask", description="Ask about towns.", arg_types={"question": str}
    )
    assert tool.invoke({"question": QUESTION}) == "Bora Tinel"
