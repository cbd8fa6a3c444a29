"""ReplugLLM: the ensemble as an LLM."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import time
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate as LlamaIndexPrompt
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.llms import LLM, ChatMessage, MessageRole
from llama_index.core.schema import NodeWithScore
from llama_index_rlm import LlamaIndexRetriever, ReplugLLM, RLMEmbedding, messages_from_chat

from rlm_plugins.errors import RetrievalError, Unsupported, UsageError
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.prompts import PromptTemplate
from rlm_plugins.texts import Message, Passage


@pytest.fixture
def llm(lm: Any, embedder: Any, fixed_retriever: Any) -> ReplugLLM:
    return ReplugLLM(llm=lm, retriever=fixed_retriever, embed_model=embedder)


def user(text: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=text)]


def test_it_is_an_llm_by_class_and_by_name(llm: ReplugLLM) -> None:
    assert isinstance(llm, LLM)
    assert ReplugLLM.class_name() == llm.to_dict()["class_name"] == "ReplugLLM"
    assert ReplugLLM.__module__ == "llama_index_rlm.llm"
    for name in ("complete", "chat", "stream_complete", "stream_chat"):
        assert name in vars(ReplugLLM)
        assert f"a{name}" in vars(ReplugLLM)


def test_metadata(llm: ReplugLLM) -> None:
    assert llm.metadata.model_name == "scripted"
    assert llm.metadata.context_window == 8192
    assert llm.metadata.num_output == 256
    assert llm.metadata.is_chat_model
    assert not llm.metadata.is_function_calling_model
    assert llm.model_copy(update={"max_tokens": 7}).metadata.num_output == 7


# --- it computes what the core computes ---


def test_equal_to_the_ensemble_of_the_core(llm: ReplugLLM, lm: Any, embedder: Any, question: str) -> None:
    core = Replug(lm, retriever=LlamaIndexRetriever(llm.retriever), embedder=embedder, scores="embeddings")
    expected = core.generate(question)
    response = llm.complete(question)
    assert response.text == expected.text == "Bora Tinel"
    assert response.raw["replug"] == expected.trace
    assert response.logprobs is not None
    assert [one[0].logprob for one in response.logprobs] == [token.logprob for token in expected.tokens]

    conversation = [Message("system", "Be brief."), Message("user", question)]
    expected = core.generate(conversation)
    answer = llm.chat([ChatMessage(role="system", content="Be brief."), *user(question)])
    assert answer.message.role == MessageRole.ASSISTANT
    assert answer.message.content == expected.text
    assert answer.raw["replug"] == expected.trace


def test_all_ways_to_ask_give_the_same_answer(llm: ReplugLLM, question: str) -> None:
    llm = llm.model_copy(update={"temperature": 0.7, "seed": 11})
    complete, chat = llm.complete(question), llm.chat(user(question))
    pieces = list(llm.stream_complete(question))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].text == complete.text
    assert pieces[-1].raw == complete.raw
    turns = list(llm.stream_chat(user(question)))
    assert "".join(turn.delta or "" for turn in turns) == turns[-1].message.content == chat.message.content
    assert turns[-1].raw == chat.raw
    assert [piece.text for piece in pieces] == sorted((piece.text for piece in pieces), key=len)


async def test_async_is_sync_without_the_loops_threads(llm: ReplugLLM, question: str, no_threads: None) -> None:
    llm = llm.model_copy(update={"temperature": 0.7, "seed": 11})
    assert await llm.acomplete(question) == llm.complete(question)
    assert await llm.achat(user(question)) == llm.chat(user(question))
    pieces = [piece async for piece in await llm.astream_complete(question)]
    assert pieces == list(llm.stream_complete(question))
    turns = [turn async for turn in await llm.astream_chat(user(question))]
    assert turns == list(llm.stream_chat(user(question)))


async def test_the_loop_is_not_blocked(llm: ReplugLLM, lm: Any, question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = lm.runner.advance

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return quick(*args)

    monkeypatch.setattr(lm.runner, "advance", slow)
    writing = asyncio.create_task(llm.acomplete(question))
    ticks = 0
    while not writing.done():
        await asyncio.sleep(0.002)
        ticks += 1
    assert ticks > 10
    assert (await writing).text == "Bora Tinel"


# --- documents ---


def test_documents_of_the_call_replace_retrieval(
    llm: ReplugLLM, fixed_retriever: Any, nodes: list[NodeWithScore], question: str
) -> None:
    for documents in (nodes[:1], [nodes[0].node], [Passage("Bora Tinel founded it.")], ["Bora Tinel founded it."]):
        response = llm.complete(question, documents=documents)
        assert response.text == "Bora Tinel"
        assert len(response.raw["replug"]["documents"]) == 1
        assert llm.chat(user(question), documents=documents).message.content == "Bora Tinel"
    assert fixed_retriever.asked == []


@pytest.mark.parametrize(("documents", "message"), [("text", "one string"), ([3], "got int"), ([None], "NoneType")])
def test_what_is_no_document_is_refused(llm: ReplugLLM, question: str, documents: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llm.complete(question, documents=documents)


def test_an_index_is_asked_for_k_nodes_and_brings_its_embedding(
    lm: Any, index: VectorStoreIndex, question: str
) -> None:
    llm = ReplugLLM(llm=lm, retriever=index, k=3)
    documents = llm.complete(question).raw["replug"]["documents"]
    assert documents[0]["id"] == "founder"
    assert len(documents) == 3
    assert {document["score_kind"] for document in documents} == {"cosine"}
    assert len(llm.complete(question).raw["replug"]["documents"]) == 3
    over = ReplugLLM(llm=lm, retriever=index.as_retriever(similarity_top_k=2))
    assert len(over.complete(question).raw["replug"]["documents"]) == 2


def test_the_last_user_message_is_looked_up_or_what_a_function_says(
    llm: ReplugLLM, fixed_retriever: Any, question: str
) -> None:
    history = [*user("Hello!"), ChatMessage(role="assistant", content="Hello."), *user(question)]
    llm.chat(history)
    llm.model_copy(update={"query": lambda messages: str(messages[0].content)}).chat(history)
    assert fixed_retriever.asked == [question, "Hello!"]


def test_nothing_found_is_an_error_before_the_model_is_called(lm: Any, embedder: Any, retriever_of: Any) -> None:
    with pytest.raises(RetrievalError, match="no documents were found"):
        ReplugLLM(llm=lm, retriever=retriever_of([]), embed_model=embedder).complete("Who?")
    with pytest.raises(UsageError, match="there is no retriever"):
        ReplugLLM(llm=lm, embed_model=embedder).complete("Who?")
    assert lm.computed == 0


# --- calls ---


@pytest.mark.parametrize("name", ["complete", "stream_complete"])
def test_unknown_keywords_of_a_call_are_refused(llm: ReplugLLM, name: str) -> None:
    with pytest.raises(UsageError, match="a call of ReplugLLM has no argument tempratur;"):
        getattr(llm, name)("Who?", tempratur=1.0)


@pytest.mark.parametrize("name", ["acomplete", "astream_complete", "achat", "astream_chat"])
async def test_unknown_keywords_of_an_async_call_are_refused(llm: ReplugLLM, name: str) -> None:
    asked: Any = user("Who?") if "chat" in name else "Who?"
    with pytest.raises(UsageError, match="has no argument tools"):
        await getattr(llm, name)(asked, tools=[])


def test_values_of_the_call_win(llm: ReplugLLM, question: str) -> None:
    assert llm.complete(question, max_tokens=3).raw["finish_reason"] == "length"
    assert llm.complete(question, stop=["Tin"]).text == "Bora "
    assert llm.complete(question, temperature=1.0, seed=1) == llm.complete(question, temperature=1.0, seed=1)
    with pytest.raises(UsageError, match="stop must be a sequence"):
        llm.complete(question, stop="Tin")


def test_copies_with_other_settings_are_other_ensembles(llm: ReplugLLM, question: str) -> None:
    copied = llm.model_copy(update={"null_document": 0.3})
    assert len(copied.complete(question).raw["replug"]["documents"]) == 4
    assert len(llm.complete(question).raw["replug"]["documents"]) == 3


def test_the_template_is_the_callers(lm: Any, embedder: Any, nodes: list[NodeWithScore]) -> None:
    template = PromptTemplate("german", document="Text: {text}\n", question="Frage: {question}\n", answer="Antwort:")
    llm = ReplugLLM(llm=lm, embed_model=embedder, template=template, trace="full")
    [document] = llm.complete("Wer?", documents=nodes[:1]).raw["replug"]["documents"]
    assert document["prompt"] == "Text: Bora Tinel founded the town of Velgar.\nFrage: Wer?\nAntwort:"


# --- messages ---


def test_messages_keep_their_roles_and_extras() -> None:
    given = [
        ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
        ChatMessage(role=MessageRole.DEVELOPER, content="Very."),
        ChatMessage(role=MessageRole.USER, content="Who?"),
        ChatMessage(role=MessageRole.ASSISTANT, content="Bora.", additional_kwargs={"name": "a"}),
        ChatMessage(role=MessageRole.TOOL, content="42", additional_kwargs={"tool_call_id": "1"}),
    ]
    converted = messages_from_chat(given)
    assert [message.role for message in converted] == ["system", "system", "user", "assistant", "tool"]
    assert [message.content for message in converted] == ["Be brief.", "Very.", "Who?", "Bora.", "42"]
    assert converted[3].extra == {"name": "a"}
    assert given[3].additional_kwargs == {"name": "a"}


def test_pictures_are_refused(llm: ReplugLLM) -> None:
    from llama_index.core.llms import ImageBlock

    message = ChatMessage(role="user", content=[ImageBlock(image=b"\x89PNG", image_mimetype="image/png")])
    with pytest.raises(UsageError, match="'image'"):
        llm.chat([message])


# --- events ---


@pytest.mark.parametrize("way", ["complete", "chat", "stream_complete", "stream_chat", "predict"])
def test_one_event_and_exact_token_counts_for_each_call(
    lm: Any, embedder: Any, fixed_retriever: Any, question: str, events: Any, way: str
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    counter = TokenCountingHandler(tokenizer=str.split)
    llm = ReplugLLM(
        llm=lm, retriever=fixed_retriever, embed_model=embedder, callback_manager=CallbackManager([debug, counter])
    )
    if way == "predict":
        llm.predict(LlamaIndexPrompt("{question}"), question=question)
    else:
        asked: Any = user(question) if "chat" in way else question
        answered = getattr(llm, way)(asked)
        if "stream" in way:
            list(answered)
    kind = "Completion" if "complete" in way else "Chat"
    assert events.names.count(f"LLM{kind}StartEvent") == events.names.count(f"LLM{kind}EndEvent") == 1
    last = next(event for event in events.seen if type(event).__name__ == f"LLM{kind}EndEvent")
    trace = last.response.raw["replug"]
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    assert counter.prompt_llm_token_count == trace["prompt_tokens"]
    assert counter.completion_llm_token_count == trace["completion_tokens"]


async def test_one_event_for_each_async_call(llm: ReplugLLM, question: str, events: Any) -> None:
    await llm.acomplete(question)
    await llm.achat(user(question))
    [_ async for _ in await llm.astream_complete(question)]
    [_ async for _ in await llm.astream_chat(user(question))]
    for kind in ("Completion", "Chat"):
        assert events.names.count(f"LLM{kind}StartEvent") == events.names.count(f"LLM{kind}EndEvent") == 2


# --- copies, dictionaries ---


def test_to_dict_holds_settings_and_no_secrets(lm: Any, embedder: Any, fixed_retriever: Any) -> None:
    embed_model = RLMEmbedding(embedder)
    object.__setattr__(lm, "api_key", "sk-secret")
    llm = ReplugLLM(llm=lm, retriever=fixed_retriever, embed_model=embed_model, k=4, stop=["\n"])
    data = llm.to_dict()
    assert "sk-secret" not in json.dumps(data)
    assert data["llm"] == "scripted"
    assert data["k"] == 4
    assert not {"retriever", "embed_model", "callback_manager"} & data.keys()
    again = ReplugLLM.from_dict(data, llm=lm, retriever=fixed_retriever, embed_model=embed_model)
    assert again.to_dict() == data
    by_function = ReplugLLM(llm=lm, scores=lambda query, passages: [1.0] * len(passages))
    assert "lambda" in json.loads(by_function.to_json())["scores"]


def test_deep_copies_share_the_frozen_model(llm: ReplugLLM, lm: Any, question: str) -> None:
    copied = copy.deepcopy(llm)
    assert copied is not llm
    assert copied.llm is lm
    assert copied.complete(question) == llm.complete(question)


def test_pickling_says_what_cannot_be_pickled(llm: ReplugLLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(pickle.PicklingError, match=r"ReplugLLM\.llm"):
        pickle.dumps(llm)
    assert not caplog.records


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retreiver": None}, "ReplugLLM has no argument retreiver"),
        ({"k": "many"}, "k: "),
        ({"ensemble": "tokens"}, "ensemble: "),
        ({"retriever": "a retriever", "scores": "uniform"}, "retriever must be"),
        ({"template": "Answer:"}, "template: "),
        ({"messages_to_prompt": str}, "template="),
        ({"embed_model": None}, "nothing says how to score"),
        ({"top_p": 0.0, "scores": "uniform"}, "top_p"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(lm: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReplugLLM(llm=lm, **fields)


def test_settings_are_used_only_where_they_are_set(lm: Any, embedder: Any) -> None:
    Settings.embed_model = RLMEmbedding(embedder)
    assert ReplugLLM(llm=lm).embed_model is Settings.embed_model
    assert ReplugLLM(llm=lm).scores == "embeddings"


def test_an_ensemble_cannot_be_mixed_again(llm: ReplugLLM, question: str) -> None:
    over = ReplugLLM(llm=llm, scores="uniform")
    with pytest.raises(Unsupported, match="full_distribution"):
        over.complete(question, documents=["Some text."])
