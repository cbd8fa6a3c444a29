"""The loop that writes one text from k rows: stopping, choosing, counting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_plugins.decoding import Decoded, OneRow, decode_rows
from rlm_plugins.errors import ModelError, UsageError
from rlm_plugins.flows import arun, iterate, run
from rlm_plugins.methods.replug.mixture import TokenMixture
from rlm_plugins.mixtures import log_softmax, mixture, temper
from rlm_plugins.requests import Advance, OpenRows, Sampling
from rlm_plugins.testing import BOS, END, VOCABULARY, ByteTokenizer, ScriptedModel
from rlm_plugins.texts import Message, Passage

Rows = Callable[[list[int]], Any]


class Table:
    """Rows that a function of the tokens so far gives; remembers what was asked and what every row was told."""

    def __init__(self, rows: Rows, *, prompts: int = 1) -> None:
        self.rows, self.written, self.closed, self.advanced = rows, list[int](), 0, 0
        self.prompt_tokens, self.cached_prompt_tokens = 10 * prompts, 4

    @property
    def logprobs(self) -> Any:
        return self.rows(self.written)

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.close()

    def answer(self, batch: Any) -> list[Any]:
        [request] = batch
        if isinstance(request, OpenRows):
            self.opened = request.prompts
            return [self]
        assert isinstance(request, Advance)
        assert request.rows is self
        self.advanced += 1
        self.written.append(request.token_id)
        return [self.logprobs]

    async def aanswer(self, batch: Any) -> list[Any]:
        return self.answer(batch)


def spelled(text: str, confidence: float = 0.9) -> Rows:
    """One row that spells a text and ends."""
    script = [*text.encode(), END]

    def rows(written: list[int]) -> Any:
        row = np.full(VOCABULARY, (1 - confidence) / (VOCABULARY - 1))
        row[script[len(written)] if len(written) < len(script) else END] = confidence
        return np.log(row).astype(np.float32)[None]

    return rows


def decode(table: Table, mixer: Any = None, sampling: Sampling | None = None, **options: Any) -> Decoded:
    prompts = [(BOS, 1)] * table.logprobs.shape[0]
    flow = decode_rows(prompts, mixer or OneRow(), ByteTokenizer(), sampling or Sampling(), **options)
    return run(flow, table)


# --- stopping --------------------------------------------------------------------------------------------------------


def test_the_end_token_ends_the_text_and_is_counted_but_not_part_of_it() -> None:
    table = Table(spelled("né日"))
    done = decode(table)
    assert (done.text, done.finish_reason) == ("né日", "stop")
    assert done.token_ids == tuple("né日".encode())
    assert done.usage.completion_tokens == len("né日".encode()) + 1
    assert (done.usage.calls, done.usage.prompt_tokens, done.usage.cached_prompt_tokens) == (1, 10, 4)
    assert done.usage.requests == 0
    assert table.closed == 1


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens_is_respected_exactly_and_the_last_token_computes_nothing_more(limit: int) -> None:
    table = Table(spelled("abcdef"))
    done = decode(table, sampling=Sampling(max_tokens=limit))
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("abcdef"[:limit], "length", limit)
    assert table.advanced == limit - 1


def test_an_answer_of_exactly_max_tokens_has_had_no_room_for_its_end() -> None:
    assert decode(Table(spelled("ab")), sampling=Sampling(max_tokens=2)).finish_reason == "length"
    assert decode(Table(spelled("ab")), sampling=Sampling(max_tokens=3)).finish_reason == "stop"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    done = decode(Table(spelled("one\n\ntwo")), sampling=Sampling(stop=("\n\n", "never")))
    assert (done.text, done.finish_reason) == ("one", "stop")
    assert done.usage.completion_tokens == 5, "the stop string was paid for"
    assert bytes(done.token_ids) == b"one\n\n"


def test_half_a_stop_string_at_the_end_is_text() -> None:
    assert decode(Table(spelled("one\n")), sampling=Sampling(stop=("\n\n",))).text == "one\n"
    assert decode(Table(spelled("one\n?")), sampling=Sampling(stop=("\n\n",), max_tokens=4)).text == "one\n"


def test_a_character_cut_by_max_tokens_shows_as_the_replacement_character() -> None:
    assert decode(Table(spelled("a日")), sampling=Sampling(max_tokens=3)).text == "a\ufffd"


def test_the_lead_is_taken_off_the_beginning_once() -> None:
    assert decode(Table(spelled("  a b")), lead=" ").text == " a b"
    assert decode(Table(spelled("a b")), lead=" ").text == "a b"
    assert decode(Table(spelled(" a")), lead="").text == " a"
    assert decode(Table(spelled(" ")), lead=" ").text == ""


@settings(max_examples=30, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.lists(st.text("ab é", min_size=1, max_size=2))
)
def test_chunks_add_up_to_the_text_and_carry_every_token_of_it_once(text: str, stop: list[str]) -> None:
    flow = decode_rows([(BOS,)], OneRow(), ByteTokenizer(), Sampling(stop=tuple(stop)), lead=" ")
    course, chunks = iterate(flow, Table(spelled(" " + text))), list[Any]()
    while True:
        try:
            chunks.append(next(course))
        except StopIteration as end:
            done = end.value
            break
    assert "".join(chunk.text for chunk in chunks) == done.text
    carried = [token for chunk in chunks for token in chunk.tokens]
    assert carried == list(done.tokens[: len(carried)])
    if text and not any(one in text for one in stop):
        assert len(carried) == len(done.tokens)


# --- choosing --------------------------------------------------------------------------------------------------------


def random_rows(k: int, seed: int = 0, scale: float = 3.0) -> Rows:
    def rows(written: list[int]) -> Any:
        rng = np.random.default_rng([seed, *written])
        logits = rng.normal(scale=scale, size=(k, VOCABULARY))
        logits[:, [*range(128, VOCABULARY)]] -= 50  # plain letters, no end
        return log_softmax(logits).astype(np.float32)

    return rows


def ensemble(k: int, **fields: Any) -> TokenMixture:
    weights = np.log(np.random.default_rng(k).dirichlet(np.ones(k)))
    return TokenMixture(weights, replaceable=np.ones(k, dtype=bool), **fields)


def test_greedy_is_the_argmax_of_the_mixture_at_temperature_1() -> None:
    table, mixer = Table(random_rows(4)), ensemble(4)
    done = decode(table, mixer, Sampling(max_tokens=12))
    for step, token in enumerate(done.tokens):
        mixed = mixture(mixer.log_weights, random_rows(4)(list(done.token_ids[:step])).astype(np.float64))
        assert token.token_id == mixed.argmax()
        assert token.logprob == pytest.approx(mixed.max(), abs=1e-5)


def test_every_row_gets_the_same_token_when_sampling() -> None:
    table = Table(random_rows(5), prompts=5)
    done = decode(table, ensemble(5, greedy=False), Sampling(temperature=1.3, max_tokens=20, seed=3))
    assert table.written == list(done.token_ids[:-1])
    assert len(table.opened) == 5
    assert done.usage.calls == 5


def test_a_seed_repeats_the_text_and_another_changes_it() -> None:
    def text(seed: int | None) -> str:
        return decode(Table(random_rows(2)), ensemble(2), Sampling(temperature=1.0, max_tokens=20, seed=seed)).text

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert len({text(None) for _ in range(3)}) == 3


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    decode(Table(random_rows(2)), ensemble(2), Sampling(temperature=1.0, max_tokens=5, seed=1))
    assert np.random.get_state()[1].tolist() == state


def frequencies(rows: Any, mixer: TokenMixture, sampling: Sampling, draws: int) -> Counter[int]:
    """First tokens of `draws` texts, their seeds 0, 1, 2, ..."""
    found: Counter[int] = Counter()
    for seed in range(draws):
        one = Sampling(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=1, seed=seed)
        found[decode(Table(lambda _: rows), mixer, one).token_ids[0]] += 1
    return found


def test_sampling_follows_the_tempered_mixture_cut_by_top_p_after_mixing() -> None:
    """Chi-square over the 7 tokens kept, at the level .001. With 1,500 draws, a distribution that is off by .05 in one
    of them, as that of tempering after mixing is, would be rejected with a power above .95."""
    size, temperature, top_p, draws = 8, 2.0, 0.9, 1500
    rows = np.full((2, VOCABULARY), -np.inf, dtype=np.float32)
    rows[:, :size] = np.log(
        [[0.80, 0.10, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01], [0.02, 0.02, 0.02, 0.04, 0.10, 0.70, 0.05, 0.05]]
    )
    weights = np.log([0.7, 0.3])
    mixed = np.exp(weights) @ np.exp(temper(rows[:, :size].astype(np.float64), temperature))
    order = np.argsort(-mixed)
    kept = order[: 1 + int((np.cumsum(mixed[order]) < top_p).sum())]
    expected = np.zeros(size)
    expected[kept] = mixed[kept] / mixed[kept].sum()
    mixer = TokenMixture(weights, replaceable=np.ones(2, dtype=bool), greedy=False)
    counts = frequencies(rows, mixer, Sampling(temperature=temperature, top_p=top_p), draws)
    assert set(counts) <= set(kept.tolist()), "a token outside the nucleus was drawn"
    assert len(kept) == 7
    chi = sum((counts[int(v)] - draws * expected[v]) ** 2 / (draws * expected[v]) for v in kept)
    assert chi < 22.46  # the .999 quantile at 6 degrees of freedom
    after = temper(mixture(weights, rows[:, :size].astype(np.float64))[None], temperature)[0]
    assert abs(np.exp(after) - mixed).max() > 0.05, "the case does not tell tempering before from after mixing"


def test_a_tiny_top_p_is_greedy_and_a_tiny_temperature_too() -> None:
    greedy = decode(Table(random_rows(3)), ensemble(3), Sampling(max_tokens=8)).token_ids
    narrow = Sampling(temperature=1.0, top_p=1e-9, max_tokens=8, seed=5)
    assert decode(Table(random_rows(3)), ensemble(3), narrow).token_ids == greedy
    cold = Sampling(temperature=1e-40, max_tokens=8, seed=5)
    one = decode(Table(random_rows(1)), OneRow(), Sampling(max_tokens=8)).token_ids
    assert decode(Table(random_rows(1)), OneRow(), cold).token_ids == one


def test_alternatives_are_the_best_tokens_of_the_mixture_in_order() -> None:
    done = decode(Table(random_rows(2)), ensemble(2), Sampling(max_tokens=3), top_logprobs=5)
    for token in done.tokens:
        values = [logprob for _, logprob in token.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert token.top[0] == (token.token, token.logprob)
    assert decode(Table(random_rows(2)), ensemble(2), Sampling(max_tokens=1)).tokens[0].top == ()
    everything = decode(Table(random_rows(1)), OneRow(), Sampling(max_tokens=1), top_logprobs=9999).tokens[0].top
    assert len(everything) == VOCABULARY


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 2])
def test_nan_is_an_error_that_names_the_prompt_and_the_place(step: int) -> None:
    def rows(written: list[int]) -> Any:
        values = random_rows(3)(written).copy()
        if len(written) == step:
            values[1, 7] = np.nan
        return values

    table = Table(rows)
    with pytest.raises(ModelError, match=f"NaN log-probabilities for prompt 1 at token {step}"):
        decode(table, ensemble(3))
    assert table.closed == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": "\n"},
    ],
)
def test_sampling_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        Sampling(**fields)


# --- a whole model ---------------------------------------------------------------------------------------------------


def test_a_loop_on_an_event_loop_writes_the_same() -> None:
    def flow() -> Any:
        sampling = Sampling(temperature=1.0, max_tokens=9, seed=4)
        return decode_rows([(BOS,)] * 2, ensemble(2), ByteTokenizer(), sampling)

    assert asyncio.run(arun(flow(), Table(random_rows(2)))) == run(flow(), Table(random_rows(2)))


def test_the_space_before_an_answer_is_not_part_of_it_and_that_inside_it_is() -> None:
    lm = ScriptedModel(lambda prompt: "Tinel" if prompt.endswith("Bora") else "Bora Tinel")
    assert lm.generate("Who?").text == "Bora Tinel"
    assert lm.generate([Message("user", "Who?")]).text == "Bora Tinel"
    assert lm.generate("Who?", answer_so_far="Bora").text == " Tinel"


def test_the_score_of_what_was_written_is_what_it_was_written_with() -> None:
    lm = ScriptedModel({"Velgar": "Bora Tinel"}, confidence=0.7)
    for prompt in ("Velgar?", [Message("user", "Velgar?")]):
        written = lm.generate(prompt, documents=[Passage("D")])
        scored = lm.score(prompt, written.text, documents=[Passage("D")])
        assert [t.token_id for t in scored.tokens] == [t.token_id for t in written.tokens]
        np.testing.assert_allclose([t.logprob for t in scored.tokens], [t.logprob for t in written.tokens], atol=1e-6)
        ended = lm.score(prompt, written.text, documents=[Passage("D")], include_end=True)
        assert ended.tokens[:-1] == scored.tokens
        assert ended.tokens[-1].token_id == END


def test_rows_are_closed_when_a_stream_is_left_early() -> None:
    lm = ScriptedModel({"Velgar": "Bora Tinel"})
    stream = lm.stream("Velgar?")
    assert next(iter(stream)).text == "B"
    assert not lm.runner.opened[-1].closed
    stream.close()  # type: ignore[attr-defined]
    assert lm.runner.opened[-1].closed
