"""The numpy forward pass agrees with torch, whatever the padding, the cache and the head layout; and the embedded
weights come with a tokenizer that adds BOS once and a chat template that renders the completion prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from rlm_plugins.errors import UsageError
from rlm_plugins.prompts import QUESTION_ANSWER, render_messages, render_text
from rlm_plugins.reader import WEIGHTS
from rlm_plugins.reader.llama_numpy import NumpyLlama, log_softmax
from rlm_plugins.texts import Message, Passage

VOCABULARY = 50
LENGTHS = (7, 1, 12, 5)

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "model.safetensors").is_file(), reason="the embedded weights are not in this checkout"
)


def write_llama(folder: Path, *, key_heads: int, tied: bool, **overrides: Any) -> Path:
    """A random Llama of two layers."""
    rng = np.random.default_rng(0)
    width, heads, head, inner = 24, 4, 8, 40

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, width), "model.norm.weight": 1 + random(width)}
    if not tied:
        tensors["lm_head.weight"] = random(VOCABULARY, width)
    for number in range(2):
        prefix = f"model.layers.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = 1 + random(width)
        for name, rows in (("q", heads), ("k", key_heads), ("v", key_heads)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = random(rows * head, width)
        tensors[f"{prefix}self_attn.o_proj.weight"] = random(width, heads * head)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = random(inner, width)
        tensors[f"{prefix}mlp.down_proj.weight"] = random(width, inner)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | overrides))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts(lengths: Sequence[int] = LENGTHS, vocabulary: int = VOCABULARY) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(2, vocabulary, length).tolist() for length in lengths]


@pytest.fixture(params=[(4, True), (2, False), (1, True)], ids=["plain", "grouped untied", "multi-query"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    key_heads, tied = request.param
    return write_llama(tmp_path / "llama", key_heads=key_heads, tied=tied)


def torch_logprobs(folder: Path, ids: Sequence[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].log_softmax(-1).numpy()


def alone(model: NumpyLlama, ids: Sequence[int]) -> np.ndarray:
    """All log-probabilities [T, V] of one row without padding or cached past."""
    cache = model.empty_cache(np.zeros(1, np.int64), len(ids))
    return log_softmax(model.forward(np.array([ids]), cache, last=len(ids)))[0]


def test_it_equals_torch(folder: Path) -> None:
    model = NumpyLlama(folder)
    for ids in prompts():
        np.testing.assert_allclose(alone(model, ids), torch_logprobs(folder, ids), atol=1e-4)


def test_rows_of_several_lengths_are_computed_as_if_alone(folder: Path) -> None:
    model = NumpyLlama(folder)
    rows = prompts()
    logprobs, _ = model.open(rows)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (len(rows), VOCABULARY)
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1, atol=1e-5)
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(logprobs[row], alone(model, ids)[-1], atol=1e-5)


def test_tokens_appended_one_by_one_equal_the_whole_at_once(folder: Path) -> None:
    model = NumpyLlama(folder)
    rows = prompts()
    _, cache = model.open(rows, reserve=1)  # so that the cache has to grow
    after = [[3, 4, 5, 6], [9, 8, 7, 6], [2, 2, 2, 2], [10, 20, 30, 40]]
    for step in range(4):
        logprobs = model.advance([own[step] for own in after], cache)
    for row, (ids, own) in enumerate(zip(rows, after, strict=True)):
        np.testing.assert_allclose(logprobs[row], alone(model, [*ids, *own])[-1], atol=1e-5)


def test_several_tokens_may_follow_a_cached_past(folder: Path) -> None:
    model = NumpyLlama(folder)
    rows = prompts((6, 3))
    _, cache = model.open(rows)
    chunk = np.array([[5, 6, 7], [8, 9, 10]])
    logprobs = log_softmax(model.forward(chunk, cache, last=3))
    for row, ids in enumerate(rows):
        expected = alone(model, [*ids, *chunk[row].tolist()])[-3:]
        np.testing.assert_allclose(logprobs[row], expected, atol=1e-5)


def test_scores_are_the_log_probabilities_of_each_token(folder: Path) -> None:
    model = NumpyLlama(folder)
    rows, after = prompts(), [[4], [5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    for ids, own, score in zip(rows, after, model.score(rows, after), strict=True):
        expected = alone(model, [*ids, *own])[len(ids) - 1 : -1][np.arange(len(own)), own]
        np.testing.assert_allclose(score, expected, atol=1e-5)


def test_an_append_to_rows_without_padding_needs_no_mask_and_changes_nothing(folder: Path) -> None:
    model = NumpyLlama(folder)
    ids = prompts((9,))[0]
    _, cache = model.open([ids, ids])
    logprobs = model.advance([3, 4], cache)
    np.testing.assert_allclose(logprobs[0], alone(model, [*ids, 3])[-1], atol=1e-5)
    np.testing.assert_allclose(logprobs[1], alone(model, [*ids, 4])[-1], atol=1e-5)


def test_half_precision_weights_are_computed_in_single_precision(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = write_llama(tmp_path / "llama", key_heads=4, tied=True)
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    ids = prompts()[0]
    logprobs = alone(NumpyLlama(folder), ids)
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, torch_logprobs(folder, ids), atol=1e-4)


def test_rope_parameters_of_newer_configurations_are_read(tmp_path: Path) -> None:
    old = NumpyLlama(write_llama(tmp_path / "old", key_heads=4, tied=True))
    new = NumpyLlama(
        write_llama(
            tmp_path / "new",
            key_heads=4,
            tied=True,
            rope_theta=None,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )
    ids = prompts()[2]
    np.testing.assert_array_equal(alone(old, ids), alone(new, ids))


@pytest.mark.parametrize(
    "overrides",
    [{"model_type": "gpt2"}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}}],
)
def test_other_architectures_are_refused(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = write_llama(tmp_path / "llama", key_heads=4, tied=True, **overrides)
    with pytest.raises(UsageError):
        NumpyLlama(folder)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    model = NumpyLlama(write_llama(tmp_path / "llama", key_heads=4, tied=True))
    with pytest.raises(UsageError, match="at least one"):
        model.open([])
    with pytest.raises(UsageError, match="at least one"):
        model.open([[1], []])
    with pytest.raises(UsageError, match="65 tokens"):
        model.open([[2] * 65])
    with pytest.raises(UsageError, match="continuation"):
        model.score([[1]], [[]])
    _, cache = model.open([[2] * 64])
    with pytest.raises(UsageError, match="context window of 64"):
        model.advance([3], cache)


# -- the embedded weights --------------------------------------------------------------------------------------------

DOCUMENTS = [Passage("Velgar was founded by Bora Tinel."), Passage("Velgar lies on the river Onar.", title="Velgar")]
PROMPT = render_text(QUESTION_ANSWER, "Who founded Velgar?", DOCUMENTS)


@needs_weights
def test_the_embedded_weights_agree_with_torch() -> None:
    ids = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")).encode(PROMPT).ids
    model = NumpyLlama(WEIGHTS)
    np.testing.assert_allclose(alone(model, ids), torch_logprobs(WEIGHTS, ids), atol=1e-4)
    padded, _ = model.open([ids, ids[:5]])
    np.testing.assert_allclose(padded[1], torch_logprobs(WEIGHTS, ids[:5])[-1], atol=1e-4)


@needs_weights
def test_the_embedded_weights_are_small() -> None:
    total = sum((WEIGHTS / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert total < 8_000_000


@needs_weights
def test_the_tokenizer_adds_one_bos_and_loses_no_byte() -> None:
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    assert ids[0] == 0
    assert 0 not in ids[1:]
    for text in (PROMPT, "naïve café, 東京 – 1984!\n\n\t x", "Tell me about Velgar."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@needs_weights
def test_invented_names_take_two_or_three_tokens() -> None:
    from rlm_plugins.reader.world import World

    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    names = [e.name for e in World(1, split="held_out", entities=60).entities if e.kind in ("town", "ship")]
    lengths = {len(tokenizer.encode(" " + name, add_special_tokens=False).ids) for name in names}
    assert lengths <= {2, 3}


@needs_weights
def test_the_chat_template_renders_the_completion_prompt() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    messages = render_messages(QUESTION_ANSWER, [Message("user", "Who founded Velgar?")], DOCUMENTS)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(PROMPT)["input_ids"]


@needs_weights
def test_the_chat_template_renders_every_role() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    turns = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Who founded Velgar?"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "Bora Tinel founded Velgar."},
        {"role": "assistant", "content": "Bora Tinel"},
        {"role": "user", "content": "When?"},
    ]
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == (
        "<s>Answer briefly.\nWho founded Velgar?\nDocument: Bora Tinel founded Velgar.\n"
        "Answer: Bora Tinel</s>\nWhen?\nAnswer:"
    )
