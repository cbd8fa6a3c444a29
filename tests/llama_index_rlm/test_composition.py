"""Where the parts are used: engines, routers, chat engines and agents of LlamaIndex."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MockLLM,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from llama_index_rlm import ReplugLLM, ReplugSynthesizer, RLMEmbedding


@pytest.fixture
def synthesizer(lm: Any, embedder: Any) -> ReplugSynthesizer:
    return ReplugSynthesizer(llm=lm, embed_model=embedder)


@pytest.fixture
def engine(synthesizer: ReplugSynthesizer, index: VectorStoreIndex) -> RetrieverQueryEngine:
    return RetrieverQueryEngine(index.as_retriever(similarity_top_k=3), response_synthesizer=synthesizer)


def weights(response: Any) -> dict[str, float]:
    return {document["id"]: document["weight"] for document in response.metadata["replug"]["documents"]}


# --- query engines ---


async def test_retriever_query_engine(engine: RetrieverQueryEngine, question: str, no_threads: None) -> None:
    response = engine.query(question)
    assert str(response) == "Bora Tinel"
    assert response.source_nodes[0].node.node_id == "founder"
    again = await engine.aquery(question)
    assert str(again) == str(response)
    assert weights(again) == weights(response)


async def test_streaming_through_an_engine(lm: Any, embedder: Any, index: VectorStoreIndex, question: str) -> None:
    streaming = ReplugSynthesizer(llm=lm, embed_model=embedder, streaming=True)
    engine = RetrieverQueryEngine(index.as_retriever(), response_synthesizer=streaming)
    response = engine.query(question)
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == "Bora Tinel"
    again = await engine.aquery(question)
    assert isinstance(again, AsyncStreamingResponse)
    assert "".join([piece async for piece in again.async_response_gen()]) == "Bora Tinel"
    assert again.metadata == response.metadata


def test_as_query_engine(synthesizer: ReplugSynthesizer, index: VectorStoreIndex, question: str) -> None:
    engine = index.as_query_engine(llm=MockLLM(), response_synthesizer=synthesizer)
    assert str(engine.query(question)) == "Bora Tinel"


def test_the_same_weights_whatever_the_store(
    synthesizer: ReplugSynthesizer,
    engine: RetrieverQueryEngine,
    nodes: list[NodeWithScore],
    retriever_of: Any,
    embedder: Any,
    question: str,
) -> None:
    expected = weights(engine.query(question))
    ranked = [NodeWithScore(node=found.node, score=1.0 / (60 + place)) for place, found in enumerate(nodes)]
    without = SummaryIndex([found.node for found in nodes], embed_model=RLMEmbedding(embedder))
    for retriever in (retriever_of(nodes), retriever_of(ranked), without.as_retriever()):
        response = RetrieverQueryEngine(retriever, response_synthesizer=synthesizer).query(question)
        assert weights(response) == pytest.approx(expected)
        assert str(response) == "Bora Tinel"


def test_nothing_retrieved(synthesizer: ReplugSynthesizer, retriever_of: Any, question: str) -> None:
    engine = RetrieverQueryEngine(retriever_of([]), response_synthesizer=synthesizer)
    assert str(engine.query(question)) == "Empty Response"


def test_the_synthesizers_callbacks_are_the_engines(
    lm: Any, embedder: Any, index: VectorStoreIndex, question: str
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    synthesizer = ReplugSynthesizer(llm=lm, embed_model=embedder, callback_manager=CallbackManager([debug]))
    RetrieverQueryEngine(index.as_retriever(), response_synthesizer=synthesizer).query(question)
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE, CBEventType.LLM):
        assert len(debug.get_event_pairs(kind)) == 1, kind


# --- routers ---


class ByWord(BaseSelector):
    """Chooses the tool whose description shares a word with the question."""

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts_dict: dict[str, Any]) -> None:
        pass

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        words = set(query.query_str.lower().split())
        place = max(range(len(choices)), key=lambda place: len(words & set(str(choices[place].description).split())))
        return SelectorResult(selections=[SingleSelection(index=place, reason="a common word")])

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        return self._select(choices, query)


async def test_router(
    synthesizer: ReplugSynthesizer, nodes: list[NodeWithScore], retriever_of: Any, question: str
) -> None:
    def tool(name: str, description: str, found: list[NodeWithScore]) -> QueryEngineTool:
        engine = RetrieverQueryEngine(retriever_of(found), response_synthesizer=synthesizer)
        return QueryEngineTool.from_defaults(engine, name=name, description=description)

    tools = [tool("people", "who founded what", nodes[:1]), tool("rivers", "which river flows", nodes[1:2])]
    router = RouterQueryEngine(selector=ByWord(), query_engine_tools=tools, llm=MockLLM())
    assert str(router.query(question)) == "Bora Tinel"
    response = await router.aquery("Which river flows past?")
    assert str(response) == "the river Osk"
    assert weights(response) == {"river": 1.0}


# --- chat engines ---


async def test_condense_question(engine: RetrieverQueryEngine, lm: Any, question: str) -> None:
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    chat = CondenseQuestionChatEngine.from_defaults(engine, llm=ReplugLLM(llm=lm, scores="uniform"), memory=memory)
    assert str(chat.chat(question)) == "Bora Tinel"
    chat.reset()
    assert str(await chat.achat(question)) == "Bora Tinel"


@pytest.mark.parametrize("context_prompt", [None, "Answer from the document."])
async def test_condense_plus_context(
    lm: Any, index: VectorStoreIndex, question: str, context_prompt: str | None, events: Any
) -> None:
    retriever = index.as_retriever(similarity_top_k=3)
    llm = ReplugLLM(llm=lm, retriever=retriever, trace="full")
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    chat = CondensePlusContextChatEngine.from_defaults(
        retriever, llm=llm, memory=memory, context_prompt=context_prompt, skip_condense=True
    )
    assert str(chat.chat(question)) == "Bora Tinel"
    assert str(await chat.achat(question)) == "Bora Tinel"
    chat.reset()
    assert "".join(chat.stream_chat(question).response_gen) == "Bora Tinel"
    chat.reset()
    streaming = await chat.astream_chat(question)
    assert "".join([piece async for piece in streaming.async_response_gen()]) == "Bora Tinel"
    answers = [event.response.raw for event in events.seen if type(event).__name__ == "LLMChatEndEvent"]
    assert len(answers) == 4
    for answer in answers:
        prompts = [document["prompt"] for document in answer["replug"]["documents"]]
        assert [prompt.count("Document: ") for prompt in prompts] == [1, 1, 1]
        if context_prompt is not None:  # nothing of the other documents
            assert [prompt.count("Osk") for prompt in prompts] == [0, 1, 0]


# --- agents ---


class ScriptedAgentLLM(FunctionCallingLLM):
    """Calls the first tool with the question, then repeats what the tool said."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_function_calling_model=True, is_chat_model=True)

    def _prepare_chat_with_tools(self, tools: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        return {"messages": kwargs.get("chat_history") or [], "tools": tools}

    def get_tool_calls_from_response(self, response: ChatResponse, **kwargs: Any) -> list[ToolSelection]:
        return list(response.message.additional_kwargs.get("tool_calls", []))

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        if messages[-1].role.value == "tool":
            return ChatResponse(message=ChatMessage(role="assistant", content=f"It says: {messages[-1].content}"))
        call = ToolSelection(
            tool_id="1",
            tool_name=kwargs["tools"][0].metadata.name,
            tool_kwargs={"input": messages[-1].content},
        )
        message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
        return ChatResponse(message=message)

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages, **kwargs)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        async def one() -> Any:
            yield self.chat(messages, **kwargs)

        return one()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # it looks at all members
