"""Tiny random models and their tokenizer, made on the spot. The weights are wide, so that distributions are peaked and
a misplaced position or mask shows in the first digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = (
    "Bora Tinel founded Velgar. The flag of Velgar is red and green.",
    "Velgar trades in salt, and Quorin trades in tin.",
    "Wer gründete Velgar? Bora Tinel, die Händlerin aus Köln.",
    "Le drapeau de Quorin est bleu, né d'un pari à l'été.",
    "東京の店は三つある。 Ωmega costs 5 €, naïve café ☕.",
    "Document: a question and its answer. Question: Who founded Velgar? Answer: Bora Tinel",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|turn|>")


@cache
def tokenizer_json() -> str:
    """A byte-level BPE of 500 entries that puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


def hf_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|turn|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def tiny(kind: str) -> Any:
    """A random model: "llama", "llama_grouped" (4 query heads on 2), "gpt2", "mistral" (a window of 8), "bloom" (no
    position ids)."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    torch.manual_seed(hash_of(kind))
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": vocabulary()}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    if kind == "gpt2":
        model: Any = hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, **ends)
        )
    elif kind == "mistral":
        model = hf.MistralForCausalLM(hf.MistralConfig(sliding_window=8, num_key_value_heads=2, **shape, **ends))
    elif kind == "bloom":
        model = hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, **ends))
    elif kind == "mamba":
        model = hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2, **ends)
        )
    else:
        heads = 2 if kind == "llama_grouped" else 4
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(num_key_value_heads=heads, tie_word_embeddings=True, **shape, **ends)
        )
    return model.eval()


def vocabulary() -> int:
    return Tokenizer.from_str(tokenizer_json()).get_vocab_size()


def hash_of(kind: str) -> int:
    return sum(map(ord, kind))


def save_llama(folder: Path, kind: str = "llama_grouped") -> Path:
    """A model folder as the hub has it: config, weights, tokenizer, generation settings."""
    tiny(kind).save_pretrained(folder)
    hf_tokenizer().save_pretrained(folder)
    return folder
