"""Boundaries, prompts that fit, text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlm_plugins.decoding import scoring_rows
from rlm_plugins.errors import UsageError
from rlm_plugins.prompts import CONTINUATION, QUESTION_ANSWER, render_messages, render_text
from rlm_plugins.requests import Score
from rlm_plugins.testing import BOS, END, ByteTokenizer
from rlm_plugins.texts import Message, Passage
from rlm_plugins.tokens import (
    IncrementalText,
    StopText,
    answer_lead,
    continuation_ids,
    cut_document,
    encode_prompt,
    fit_prompt,
    with_bos,
)

modest = settings(max_examples=60, deadline=None)
bytes_only = ByteTokenizer()


class TrainedTokenizer:
    """A real byte-level BPE, trained on the spot; no BOS and no chat template."""

    bos_id: int | None = None
    end_ids = frozenset[int]()

    def __init__(self) -> None:
        self.bpe = HFTokenizer(models.BPE())
        self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        self.bpe.train_from_iterator(["the cat sat on the mat. the answer: cat! the catalogue " * 3], trainer)

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.bpe.decode(list(ids))

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        return None


@cache
def trained() -> TrainedTokenizer:
    return TrainedTokenizer()


class FallbackTokenizer(TrainedTokenizer):
    """Bytes as SentencePiece models fall back to them: a run of bytes is decoded as one, and if it is not whole, every
    byte of it is U+FFFD."""

    def __init__(self) -> None:
        self.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return self.decoder.decode([chr(i) if 32 <= i < 127 else f"<0x{i:02X}>" for i in ids])


words = st.text(alphabet="thecatsonmw .:!é日😀\n", max_size=24)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


# --- the boundary between context and continuation -------------------------------------------------------------------


@modest
@given(words, words.filter(bool))
def test_context_and_continuation_are_the_tokens_of_the_whole_text(context: str, continuation: str) -> None:
    tokenizer = trained()
    before, after = continuation_ids(tokenizer, context, continuation)
    assert before + after == tokenizer.encode(context + continuation)
    assert after
    assert tokenizer.encode(context)[: len(before)] == before, "the context tokens are the context's own"


@modest
@given(words, words.filter(bool))
def test_the_cut_backs_off_no_further_than_the_merge(context: str, continuation: str) -> None:
    tokenizer = trained()
    before, after = continuation_ids(tokenizer, context, continuation)
    alone = tokenizer.encode(context)
    if len(before) < len(alone):
        assert after[0] != alone[len(before)], "one token more would have been the context's own too"


def test_a_merge_across_the_boundary_moves_the_cut_into_the_context() -> None:
    tokenizer = trained()
    whole = tokenizer.encode("the cat")
    assert len(whole) < len(tokenizer.encode("the c")) + len(tokenizer.encode("at")), "no merge: the test shows nothing"
    before, after = continuation_ids(tokenizer, "the c", "at")
    assert tokenizer.decode(after).endswith("cat")
    assert before + after == whole


def test_an_empty_context_is_all_continuation_and_an_empty_continuation_is_refused() -> None:
    assert continuation_ids(bytes_only, "", "ab") == ([], [97, 98])
    with pytest.raises(UsageError, match="empty"):
        continuation_ids(bytes_only, "ab", "")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_bos_stands_once_at_the_front_and_only_where_there_is_one() -> None:
    assert with_bos(bytes_only, [1]) == (BOS, 1)
    assert with_bos(bytes_only, [BOS, 1]) == (BOS, 1)
    assert with_bos(bytes_only, []) == (BOS,)
    assert with_bos(trained(), [1]) == (1,)
    for prompt in ("who?", (Message("user", "who?"),)):
        ids = encode_prompt(bytes_only, QUESTION_ANSWER, prompt, [Passage("a")], answer_so_far="x")
        assert [at for at, token in enumerate(ids) if token == BOS] == [0]


def test_a_conversation_without_a_chat_template_is_written_in_the_templates_words() -> None:
    messages = (
        Message("system", "Be brief."),
        Message("user", "first?"),
        Message("assistant", "one"),
        Message("user", "second?"),
    )
    ids = encode_prompt(trained(), QUESTION_ANSWER, messages, [Passage("D", title="T")], answer_so_far="so far")
    assert trained().decode(ids) == (
        "Be brief.\nQuestion: first?\nAnswer: one\nDocument (T): D\nQuestion: second?\nAnswer: so far"
    )


def test_a_conversation_with_a_chat_template_carries_documents_before_the_last_question() -> None:
    ids = encode_prompt(bytes_only, QUESTION_ANSWER, (Message("user", "q?"),), [Passage("D")], answer_so_far="so")
    assert bytes_only.decode(ids) == "user: Document: D\nQuestion: q?\nassistant: so"


class ChatML(ByteTokenizer):
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        turns = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        return self.encode(turns + "<|im_start|>assistant\n")


def test_after_a_chat_template_that_ends_its_line_the_answer_begins_without_a_space() -> None:
    chat = (Message("user", "q?"),)
    ids = encode_prompt(ChatML(), QUESTION_ANSWER, chat, (), answer_so_far="Paris")
    assert ChatML().decode(ids).endswith("assistant\nParis")
    assert answer_lead(ChatML(), QUESTION_ANSWER, chat, encode_prompt(ChatML(), QUESTION_ANSWER, chat)) == ""
    assert answer_lead(bytes_only, QUESTION_ANSWER, chat, encode_prompt(bytes_only, QUESTION_ANSWER, chat)) == " "
    assert answer_lead(ChatML(), QUESTION_ANSWER, "q?", encode_prompt(ChatML(), QUESTION_ANSWER, "q?")) == " "
    assert answer_lead(bytes_only, CONTINUATION, "q?", (97,)) == ""
    request = Score(chat, "Paris")
    [[_], [target]] = scoring_rows(ChatML(), QUESTION_ANSWER, request, [()], context_window=None)
    assert ChatML().decode(target) == "Paris"


def test_scored_rows_are_the_prompt_the_space_the_continuation_and_the_end() -> None:
    request = Score("q?", "Paris", include_end=True)
    [[prompt], [target]] = scoring_rows(bytes_only, QUESTION_ANSWER, request, [(Passage("D"),)], context_window=None)
    assert prompt == encode_prompt(bytes_only, QUESTION_ANSWER, "q?", [Passage("D")])
    assert target == (*b" Paris", END)


# --- what is too long ------------------------------------------------------------------------------------------------


@modest
@given(
    st.lists(words, min_size=1, max_size=3),
    st.integers(0, 60),
    st.integers(1, 9),
    st.sampled_from([None, 3]),
    st.booleans(),
)
def test_the_window_is_respected_exactly_and_the_question_never_cut(
    texts: list[str], spare: int, reserve: int, longest: int | None, by_bytes: bool
) -> None:
    tokenizer = bytes_only if by_bytes else trained()
    documents = tuple(Passage(text, id=str(i), title="t") for i, text in enumerate(texts))
    bare = len(encode_prompt(tokenizer, QUESTION_ANSWER, "who?", [Passage("", title="t")] * len(texts)))
    window = bare + reserve + spare
    ids, sent = fit_prompt(
        tokenizer,
        QUESTION_ANSWER,
        "who?",
        documents,
        context_window=window,
        reserve=reserve,
        max_document_tokens=longest,
    )
    assert len(ids) + reserve <= window
    assert ids == encode_prompt(tokenizer, QUESTION_ANSWER, "who?", sent)
    assert tokenizer.decode(ids).endswith("Question: who?\nAnswer:")
    assert [one.id for one in sent] == [one.id for one in documents]
    assert all(whole.text.startswith(cut.text) for whole, cut in zip(documents, sent, strict=True))
    if longest is not None:
        assert by_bytes is False or all(len(one.text.encode()) <= longest for one in sent)


def test_no_longer_common_cut_would_have_fitted() -> None:
    documents = (Passage("a" * 50), Passage("b" * 8), Passage("c" * 30))
    bare = len(encode_prompt(bytes_only, QUESTION_ANSWER, "q", [Passage("")] * 3))
    for room in range(60):
        _, sent = fit_prompt(bytes_only, QUESTION_ANSWER, "q", documents, context_window=bare + room + 5, reserve=5)
        best = max(n for n in range(51) if sum(min(n, len(one.text)) for one in documents) <= room)
        assert [len(one.text) for one in sent] == [min(best, 50), min(best, 8), min(best, 30)]


def test_what_fits_is_sent_as_it_is() -> None:
    documents = (Passage("a" * 50, id="x", metadata={"n": 1}),)
    ids = encode_prompt(bytes_only, QUESTION_ANSWER, "q", documents)
    for window in (None, len(ids) + 5):
        assert fit_prompt(bytes_only, QUESTION_ANSWER, "q", documents, context_window=window, reserve=5) == (
            ids,
            documents,
        )


@pytest.mark.parametrize("documents", [(), (Passage("long " * 50),)])
def test_a_question_that_does_not_fit_is_the_callers_to_mend(documents: tuple[Passage, ...]) -> None:
    with pytest.raises(UsageError, match=r"the question needs \d+ tokens and 7 are kept .* window is 30"):
        fit_prompt(bytes_only, QUESTION_ANSWER, "question " * 9, documents, context_window=30, reserve=7)


@modest
@given(any_text, st.integers(0, 40))
def test_a_document_is_cut_at_a_whole_character_in_any_script(text: str, most: int) -> None:
    text = text.replace("\ufffd", "?")
    document = Passage(text, id="x", title="t", score=0.5, score_kind="cosine", metadata={"page": 3})
    cut = cut_document(bytes_only, document, most)
    assert text.startswith(cut.text)
    assert len(cut.text.encode()) <= most
    following = text[len(cut.text) :][:1]
    assert not following or len((cut.text + following).encode()) > most, "one character more would have fitted"
    assert (cut.id, cut.title, cut.score, cut.score_kind, cut.metadata) == ("x", "t", 0.5, "cosine", {"page": 3})


def test_a_character_of_several_tokens_counts_them_all() -> None:
    assert cut_document(bytes_only, Passage("日本語"), 4).text == "日"
    assert cut_document(bytes_only, Passage("日本語"), 2).text == ""


# --- pieces ----------------------------------------------------------------------------------------------------------


@modest
@given(any_text, st.sampled_from(["bytes", "bpe", "fallback"]))
def test_pieces_add_up_to_the_whole_decoded_text(text: str, kind: str) -> None:
    tokenizer = {"bytes": ByteTokenizer, "bpe": trained, "fallback": FallbackTokenizer}[kind]()
    pieces = IncrementalText(tokenizer)
    given_out = [pieces.push(token) for token in tokenizer.encode(text)]
    assert "".join(given_out) + pieces.rest() == text
    assert pieces.rest() == ""


@pytest.mark.parametrize("text", ["😀😀😀 日本語日本語", "né😀\ufffd\ufffd\ufffd日", "🧑‍🚀" * 5, "\ufffd" * 9 + "é"])
@pytest.mark.parametrize("kind", [ByteTokenizer, FallbackTokenizer])
def test_rare_characters_in_a_row_and_the_replacement_character_itself(kind: type, text: str) -> None:
    tokenizer = kind()
    pieces = IncrementalText(tokenizer)
    assert "".join([pieces.push(token) for token in tokenizer.encode(text)]) + pieces.rest() == text


def test_a_piece_is_given_out_as_soon_as_its_characters_are_whole() -> None:
    pieces = IncrementalText(bytes_only)
    assert [pieces.push(byte) for byte in "aé日".encode()] == ["a", "", "é", "", "", "日"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    pieces = IncrementalText(bytes_only)
    assert [pieces.push(byte) for byte in "a日".encode()[:-1]] == ["a", "", ""]
    assert pieces.rest() == "\ufffd"


def first_complete(text: str, stop: Sequence[str]) -> str:
    """Naively, character by character: up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 14), max_size=6),
)
def test_stop_strings_end_the_text_the_same_however_it_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    stops = StopText(stop)
    found = "".join(stops.push(piece) for piece in pieces)
    whole = first_complete(text, stop)
    assert stops.stopped == (whole != text or any(text.endswith(one) for one in stop))
    assert found + stops.rest() == whole
    assert text.startswith(found)


