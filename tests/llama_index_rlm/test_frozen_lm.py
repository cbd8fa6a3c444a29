"""FrozenLM.from_llm: which LLMs can be mixed, and what they bring."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate
from llama_index.core.llms import MockLLM
from llama_index_rlm import FrozenLM, ReplugLLM, ReplugSynthesizer, passage_from_node
from llama_index_rlm.frozen_lm import _hugging_face_sampling

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.requests import Sampling


class HuggingFaceLLM(MockLLM):
    """What llama-index-llms-huggingface has, as far as it is looked at."""

    generate_kwargs: dict[str, Any] = {}  # noqa: RUF012
    max_new_tokens: int = 40
    context_window: int = 128
    stopping_ids: list[int] = []  # noqa: RUF012
    model_name: str = "tiny"
    _model: Any = None
    _tokenizer: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "HuggingFace_LLM"


def hugging_face(model: Any = "a model", tokenizer: Any = "a tokenizer", **fields: Any) -> HuggingFaceLLM:
    llm = HuggingFaceLLM()
    for name, value in fields.items():
        setattr(llm, name, value)
    llm._model, llm._tokenizer = model, tokenizer
    return llm


def test_a_model_of_the_core_is_taken_as_it_is(lm: Any) -> None:
    assert FrozenLM.from_llm(lm) is lm


def test_a_replug_llm_gives_its_ensemble(lm: Any, nodes: Any, question: str) -> None:
    llm = ReplugLLM(llm=lm, scores="uniform")
    assert FrozenLM.from_llm(llm).lm is lm  # type: ignore[attr-defined]


@pytest.mark.parametrize("llm", [MockLLM(), "gpt-5", None, object()], ids=lambda llm: type(llm).__name__)
def test_all_else_is_refused_with_what_works(llm: Any) -> None:
    with pytest.raises(UsageError, match=r"cannot be mixed.*HuggingFaceLLM"):
        FrozenLM.from_llm(llm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system_prompt": "Be brief."}, "system_prompt="),
        ({"query_wrapper_prompt": PromptTemplate("<s>{query_str}")}, "query_wrapper_prompt="),
        ({"stopping_ids": [3]}, "stopping_ids="),
        ({"generate_kwargs": {"num_beams": 4}}, "num_beams"),
        ({"model": None}, "holds no model"),
    ],
)
def test_what_would_be_left_out_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FrozenLM.from_llm(hugging_face(**fields))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, Sampling(max_tokens=40)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7, top_p=0.9, max_tokens=40)),
        ({"do_sample": True}, Sampling(temperature=1.0, max_tokens=40)),
        ({"do_sample": False, "temperature": 0.7}, Sampling(max_tokens=40)),
        ({"max_new_tokens": 9, "pad_token_id": 0}, Sampling(max_tokens=9)),
    ],
    ids=str,
)
def test_the_way_of_sampling_comes_along(asked: dict[str, Any], expected: Sampling) -> None:
    assert _hugging_face_sampling(hugging_face(generate_kwargs=asked)) == expected


def test_a_hugging_face_llm_is_its_model(nodes: Any) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: place for place, letter in enumerate(["<end>", *map(chr, range(32, 127))])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<end>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(letters), n_positions=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    llm = hugging_face(model, tokenizer, max_new_tokens=5)

    lm = FrozenLM.from_llm(llm)
    assert lm.sampling == Sampling(max_tokens=5)
    assert lm.context_window == 128
    expected = Replug(lm, scores="uniform").generate("Who?", documents=[passage_from_node(node) for node in nodes])
    response = ReplugSynthesizer(llm=llm, scores="uniform").synthesize("Who?", nodes)
    assert response.response == expected.text
    assert response.metadata is not None
    assert response.metadata["replug"]["completion_tokens"] == 5
