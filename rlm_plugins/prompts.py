"""Templates: how a question and its documents become one prompt.

A template says in which words; `render_text` and `render_messages` say where. The document comes first and the
question last, so that a document seen before is a prefix seen before (key-value caches, vLLM's prefix cache), and so
that only the document has to be cut when the whole is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError
from .texts import Message, Passage

Prompt = str | tuple[Message, ...]
"""What a user asks: a question (or a text to go on with), or a conversation."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The words around a document and a question.

    `document` is formatted with `text`, `titled_document` with `title` and `text`; `question` with `question`;
    `answer` introduces the answer of a completion model. `answer_starts_with_space` says that a completion begins with
    one space which belongs to the template, not to the answer.

    >>> render_text(QUESTION_ANSWER, "Who founded Velgar?", [Passage("Bora Tinel founded Velgar.")])
    'Document: Bora Tinel founded Velgar.\\nQuestion: Who founded Velgar?\\nAnswer:'
    """

    name: str
    document: str = "Document: {text}\n"
    titled_document: str = "Document ({title}): {text}\n"
    question: str = "Question: {question}\n"
    answer: str = "Answer:"
    answer_starts_with_space: bool = True

    def __post_init__(self) -> None:
        for field, placeholder in (("document", "{text}"), ("titled_document", "{text}"), ("question", "{question}")):
            if getattr(self, field).count(placeholder) != 1:
                raise UsageError(
                    f"PromptTemplate.{field} must contain {placeholder} exactly once, got {getattr(self, field)!r}"
                )

    def around_text(self, passage: Passage) -> tuple[str, str]:
        """What stands before and after the passage's text: the parts that are never cut."""
        if passage.title:
            before, after = self.titled_document.split("{text}")
            return before.replace("{title}", passage.title), after.replace("{title}", passage.title)
        before, after = self.document.split("{text}")
        return before, after

    def render_document(self, passage: Passage) -> str:
        before, after = self.around_text(passage)
        return before + passage.text + after

    def render_question(self, question: str) -> str:
        before, after = self.question.split("{question}")
        return before + question + after


QUESTION_ANSWER = PromptTemplate("question_answer")
"""The default: a document, a question, an answer."""

CONTINUATION = PromptTemplate(
    "continuation",
    document="{text}\n\n",
    titled_document="{title}\n{text}\n\n",
    question="{question}",
    answer="",
    answer_starts_with_space=False,
)
"""The paper's: the document in front of the context, and the model goes on (language modelling, bits per byte)."""


def render_text(
    template: PromptTemplate, question: str, documents: Sequence[Passage] = (), *, answer_so_far: str = ""
) -> str:
    """One completion prompt: the documents in order (none: closed book; several: concatenated), the question, and what
    has been answered already, which the model is to continue."""
    head = "".join(template.render_document(document) for document in documents)
    return head + template.render_question(question) + template.answer + answer_so_far


def render_messages(
    template: PromptTemplate, messages: Sequence[Message], documents: Sequence[Passage] = ()
) -> tuple[Message, ...]:
    """The same for a conversation: the documents stand in front of the last user message; all else passes through."""
    last = last_user_message(messages)
    head = "".join(template.render_document(document) for document in documents)
    content = head + template.render_question(messages[last].content).rstrip("\n")
    return (*messages[:last], Message("user", content), *messages[last + 1 :])


def last_user_message(messages: Sequence[Message]) -> int:
    """The index of the last user message; `UsageError` where there is none to attach documents to."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "user":
            return index
    raise UsageError(
        f"a conversation needs a user message to put documents in front of, got roles "
        f"{[message.role for message in messages]}"
    )


def question_of(prompt: Prompt) -> str:
    """The text that stands for the prompt when documents are looked up: the prompt itself, or the last user message."""
    return prompt if isinstance(prompt, str) else prompt[last_user_message(prompt)].content