def test_nothing_that_could_be_a_stop_string_is_given_out_and_nothing_else_is_held() -> None:
    stops = StopText(("END",))
    assert [stops.push(piece) for piece in "an EN ENd E"] == [*"an ", "", "", "EN ", "", "", "ENd", " ", ""]
    assert stops.rest() == "E"


# --- markup ----------------------------------------------------------------------------------------------------------


@modest
@given(st.sampled_from(["{question}", "{text}", "{title}", "<s>", "</s>", "<|im_end|>", "{0}", "%s", "{{x}}", "\\n"]))
def test_markup_in_documents_titles_and_questions_is_plain_text(markup: str) -> None:
    document = Passage(f"d{markup}d", title=f"t{markup}t")
    expected = f"Document (t{markup}t): d{markup}d\nQuestion: q{markup}q\nAnswer: a{markup}"
    assert render_text(QUESTION_ANSWER, f"q{markup}q", [document], answer_so_far=f" a{markup}") == expected
    [message] = render_messages(QUESTION_ANSWER, [Message("user", f"q{markup}q")], [document])
    assert message.content == expected.rpartition("\nAnswer")[0]
    ids = encode_prompt(bytes_only, QUESTION_ANSWER, f"q{markup}q", [document], answer_so_far=f"a{markup}")
    assert bytes_only.decode(ids) == expected
    assert not set(ids[1:]) & {BOS, END}
