"""Text to tokens and back: boundaries, BOS, documents that are too long, text that arrives in pieces of a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .errors import UsageError
from .prompts import Prompt, PromptTemplate, last_user_message, render_messages, render_text
from .texts import Message, Passage

TokenIds = tuple[int, ...]


class Tokenizer(Protocol):
    """What the library needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Plain text to ids: nothing is added, and what looks like a special token is text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; special tokens vanish."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        """A conversation up to where the assistant's answer begins, special tokens included; None without a chat
        template."""
        ...


def with_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> TokenIds:
    if tokenizer.bos_id is None or (ids and ids[0] == tokenizer.bos_id):
        return tuple(ids)
    return (tokenizer.bos_id, *ids)


def encode_prompt(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    prompt: Prompt,
    documents: Sequence[Passage] = (),
    *,
    answer_so_far: str = "",
) -> TokenIds:
    """One prompt as token ids, BOS first. A conversation uses the tokenizer's chat template where it has one, and is
    otherwise written out in the words of `template`."""
    if isinstance(prompt, str):
        text = render_text(template, prompt, documents, answer_so_far=_spaced(template, answer_so_far))
        return with_bos(tokenizer, tokenizer.encode(text))
    chat = tokenizer.encode_chat(render_messages(template, prompt, documents))
    if chat is None:
        text = conversation_as_text(template, prompt, documents) + _spaced(template, answer_so_far)
        return with_bos(tokenizer, tokenizer.encode(text))
    lead = answer_lead(tokenizer, template, prompt, chat)
    return (*chat, *tokenizer.encode(lead + answer_so_far if answer_so_far else ""))


def answer_lead(tokenizer: Tokenizer, template: PromptTemplate, prompt: Prompt, prompt_ids: Sequence[int]) -> str:
    """What stands between a prompt and the answer and belongs to neither: one space or nothing.

    Says `template.answer_starts_with_space`; but where a chat template ends in white space (a new line after the
    assistant's name), the answer follows at once.
    """
    if not template.answer_starts_with_space:
        return ""
    ends_in_space = not isinstance(prompt, str) and tokenizer.decode(prompt_ids[-4:])[-1:].isspace()
    return "" if ends_in_space else " "


def _spaced(template: PromptTemplate, answer: str) -> str:
    return " " + answer if answer and template.answer_starts_with_space else answer


def conversation_as_text(template: PromptTemplate, messages: Sequence[Message], documents: Sequence[Passage]) -> str:
    """A conversation for a model without a chat template: questions and answers in the template's words."""
    last = last_user_message(messages)
    parts: list[str] = []
    for index, message in enumerate(messages):
        if message.role == "user":
            head = "".join(template.render_document(document) for document in documents) if index == last else ""
            parts.append(head + template.render_question(message.content))
        elif message.role == "assistant":
            parts.append(template.answer + _spaced(template, message.content) + "\n")
        else:
            parts.append(message.content + "\n")
    return "".join(parts) + template.answer


def fit_prompt(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    prompt: Prompt,
    documents: Sequence[Passage],
    *,
    context_window: int | None,
    reserve: int,
    max_document_tokens: int | None = None,
    answer_so_far: str = "",
) -> tuple[TokenIds, tuple[Passage, ...]]:
    """A prompt that leaves `reserve` tokens of the window free: the documents are cut, the question never.

    Returns the ids and the documents as sent. Each document is first cut to `max_document_tokens`; if the whole is
    still too long, all documents are cut to an equal length that fits. Raises `UsageError` when the question alone
    does not fit.
    """
    sent = tuple(documents)
    if max_document_tokens is not None:
        sent = tuple(cut_document(tokenizer, document, max_document_tokens) for document in sent)

    def encoded(documents: Sequence[Passage]) -> TokenIds:
        return encode_prompt(tokenizer, template, prompt, documents, answer_so_far=answer_so_far)

    ids = encoded(sent)
    if context_window is None or len(ids) + reserve <= context_window:
        return ids, sent
    room = context_window - reserve
    bare = tuple(_with_text(document, "") for document in sent)
    least = len(encoded(bare))
    if least > room:
        raise UsageError(
            f"the question needs {least} tokens and {reserve} are kept for the answer, but the model's window is "
            f"{context_window}: shorten the question or lower max_tokens"
        )
    longest = max(len(tokenizer.encode(document.text)) for document in sent)
    low, high = 0, longest  # the largest common document length that fits; low always fits, high never does
    fitting = encoded(bare), bare
    while high - low > 1:
        middle = (low + high) // 2
        cut = tuple(cut_document(tokenizer, document, middle) for document in sent)
        ids = encoded(cut)
        if len(ids) <= room:
            low, fitting = middle, (ids, cut)
        else:
            high = middle
    return fitting


def cut_document(tokenizer: Tokenizer, document: Passage, max_tokens: int) -> Passage:
    """The document with its text cut to its first `max_tokens` tokens, at a whole character."""
    ids = tokenizer.encode(document.text)
    if len(ids) <= max_tokens:
        return document
    return _with_text(document, tokenizer.decode(ids[:max_tokens]).rstrip("\ufffd"))


def _with_text(document: Passage, text: str) -> Passage:
    return Passage(
        text,
        id=document.id,
        title=document.title,
        score=document.score,
        score_kind=document.score_kind,
        metadata=document.metadata,
    )


def continuation_ids(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut where the model itself would see the boundary.

    The whole text is encoded; where a merge crosses the boundary, the cut backs off to the last token both share, so
    the first continuation token may begin inside the context. Raises `UsageError` for an empty continuation.
    """
    if not continuation:
        raise UsageError("the continuation to score is empty: its log-probability would be 0 whatever the context")
    whole = tokenizer.encode(context + continuation)
    before = tokenizer.encode(context)
    cut = 0
    while cut < min(len(before), len(whole)) and before[cut] == whole[cut]:
        cut += 1
    cut = min(cut, len(whole) - 1)
    return whole[:cut], whole[cut:]


class IncrementalText:
    """Token ids to text, piece by piece: a piece is given out once its characters are whole.

    >>> class Bytes:
    ...     def decode(self, ids): return bytes(ids).decode("utf-8", errors="replace")
    >>> text = IncrementalText(Bytes())
    >>> [text.push(byte) for byte in "né".encode()]
    ['n', '', 'é']
    """

    _WINDOW = 64  # ids held back at most. A character has up to 4 bytes; a text may hold U+FFFD itself, and rows of it

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding begins here, where a character does: the piece before gives the context that
        # tokenizers need which glue spaces to the word before
        self._given = 0  # ids whose text was given out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        now = self._tokenizer.decode(self._ids[self._start :])
        if now.endswith("\ufffd") and len(self._ids) - self._given < self._WINDOW:
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end: an unfinished character."""
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        now = self._tokenizer.decode(self._ids[self._start :])
        self._given = len(self._ids)
        return now[len(before) :]


class StopText:
    """Text pieces to text pieces, ended by stop strings: what might be the beginning of one is held back.

    The stop string that is complete first ends the text, however the text is cut into pieces.

    >>> text = StopText(("\\n\\n",))
    >>> text.push("a\\n"), text.push("b\\n"), text.push("\\nc"), text.stopped
    ('a', '\\nb', '', True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(
            (n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held
