"""Templates: where documents and questions stand."""

from __future__ import annotations

import pytest

from rlm_plugins.errors import UsageError
from rlm_plugins.prompts import (
    CONTINUATION,
    QUESTION_ANSWER,
    PromptTemplate,
    last_user_message,
    question_of,
    render_messages,
    render_text,
)
from rlm_plugins.texts import Message, Passage

TALK = (
    Message("system", "S"),
    Message("user", "first"),
    Message("assistant", "A", extra={"tool_calls": [1]}),
    Message("user", "last\n"),
    Message("tool", "T"),
)


def test_documents_stand_in_order_before_the_question() -> None:
    documents = [Passage("one"), Passage("two", title="Two")]
    assert render_text(QUESTION_ANSWER, "q?", documents) == (
        "Document: one\nDocument (Two): two\nQuestion: q?\nAnswer:"
    )
    assert render_text(QUESTION_ANSWER, "q?") == "Question: q?\nAnswer:"


def test_the_papers_template_is_the_document_in_front_of_the_context() -> None:
    assert render_text(CONTINUATION, "Once upon", [Passage("A tale.", title="Tales")]) == "Tales\nA tale.\n\nOnce upon"
    assert render_text(CONTINUATION, "Once upon", answer_so_far=" a time") == "Once upon a time"


def test_in_a_conversation_only_the_last_user_message_changes() -> None:
    rendered = render_messages(QUESTION_ANSWER, TALK, [Passage("D")])
    assert rendered[3] == Message("user", "Document: D\nQuestion: last")
    assert rendered[:3] == TALK[:3]
    assert rendered[4:] == TALK[4:]
    assert rendered[2].extra == {"tool_calls": [1]}


def test_the_question_of_a_conversation_is_its_last_user_message() -> None:
    assert question_of("plain") == "plain"
    assert question_of(TALK) == "last\n"
    assert last_user_message(TALK) == 3


@pytest.mark.parametrize("messages", [(), (Message("system", "S"),), (Message("assistant", "A"),)])
def test_a_conversation_without_a_user_message_is_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(UsageError, match="needs a user message"):
        render_messages(QUESTION_ANSWER, messages)


@pytest.mark.parametrize(
    "field", [{"document": "no place"}, {"titled_document": "{text}{text}"}, {"question": "Question:"}]
)
def test_a_template_without_its_placeholder_is_refused(field: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="exactly once"):
        PromptTemplate("bad", **field)


def test_what_stands_around_a_text_is_the_rendered_document_without_it() -> None:
    for passage in (Passage("text"), Passage("text", title="{text}"), Passage("", title="T")):
        before, after = QUESTION_ANSWER.around_text(passage)
        assert QUESTION_ANSWER.render_document(passage) == before + passage.text + after
