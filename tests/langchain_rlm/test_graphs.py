"""ChatReplug as the model of an agent without tools, and as a node of a graph."""

from typing import Any

import pytest
from langchain_rlm import ChatReplug

from rlm_plugins.testing import ScriptedModel

QUESTION = "Who founded Velgar?"
STATE: Any = {"messages": [("user", QUESTION)]}


async def test_an_agent_without_tools(lm: ScriptedModel, store: Any) -> None:
    agents = pytest.importorskip("langchain.agents")
    agent = agents.create_agent(ChatReplug(llm=lm, retriever=store, k=2), tools=[], system_prompt="Be short.")
    for state in (agent.invoke(STATE), await agent.ainvoke(STATE)):
        assert state["messages"][-1].content == "Bora Tinel"
        assert state["messages"][-1].response_metadata["replug"]["query"] == QUESTION
    pieces = [message.content for message, _ in agent.stream(STATE, stream_mode="messages")]
    assert "".join(pieces) == "Bora Tinel"


async def test_a_node_with_checkpoints(lm: ScriptedModel, store: Any, runs: Any) -> None:
    graph = pytest.importorskip("langgraph.graph")
    from langgraph.checkpoint.memory import InMemorySaver

    chat = ChatReplug(llm=lm, retriever=store, k=2)

    async def answer(state: Any) -> Any:
        return {"messages": [await chat.ainvoke(state["messages"])]}

    builder = graph.StateGraph(graph.MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(graph.START, "answer")
    app = builder.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}, "callbacks": [runs]}
    pieces = [m.content async for m, _ in app.astream(STATE, config, stream_mode="messages")]
    assert "".join(pieces) == "Bora Tinel"
    kept = (await app.aget_state(config)).values["messages"][-1]
    assert kept.response_metadata["replug"]["documents"][0]["id"] == "d0"
    assert runs.of("retriever")["parent"] == runs.of("model")["id"]