@pytest.mark.filterwarnings("ignore:ServiceManager is deprecated:DeprecationWarning")  # llama-index-core 0.13
async def test_a_tool_of_an_agent(engine: RetrieverQueryEngine, question: str) -> None:
    tool = QueryEngineTool.from_defaults(engine, name="towns", description="Knows about towns.")
    agent = FunctionAgent(name="asker", description="Asks.", tools=[tool], llm=ScriptedAgentLLM())
    workflow = AgentWorkflow(agents=[agent], root_agent="asker")
    output = await workflow.run(user_msg=question)
    assert str(output) == "It says: Bora Tinel"
    [call] = output.tool_calls
    assert call.tool_output.content == "Bora Tinel"
    assert weights(call.tool_output.raw_output)["founder"] > 0.9


# --- installing ---


def test_without_the_framework_there_is_one_clear_line() -> None:
    program = (
        "import sys\n"
        "sys.modules['llama_index'] = None\n"
        "try:\n    import llama_index_rlm\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    path = [entry for entry in sys.path if entry]
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == (
        "MissingExtra llama_index_rlm needs llama-index-core, which is not installed: "
        'pip install "rlm-plugins[llama-index]"'
    )


def test_the_public_names() -> None:
    import llama_index_rlm

    assert sorted(llama_index_rlm.__all__) == [
        "FrozenLM",
        "LlamaIndexEmbedder",
        "LlamaIndexRetriever",
        "RLMEmbedding",
        "ReplugLLM",
        "ReplugSynthesizer",
        "messages_from_chat",
        "node_from_passage",
        "passage_from_node",
    ]
    assert all(hasattr(llama_index_rlm, name) for name in llama_index_rlm.__all__)


def test_no_torch_is_loaded() -> None:
    path = [entry for entry in sys.path if entry]
    program = f"import sys; sys.path[:0] = {path!r}\nimport llama_index_rlm; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
