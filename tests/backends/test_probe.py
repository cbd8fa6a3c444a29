"""What the probe says about endpoints of every kind, and what asking costs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("openai")

from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
from rlm_plugins.capabilities import Capabilities
from rlm_plugins.errors import ModelError, UsageError
from rlm_plugins.loopback import Failure, LoopbackEndpoint, Quirks
from rlm_plugins.models import aprobe, probe
from rlm_plugins.testing import ByteTokenizer, RandomModel

LOCAL = RandomModel({"\U0001f71a\u2603": "né né"})
BEST = Capabilities(
    output_logprobs=True,
    top_logprobs=20,
    prompt_logprobs=True,
    continuation="completions",
    batched_prompts=True,
    token_ids=True,
    logit_bias="raw",
)
CHAT = replace(BEST, continuation="continue_final_message", batched_prompts=False, token_ids=False)
NOTHING = Capabilities()


def probed(quirks: Quirks, **options: Any) -> tuple[Capabilities, Any, int]:
    """Capabilities, how texts would be scored, and how many calls it took."""
    with LoopbackEndpoint(LOCAL, quirks=quirks) as endpoint:
        options = {"tokenizer": ByteTokenizer(), "max_retries": 0, **options}
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, **options)
        found = probe(lm)
        assert asyncio.run(aprobe(lm)) is found  # remembered
        lm.close()
        written = sum(body.get("max_tokens", 0) for body in endpoint.requests)
        assert written <= 40
        return found, lm.below.facts.scoring, len(endpoint.requests)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("quirks", "expected", "scoring"),
    [
        (Quirks(), BEST, "echo"),
        (Quirks(echo="ignored"), BEST, "prompt_logprobs"),
        (Quirks(echo="refused"), BEST, "prompt_logprobs"),
        (Quirks(echo="off_by_one"), BEST, "prompt_logprobs"),
        (Quirks(echo="off_by_one", prompt_logprobs=False), replace(BEST, prompt_logprobs=False), "forced"),
        (Quirks(echo="ignored", prompt_logprobs=False), replace(BEST, prompt_logprobs=False), "forced"),
        (
            Quirks(echo="ignored", prompt_logprobs=False, logit_bias="biased"),
            replace(BEST, prompt_logprobs=False, logit_bias="biased"),
            None,
        ),
        (
            Quirks(echo="ignored", prompt_logprobs=False, logit_bias="ignored"),
            replace(BEST, prompt_logprobs=False, logit_bias=None),
            None,
        ),
        (Quirks(most_alternatives=5), replace(BEST, top_logprobs=5), "echo"),
        (Quirks(most_alternatives=3, too_many="fewer"), replace(BEST, top_logprobs=3), "echo"),
        (Quirks(batched_prompts=False), replace(BEST, batched_prompts=False), "echo"),
        (Quirks(token_ids=False), replace(BEST, token_ids=False), "echo"),
        (Quirks(names_ids=False), BEST, "echo"),
        (Quirks(models=None), BEST, "echo"),
        (Quirks(end_entry=False), BEST, "echo"),
        (Quirks(usage=False), BEST, "echo"),
        (Quirks(completions=False), CHAT, "prompt_logprobs"),
        (
            Quirks(completions=False, chat_continuation="assistant_message"),
            replace(CHAT, continuation="assistant_message"),
            "prompt_logprobs",
        ),
        (
            Quirks(completions=False, chat_continuation="prefix", prompt_logprobs=False),
            replace(CHAT, continuation="prefix", prompt_logprobs=False),
            "forced",
        ),
        (Quirks(completions=False, sampled_first=True), CHAT, "prompt_logprobs"),
    ],
)
def test_what_is_found(quirks: Quirks, expected: Capabilities, scoring: str | None) -> None:
    found, way, calls = probed(quirks)
    assert replace(found, notes=()) == expected
    assert way == scoring
    assert calls <= 14


@pytest.mark.parametrize("logprobs", ["absent", "refused"])
@pytest.mark.parametrize("completions", [True, False])
def test_status_200_without_logprobs_is_a_no_as_400_is(logprobs: Any, completions: bool) -> None:
    found, way, _ = probed(Quirks(logprobs=logprobs, completions=completions))
    assert (found.output_logprobs, found.top_logprobs, found.prompt_logprobs, way) == (False, 0, False, None)
    assert "without log-probs" in " ".join(found.notes)
    assert found.continuation == ("completions" if completions else "continue_final_message")


def test_a_chat_that_opens_a_new_turn_does_not_continue() -> None:
    found, way, _ = probed(Quirks(completions=False, chat_continuation="new_turn"))
    assert found.continuation is None
    assert way is None
    assert "new turn" in " ".join(found.notes)


def test_a_chat_without_logprobs_is_judged_by_its_text() -> None:
    found, _, _ = probed(Quirks(completions=False, chat_continuation="new_turn", logprobs="absent"))
    assert found.continuation is None


def test_lost_entries_show() -> None:
    found, _, _ = probed(Quirks(drops_partial_characters=True))
    assert not found.token_entries
    assert "no log-prob" in " ".join(found.notes)


def test_a_shifted_echo_is_named() -> None:
    found, _, _ = probed(Quirks(echo="off_by_one", prompt_logprobs=False))
    assert "echo gives other values" in " ".join(found.notes)


def test_another_tokenizer_shows() -> None:
    class Shifted(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [byte ^ 1 for byte in text.encode()]

    found, _, _ = probed(Quirks(), tokenizer=Shifted())
    assert not found.token_ids
    assert "another tokenizer" in " ".join(found.notes)


def test_colliding_texts_do_not_stop_it() -> None:
    found, way, _ = probed(Quirks(colliding_texts=True, names_ids=False), tokenizer=None)
    assert found.output_logprobs
    assert found.top_logprobs < 20  # a dict by text has lost some
    assert way in ("echo", "prompt_logprobs", None)


def test_impossible_values_do_not_stop_it() -> None:
    found, _, _ = probed(Quirks(impossible=True))
    assert found.repeatability == 0.0


def test_a_model_list_without_our_model_is_noted() -> None:
    found, _, _ = probed(Quirks(models=("other",)))
    assert "model list" in " ".join(found.notes)


def test_what_the_caller_says_is_not_asked() -> None:
    with LoopbackEndpoint(LOCAL) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, capabilities=BEST)
        assert probe(lm) is BEST
        assert endpoint.requests == []
        lm.close()


def test_a_failed_probe_is_not_remembered() -> None:
    with LoopbackEndpoint(LOCAL) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, max_retries=0)
        endpoint.fail(Failure(status=500))
        with pytest.raises(ModelError, match="500"):
            probe(lm)
        assert probe(lm).output_logprobs
        lm.close()


def test_a_refused_key_is_the_callers_to_fix() -> None:
    with LoopbackEndpoint(LOCAL) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url, max_retries=0)
        endpoint.fail_if(lambda body: Failure(status=401, message="bad key"))
        with pytest.raises(UsageError, match="api_key"):
            probe(lm)
        lm.close()
