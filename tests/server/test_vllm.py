"""Our endpoint models on a real server, against the same weights in this process, within 1e-4."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
from rlm_plugins.backends.transformers_local import TransformersLM
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.models import probe
from rlm_plugins.requests import GenerateIds, Sampling
from rlm_plugins.texts import Message, Passage

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

QUESTION = "Who founded Velgar?"
DOCUMENTS = [
    Passage("Bora Tinel founded Velgar.", score=0.9, score_kind="cosine"),
    Passage("Quorin trades in tin.", score=0.85, score_kind="cosine"),
    Passage("The flag of Velgar is red and green.", score=0.8, score_kind="cosine"),
]
SAMPLING = Sampling(max_tokens=12)
CLOSE = 1e-4


@pytest.fixture(scope="module")
def local(folder: Any) -> TransformersLM:
    return TransformersLM(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def lm(vllm: Any, local: TransformersLM) -> Iterator[OpenAICompatibleLM]:
    model = OpenAICompatibleLM(vllm.model, base_url=vllm.base_url, tokenizer=local.tokenizer)
    yield model
    model.close()


def values(tokens: Any) -> list[float]:
    return [token.logprob for token in tokens]


def test_the_probe_finds_what_the_server_gives(lm: OpenAICompatibleLM) -> None:
    found = probe(lm)
    assert found.output_logprobs
    assert found.top_logprobs == 20
    assert found.prompt_logprobs
    assert found.continuation == "completions"
    assert found.batched_prompts
    assert found.token_ids
    assert found.logit_bias == "raw"
    assert found.repeatability <= CLOSE
    assert lm.context_window is not None


@pytest.mark.parametrize("how", ["run", "arun", "stream", "astream"])
def test_greedy_text_and_logprobs(lm: OpenAICompatibleLM, local: TransformersLM, how: str) -> None:
    expected = local.generate(QUESTION, documents=DOCUMENTS[:1], sampling=SAMPLING, top_logprobs=5)
    asked: Any = {"documents": DOCUMENTS[:1], "sampling": SAMPLING, "top_logprobs": 5}

    async def in_loop() -> Any:
        if how == "arun":
            return await lm.agenerate(QUESTION, **asked)
        return [chunk async for chunk in lm.astream(QUESTION, **asked)][-1].final

    if how == "run":
        found: Any = lm.generate(QUESTION, **asked)
    elif how == "stream":
        found = list(lm.stream(QUESTION, **asked))[-1].final
    else:
        found = asyncio.run(in_loop())
    assert found.text == expected.text
    assert [token.token_id for token in found.tokens] == [token.token_id for token in expected.tokens]
    assert values(found.tokens) == pytest.approx(values(expected.tokens), abs=CLOSE)
    for one, other in zip(found.tokens, expected.tokens, strict=True):
        assert [value for _, value in one.top[:5]] == pytest.approx([value for _, value in other.top], abs=CLOSE)


@pytest.mark.parametrize("scoring", ["echo", "prompt_logprobs", "forced"])
@pytest.mark.parametrize("text", ["Bora Tinel", "né à Köln ☕"])
def test_scores(vllm: Any, local: TransformersLM, scoring: Any, text: str) -> None:
    expected = local.score(QUESTION, text, documents=DOCUMENTS[:1])
    lm = OpenAICompatibleLM(vllm.model, base_url=vllm.base_url, tokenizer=local.tokenizer, scoring=scoring)
    found = lm.score(QUESTION, text, documents=DOCUMENTS[:1])
    ended = lm.score(QUESTION, text, documents=DOCUMENTS[:1], include_end=True)
    lm.close()
    assert [token.token_id for token in found.tokens] == [token.token_id for token in expected.tokens]
    assert values(found.tokens) == pytest.approx(values(expected.tokens), abs=CLOSE)
    local_end = local.score(QUESTION, text, documents=DOCUMENTS[:1], include_end=True)
    assert values(ended.tokens) == pytest.approx(values(local_end.tokens), abs=CLOSE)


def test_a_text_is_scored_without_a_tokenizer(vllm: Any, local: TransformersLM) -> None:
    lm = OpenAICompatibleLM(vllm.model, base_url=vllm.base_url)
    assert probe(lm).prompt_logprobs
    found = lm.score(QUESTION, "Bora Tinel", documents=DOCUMENTS[:1])
    lm.close()
    assert found.logprob == pytest.approx(
        local.score(QUESTION, "Bora Tinel", documents=DOCUMENTS[:1]).logprob, abs=1e-3
    )


def test_the_end_token_has_an_entry(lm: OpenAICompatibleLM, local: TransformersLM) -> None:
    """Forced to end, the server still says what it listed: the naive loop needs that."""
    [end, *_] = sorted(local.tokenizer.end_ids)  # type: ignore[union-attr]
    biased = OpenAICompatibleLM(
        lm.name,
        base_url=lm.address,
        tokenizer=local.tokenizer,
        capabilities=probe(lm),
        extra_body={"logit_bias": {str(end): 100}},
    )
    prompt = (local.tokenizer.bos_id or 0, *local.tokenizer.encode("Velgar"))  # type: ignore[union-attr]
    [found] = biased.answer([GenerateIds(prompt, Sampling(max_tokens=1), 20)])
    biased.close()
    assert found.finish_reason == "stop"
    assert found.tokens[0].token_id == end
    assert len(found.tokens[0].top_ids) >= 20


def test_prompts_in_one_request(lm: OpenAICompatibleLM, local: TransformersLM) -> None:
    probe(lm)
    prompts = [(local.tokenizer.bos_id or 0, *local.tokenizer.encode(d.text)) for d in DOCUMENTS]  # type: ignore[union-attr]
    found = lm.answer([GenerateIds(prompt, SAMPLING, 3) for prompt in prompts])
    alone = [lm.answer([GenerateIds(prompt, SAMPLING, 3)])[0] for prompt in prompts]
    assert sum(one.usage.requests for one in found) == 1
    for one, other in zip(found, alone, strict=True):
        assert values(one.tokens) == pytest.approx(values(other.tokens), abs=CLOSE)


def test_a_chat_is_continued_and_scored(vllm: Any, local: TransformersLM) -> None:
    lm = OpenAICompatibleLM(vllm.model, base_url=vllm.base_url, endpoint="chat", tokenizer=local.tokenizer)
    can = probe(lm)
    assert can.output_logprobs
    conversation = [Message("user", QUESTION)]
    whole = lm.generate(conversation, sampling=SAMPLING)
    lm.close()
    # a random model's answer may begin with a space, which templates trim: then going on with it is another text
    assert can.continuation in (None, "continue_final_message")
    assert values(whole.tokens) == pytest.approx(
        values(local.generate(conversation, sampling=SAMPLING).tokens), abs=CLOSE
    )


@pytest.mark.parametrize("how", ["run", "arun"])
def test_replug_over_the_server_is_replug_over_the_weights(
    lm: OpenAICompatibleLM, local: TransformersLM, how: str
) -> None:
    expected = Replug(local).generate(QUESTION, documents=DOCUMENTS, sampling=SAMPLING)
    asked: Any = {"documents": DOCUMENTS, "sampling": SAMPLING}
    ensemble = Replug(lm, trace="full")
    found = ensemble.generate(QUESTION, **asked) if how == "run" else asyncio.run(ensemble.agenerate(QUESTION, **asked))
    assert found.trace is not None
    assert found.trace["method"] == "naive"
    certified = found.trace["tokens"]["certified"]
    same = [one.token_id == other.token_id for one, other in zip(found.tokens, expected.tokens, strict=False)]
    assert all(same[: certified.index(False)] if False in certified else same)
    if all(certified):
        assert found.text == expected.text
    scored = ensemble.score(QUESTION, "Bora Tinel", documents=DOCUMENTS)
    assert values(scored.tokens) == pytest.approx(
        values(Replug(local).score(QUESTION, "Bora Tinel", documents=DOCUMENTS).tokens), abs=CLOSE
    )


def test_a_stream_that_is_closed_ends(lm: OpenAICompatibleLM) -> None:
    chunks = lm.stream(QUESTION, sampling=replace(SAMPLING, max_tokens=400))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert lm.generate(QUESTION, sampling=SAMPLING).tokens
