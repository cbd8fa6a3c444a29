"""An endpoint model against the model that stands behind the endpoint, whatever the endpoint is like."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("openai")

from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
from rlm_plugins.capabilities import Capabilities
from rlm_plugins.errors import ModelError, Unsupported, UsageError
from rlm_plugins.flows import Failed
from rlm_plugins.loopback import Failure, LoopbackEndpoint, Quirks
from rlm_plugins.prompts import QUESTION_ANSWER, render_messages
from rlm_plugins.requests import Generate, GenerateIds, Sampling, ScoreRows
from rlm_plugins.testing import ByteTokenizer, RandomModel
from rlm_plugins.texts import Generation, Message, Passage

LOCAL = RandomModel({"\U0001f71a\u2603": "né né", "Say snow.\nAnswer:": " sn\u2603w!"})
GOOD = Capabilities(
    output_logprobs=True,
    top_logprobs=20,
    prompt_logprobs=True,
    continuation="completions",
    batched_prompts=True,
    token_ids=True,
    logit_bias="raw",
)
SHORT = Sampling(max_tokens=10)
CHAT = (Message("user", "Who founded Velgar?"),)
DOCUMENTS = [Passage("Bora Tinel founded Velgar."), Passage("Quorin trades in tin.")]


@contextmanager
def served(quirks: Quirks | None = None, *, delay: float = 0.0, **options: Any) -> Iterator[Any]:
    """The endpoint and a model on it."""
    with LoopbackEndpoint(LOCAL, quirks=quirks, delay=delay) as endpoint:
        options = {"tokenizer": ByteTokenizer(), "max_retries": 0, "timeout": 20.0, **options}
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, **options)
        yield endpoint, lm
        lm.close()


def generated(lm: Any, how: str, prompt: Any = "Who founded Velgar?", **options: Any) -> Generation:
    """One generation, by each way of asking."""
    options = {"sampling": SHORT, **options}

    async def in_loop() -> Generation:
        return await lm.agenerate(prompt, **options)

    async def streamed() -> Generation:
        return [chunk async for chunk in lm.astream(prompt, **options)][-1].final

    if how == "run":
        return lm.generate(prompt, **options)
    if how == "arun":
        return asyncio.run(in_loop())
    if how == "astream":
        return asyncio.run(streamed())
    chunks = list(lm.stream(prompt, **options))
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].final.text
    return chunks[-1].final


WAYS = ("run", "arun", "stream", "astream")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), None], ids=["ids", "text"])
def test_completions_write_what_the_model_writes(how: str, tokenizer: ByteTokenizer | None) -> None:
    expected = LOCAL.generate("Who founded Velgar?", documents=DOCUMENTS, sampling=SHORT, top_logprobs=3)
    with served(tokenizer=tokenizer) as (_, lm):
        found = generated(lm, how, documents=DOCUMENTS, top_logprobs=3)
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert [token.logprob for token in found.tokens] == pytest.approx([token.logprob for token in expected.tokens])
    assert found.tokens[0].top[0] == (expected.tokens[0].top[0][0], pytest.approx(expected.tokens[0].top[0][1]))
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.requests == 1


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("prompt", ["Who founded Velgar?", CHAT], ids=["question", "conversation"])
def test_chats_write_what_the_model_writes(how: str, prompt: Any) -> None:
    expected = LOCAL.generate(CHAT, documents=DOCUMENTS, sampling=SHORT)
    with served(endpoint="chat") as (_, lm):
        found = generated(lm, how, prompt, documents=DOCUMENTS)
    assert found.text == expected.text.removeprefix(" ")
    assert [token.logprob for token in found.tokens] == pytest.approx([token.logprob for token in expected.tokens])


@pytest.mark.parametrize("way", ["continue_final_message", "assistant_message", "prefix"])
def test_a_begun_answer_is_continued_by_each_strategy(way: Any) -> None:
    with served(Quirks(chat_continuation=way, completions=False)) as (_, lm):
        assert lm.capabilities.continuation == way
        whole = lm.generate(CHAT, sampling=SHORT).text
        rest = lm.generate(CHAT, answer_so_far=whole[:4], sampling=Sampling(max_tokens=6)).text
    assert whole[:4] + rest == whole


def test_a_completion_is_continued_by_its_prompt() -> None:
    with served() as (_, lm):
        whole = lm.generate("Who?", sampling=SHORT).text
        rest = lm.generate("Who?", answer_so_far=whole[:4], sampling=Sampling(max_tokens=6)).text
    assert (whole[:4] + rest)[:8] == whole[:8]


def test_a_chat_that_opens_a_new_turn_is_not_asked_to_go_on() -> None:
    with served(Quirks(chat_continuation="new_turn", completions=False)) as (endpoint, lm):
        assert lm.capabilities.continuation is None
        sent = len(endpoint.requests)
        with pytest.raises(Unsupported, match="continuation = None"):
            lm.generate(CHAT, answer_so_far="Bora")
        assert len(endpoint.requests) == sent


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
@pytest.mark.parametrize("scoring", ["echo", "prompt_logprobs", "forced"])
@pytest.mark.parametrize("token_ids", [True, False], ids=["ids", "text"])
def test_every_way_of_scoring_gives_the_models_values(scoring: Any, token_ids: bool, asynchronous: bool) -> None:
    text = "Bora né" if token_ids else "Bora"
    expected = LOCAL.score("Who founded Velgar?", text, documents=DOCUMENTS[:1])
    with served(Quirks(token_ids=token_ids), scoring=scoring) as (endpoint, lm):
        lm.capabilities  # noqa: B018
        sent = len(endpoint.requests)
        if asynchronous:
            found = asyncio.run(lm.ascore("Who founded Velgar?", text, documents=DOCUMENTS[:1]))
        else:
            found = lm.score("Who founded Velgar?", text, documents=DOCUMENTS[:1])
        calls = len(endpoint.requests) - sent
    assert [token.logprob for token in found.tokens] == pytest.approx(
        [token.logprob for token in expected.tokens], abs=1e-4
    )
    assert found.usage.calls == (len(expected.tokens) if scoring == "forced" else 1)
    assert found.usage.requests == calls <= found.usage.calls  # equal biases share a request


@pytest.mark.parametrize(("scoring", "why"), [("echo", "do not spell"), ("forced", "other tokens")])
def test_parts_of_characters_are_not_scored_as_text(scoring: Any, why: str) -> None:
    with served(Quirks(token_ids=False), scoring=scoring) as (_, lm), pytest.raises(ModelError, match=why):
        lm.score("Who founded Velgar?", "Bora né")


def test_a_text_without_a_tokenizer_is_scored_by_echo() -> None:
    expected = LOCAL.score("Who?", "Bora Tinel")
    with served(tokenizer=None) as (_, lm):
        found = lm.score("Who?", "Bora Tinel")
    assert [token.token for token in found.tokens] == list(" Bora Tinel")
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "forced"])
def test_an_answer_in_a_chat_is_scored(scoring: Any) -> None:
    before = ByteTokenizer().encode_chat(render_messages(QUESTION_ANSWER, CHAT))
    [[expected]] = LOCAL.below.answer([ScoreRows((tuple(before or ()),), (tuple(b"Bora Tinel"),))])
    with served(Quirks(completions=False), scoring=scoring) as (_, lm):
        found = lm.score(CHAT, "Bora Tinel")
    assert [token.logprob for token in found.tokens] == pytest.approx(expected.tolist(), abs=1e-4)


def test_token_ids_are_continued_and_scored_as_they_are() -> None:
    prompt = (256, *b"Velgar")
    [local] = LOCAL.below.answer([ScoreRows((prompt,), (tuple(b" trades"),))])
    with served() as (endpoint, lm):
        replies = lm.answer([GenerateIds(prompt, SHORT, 5), ScoreRows((prompt,), (tuple(b" trades"),))])
        assert endpoint.requests[-1]["prompt"][: len(prompt)] == list(prompt)
    assert len(replies[0].tokens[0].top_ids) == 5
    assert replies[0].tokens[0].token_id in replies[0].tokens[0].top_ids
    assert replies[1][0].tolist() == pytest.approx(local[0].tolist(), abs=1e-4)


def test_scoring_nothing_and_scoring_where_nothing_scores_are_refused() -> None:
    with served(Quirks(echo="refused", prompt_logprobs=False, logit_bias="ignored")) as (_, lm):
        with pytest.raises(UsageError, match="empty"):
            lm.score("Who?", "")
        with pytest.raises(Unsupported, match="prompt_logprobs"):
            lm.score("Who?", "Bora")


# --- quirks ----------------------------------------------------------------------------------------------------------


def test_entries_lost_with_parts_of_characters_leave_a_gap_that_is_marked() -> None:
    with served(Quirks(drops_partial_characters=True)) as (_, lm):
        assert not lm.capabilities.token_entries
        found = lm.generate("Say snow.")
    assert found.text == "sn\u2603w!"
    assert [token.token for token in found.tokens] == [" ", "s", "n", "\u2603", "w", "!"]
    assert [token.logprob is None for token in found.tokens] == [False, False, False, True, False, False]


def test_a_sampled_token_listed_first_is_put_in_its_place() -> None:
    with served(Quirks(sampled_first=True), endpoint="chat") as (_, lm):
        found = lm.generate(CHAT, sampling=Sampling(max_tokens=20, temperature=3.0, seed=1), top_logprobs=5)
    for token in found.tokens:
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)


def test_minus_9999_is_a_probability_of_zero() -> None:
    with served(Quirks(impossible=True)) as (_, lm):
        found = lm.generate("Who?", sampling=Sampling(max_tokens=1), top_logprobs=4)
    assert found.tokens[0].top[-1][1] == float("-inf")


def test_as_many_alternatives_are_asked_for_as_there_are() -> None:
    with served(Quirks(most_alternatives=5)) as (endpoint, lm):
        assert lm.capabilities.top_logprobs == 5
        found = lm.generate("Who?", sampling=Sampling(max_tokens=1), top_logprobs=20)
        assert endpoint.requests[-1]["logprobs"] == 5
    assert len(found.tokens[0].top) == 5


@pytest.mark.parametrize("logprobs", ["absent", "refused"])
def test_without_logprobs_text_is_written_and_alternatives_are_refused(logprobs: Any) -> None:
    with served(Quirks(logprobs=logprobs)) as (_, lm):
        assert not lm.capabilities.output_logprobs
        assert lm.generate("Who founded Velgar?", sampling=SHORT).tokens == ()
        with pytest.raises(Unsupported, match="output_logprobs"):
            lm.generate("Who founded Velgar?", top_logprobs=3)


def test_a_missing_model_is_named_with_what_there_is() -> None:
    nothing = Quirks(completions=False, chat=False, models=("other", "another"))
    with served(nothing) as (_, lm), pytest.raises(UsageError, match=r"'local'; the endpoint lists another, other"):
        lm.generate("Who?")


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
def test_prompts_of_one_batch_go_in_one_request(asynchronous: bool) -> None:
    batch = [Generate(f"Question {n}", sampling=SHORT) for n in range(10)]
    expected = [LOCAL.generate(request.prompt, sampling=SHORT).text for request in batch]
    with served(capabilities=GOOD) as (endpoint, lm):
        found = asyncio.run(lm.aanswer(batch)) if asynchronous else lm.answer(batch)
        assert [reply.text for reply in found] == expected
        assert len(endpoint.requests) == 1
        assert sum(reply.usage.requests for reply in found) == 1
        written = sum(len(reply.tokens) + (reply.finish_reason == "stop") for reply in found)
        assert sum(reply.usage.completion_tokens for reply in found) == written


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
def test_one_prompt_of_ten_that_is_refused_fails_alone(asynchronous: bool) -> None:
    batch = [Generate("x" * 9000 if n == 4 else f"Question {n}", sampling=SHORT) for n in range(10)]
    with served(capabilities=GOOD) as (_, lm):
        found = asyncio.run(lm.aanswer(batch)) if asynchronous else lm.answer(batch)
    assert [isinstance(reply, Failed) for reply in found] == [n == 4 for n in range(10)]
    assert "window" in str(found[4].error)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
def test_no_more_requests_than_allowed_are_under_way(asynchronous: bool) -> None:
    batch = [Generate(f"Question {n}", sampling=Sampling(max_tokens=1)) for n in range(12)]
    with served(Quirks(batched_prompts=False), delay=0.05, max_concurrency=3) as (endpoint, lm):
        found = asyncio.run(lm.aanswer(batch)) if asynchronous else lm.answer(batch)
        assert all(isinstance(reply, Generation) for reply in found)
        assert 1 < endpoint.most_running <= 3


def test_200_questions_on_one_event_loop_hold() -> None:
    async def ask_all() -> tuple[list[str], float]:
        worst = 0.0

        async def watch() -> None:
            nonlocal worst
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst = max(worst, time.perf_counter() - before)

        watching = asyncio.create_task(watch())
        asked = [lm.agenerate(f"Question {n}", sampling=Sampling(max_tokens=2)) for n in range(200)]
        found = [generation.text for generation in await asyncio.gather(*asked)]
        watching.cancel()
        return found, worst

    with served(max_concurrency=16) as (endpoint, lm):
        found, _ = asyncio.run(ask_all())
        assert found == [LOCAL.generate(f"Question {n}", sampling=Sampling(max_tokens=2)).text for n in range(200)]
        assert endpoint.most_running <= 16
        assert len(endpoint.requests) < 215  # probed once, however many began at the same time


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True], ids=["run", "arun"])
@pytest.mark.parametrize(
    ("failure", "expected", "retry_after"),
    [
        (Failure(status=429, retry_after="2"), "429", 2.0),
        (Failure(status=429), "429", None),
        (Failure(status=500), "500", None),
        (Failure(status=503, retry_after="0.5"), "503", 0.5),
        (Failure("body_cut"), "no whole answer", None),
        (Failure("not_json"), "cut short", None),
        (Failure("hang"), "did not answer within 0.5 seconds", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_may_pass_can_be_tried_again(
    failure: Failure, expected: str, retry_after: float | None, asynchronous: bool
) -> None:
    with served(capabilities=GOOD, timeout=0.5 if failure.kind == "hang" else 20.0) as (endpoint, lm):
        endpoint.fail(failure)
        with pytest.raises(ModelError, match=expected) as caught:
            generated(lm, "arun" if asynchronous else "run")
        assert caught.value.retryable
        assert caught.value.retry_after == retry_after
        assert endpoint.wait_idle()
        assert generated(lm, "run").text == LOCAL.generate("Who founded Velgar?", sampling=SHORT).text


@pytest.mark.parametrize(("status", "kind"), [(400, ModelError), (401, UsageError), (404, UsageError)])
def test_what_will_not_pass_is_not_to_be_tried_again(status: int, kind: type[Exception]) -> None:
    with served(capabilities=GOOD) as (endpoint, lm):
        endpoint.fail(Failure(status=status, message="that is no good"))
        with pytest.raises(kind, match="that is no good") as caught:
            generated(lm, "run")
    assert not getattr(caught.value, "retryable", False)


def test_the_sdks_own_retries_are_an_option() -> None:
    with served(capabilities=GOOD, max_retries=1) as (endpoint, lm):
        endpoint.fail(Failure(status=500))
        assert generated(lm, "run").text
        assert len(endpoint.requests) == 2


def test_a_refused_connection_can_be_tried_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lm = OpenAICompatibleLM("local", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
    for _ in range(2):
        with pytest.raises(ModelError, match="is the server running") as caught:
            lm.generate("Who?")
        assert caught.value.retryable
    lm.close()


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_stream_cut_in_the_middle_keeps_what_came(how: str) -> None:
    whole = LOCAL.generate("Who founded Velgar?", sampling=SHORT).text
    with served(capabilities=GOOD) as (endpoint, lm):
        endpoint.fail(Failure("stream_cut", after=4))
        with pytest.raises(ModelError) as caught:
            generated(lm, how)
        assert endpoint.wait_idle()
    assert caught.value.retryable
    assert caught.value.partial is not None
    assert caught.value.partial.text == whole[: len(caught.value.partial.text)] != ""
    assert caught.value.partial.usage.estimated


def test_a_stream_that_is_no_longer_read_ends_on_the_server() -> None:
    with served(capabilities=GOOD, delay=0.05) as (endpoint, lm):
        chunks = lm.stream("Who founded Velgar?", sampling=Sampling(max_tokens=500))
        next(chunks)
        chunks.close()
        assert endpoint.wait_idle()
        assert endpoint.abandoned == 1

        async def read_one() -> None:
            chunks = lm.astream("Who founded Velgar?", sampling=Sampling(max_tokens=500))
            await anext(chunks)
            await chunks.aclose()

        asyncio.run(read_one())
        assert endpoint.wait_idle()
        assert endpoint.abandoned == 2


def test_a_cancelled_task_leaves_no_request_running() -> None:
    async def cancel() -> None:
        task = asyncio.create_task(lm.aanswer([Generate(f"Question {n}", sampling=SHORT) for n in range(5)]))
        while endpoint.running < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    alone = Capabilities(output_logprobs=True, top_logprobs=20, continuation="completions", token_ids=True)
    with served(capabilities=alone) as (endpoint, lm):
        endpoint.fail(*[Failure("hang")] * 5)
        asyncio.run(cancel())
        assert endpoint.wait_idle()
        assert endpoint.abandoned == 5


# --- keys ------------------------------------------------------------------------------------------------------------

CANARY = "sk-canary-0123456789"


def test_the_key_is_sent_and_seen_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(capabilities=GOOD, api_key=CANARY) as (endpoint, lm):
        lm.generate("Who?", sampling=SHORT)
        assert endpoint.headers[0]["authorization"] == f"Bearer {CANARY}"
        seen = [repr(lm), str(lm), repr(vars(lm)), repr(lm.below), repr(vars(lm.below))]
        for status in (400, 401, 404, 429, 500):
            endpoint.fail(Failure(status=status, message=f"the key {CANARY} is no good"))
            with pytest.raises((ModelError, UsageError)) as caught:
                lm.generate("Who?", sampling=SHORT)
            error: BaseException | None = caught.value
            while error is not None:
                seen += [repr(error), str(error), repr(vars(error))]
                error = error.__cause__ or error.__context__
    assert CANARY not in "".join(seen)
    assert CANARY not in caplog.text


def test_a_model_with_a_key_cannot_be_written_to_disk() -> None:
    import pickle

    lm = OpenAICompatibleLM("local", base_url="http://127.0.0.1:9/v1", api_key=CANARY)
    with pytest.raises(TypeError):
        pickle.dumps(lm)


def test_the_environments_key_goes_to_the_default_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with served(capabilities=GOOD) as (endpoint, lm):
        lm.generate("Who?", sampling=SHORT)
        assert CANARY not in str(endpoint.headers)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        OpenAICompatibleLM("some-model")


def test_secrets_in_an_address_do_not_show() -> None:
    lm = OpenAICompatibleLM("m", base_url="https://user:pass-canary@example.test/v1?token=canary")
    assert "canary" not in repr(lm)


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "responses"},
        {"continuation": "prefil"},
        {"scoring": "guess"},
        {"max_concurrency": 0},
        {"timeout": 0},
        {"base_url": "127.0.0.1:8000"},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OpenAICompatibleLM("local", **{"base_url": "http://127.0.0.1:9/v1", **wrong})
