"""Tokens per second of a REPLUG ensemble on a local model, beside the same model's own batched `generate`.

    python benchmarks/replug_local.py --out results.json

Both get the same k prompts (one document each), write the same number of tokens greedily, never stop early, and are
timed in turn, A B A B, from a cold start: prompts are part of the time. `generate` writes k texts that nobody mixes;
the ensemble writes one, from the mixture of k distributions. A ratio of 1.0 means that mixing costs nothing.

`seen` and `new` are the seconds to the first piece of text with documents that another question brought before,
and with documents never seen.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlm_plugins.backends.transformers_local import TransformersLM, TransformersTokenizer
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.requests import Sampling
from rlm_plugins.texts import Passage
from rlm_plugins.tokens import encode_prompt

COLUMNS = (
    ("ours", 1),
    ("generate", 1),
    ("ratio", 2),
    ("peak_ours", 0),
    ("peak_generate", 0),
    ("first_new", 3),
    ("first_seen", 3),
)
Clock = Callable[[], float]
READER = Path(__file__).parent.parent / "rlm_plugins" / "reader" / "weights"


class Endless(TransformersTokenizer):
    """A tokenizer without end tokens, so that every run writes its full length."""

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset()


def words_tokenizer(vocabulary: int) -> Any:
    """One token a word, w0 to w..., for models with random weights."""
    vocab = {"<s>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.Whitespace())
    tokenizer.post_processor = cast(
        Any, processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def random_llama(width: int, layers: int, heads: int, inner: int, vocabulary: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), words_tokenizer(vocabulary)


def load(name: str) -> tuple[str, Any, Any]:
    """(label, model, tokenizer) of `reader`, `medium` or a path."""
    if name == "reader" and not (READER / "model.safetensors").is_file():
        return ("random, reader's size", *random_llama(192, 6, 6, 512, 4096))
    if name == "medium":
        return ("random, 512 x 8, 32k", *random_llama(512, 8, 8, 1376, 32000))
    lm = TransformersLM(str(READER) if name == "reader" else name)
    return "embedded reader" if name == "reader" else name, lm.model, lm.hf_tokenizer


class Bench:
    """One model, its ensemble, and its own `generate`."""

    def __init__(self, model: Any, tokenizer: Any, *, tokens: int, document_tokens: int) -> None:
        self.model = model
        self.lm = TransformersLM(model, tokenizer=Endless(tokenizer))
        self.ensemble = Replug(self.lm, weights="uniform")
        self.sampling = Sampling(max_tokens=tokens)
        self.document_tokens = document_tokens
        self.words = [tokenizer.decode([number]) for number in range(300, min(4000, len(tokenizer)))]

    def documents(self, k: int, rng: random.Random) -> list[Passage]:
        """Of about the same number of tokens, not exactly: rows of different lengths need padding."""
        lengths = [int(self.document_tokens * rng.uniform(0.8, 1.0)) for _ in range(k)]
        tokenizer = cast(Endless, self.lm.tokenizer)
        texts = [" ".join(rng.choices(self.words, k=length)) for length in lengths]
        cut = [tokenizer.decode(tokenizer.encode(text)[:length]) for text, length in zip(texts, lengths, strict=True)]
        return [Passage(text) for text in cut]

    def ours(self, question: str, documents: Sequence[Passage]) -> int:
        self.lm.clear_prefix_cache()
        return self.ensemble.generate(question, documents=documents, sampling=self.sampling).usage.completion_tokens

    def theirs(self, question: str, documents: Sequence[Passage]) -> int:
        tokenizer = cast(Endless, self.lm.tokenizer)
        rows = [encode_prompt(tokenizer, self.lm.template, question, [document]) for document in documents]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        count = self.sampling.max_tokens
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out.shape[1] - longest

    def first_piece(self, question: str, documents: Sequence[Passage], clock: Clock) -> float:
        start = clock()
        stream = self.ensemble.stream(question, documents=documents, sampling=self.sampling)
        next(iter(stream))
        taken = clock() - start
        cast(Any, stream).close()
        return taken


class Peak:
    """The most resident memory (MiB) above where it began, sampled while a block runs; a device's own count on cuda."""

    def __enter__(self) -> Peak:
        self.value, self._over = 0.0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.value = torch.cuda.max_memory_allocated() / 2**20 - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.value = max(self.value, self._now() - self._before)

    def _now(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated() / 2**20
        status = Path("/proc/self/statm")
        return int(status.read_text().split()[1]) * 4096 / 2**20 if status.exists() else 0.0


def timed(write: Callable[[], int], clock: Clock) -> tuple[float, float]:
    """(tokens per second, peak MiB)."""
    with Peak() as peak:
        start = clock()
        count = write()
        taken = clock() - start
    return count / taken, peak.value


def compare(bench: Bench, k: int, repeats: int, clock: Clock) -> dict[str, float]:
    rng = random.Random(k)
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    peaks: dict[str, list[float]] = {"ours": [], "generate": []}
    first: dict[str, list[float]] = {"new": [], "seen": []}
    ways = {"ours": bench.ours, "generate": bench.theirs}
    for repeat in range(repeats + 1):  # the first is a warm-up
        documents = bench.documents(k, rng)
        questions = [" ".join(rng.choices(bench.words, k=12)) for _ in range(2)]
        for name, way in ways.items():
            rate, peak = timed(partial(way, questions[0], documents), clock)
            if repeat:
                rates[name].append(rate)
                peaks[name].append(peak)
        bench.lm.clear_prefix_cache()
        for name, question in zip(first, questions, strict=True):
            taken = bench.first_piece(question, documents, clock)
            if repeat:
                first[name].append(taken)
    return {
        "k": k,
        "ours": statistics.median(rates["ours"]),
        "generate": statistics.median(rates["generate"]),
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)),
        "peak_ours": max(peaks["ours"]),
        "peak_generate": max(peaks["generate"]),
        "first_new": statistics.median(first["new"]),
        "first_seen": statistics.median(first["seen"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="reader, medium, a folder or a hub name; may be repeated")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu, with --threads 1: fair on a machine that is busy"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {**versions, "threads": torch.get_num_threads(), "clock": options.clock, "models": {}}
    heads = ("k", "ours/s", "generate/s", "ratio", "MiB", "MiB generate", "new", "seen")
    print(f"{'model':24}" + "".join(f"{head:>13}" for head in heads))
    for name in options.model or ["reader", "medium"]:
        label, model, tokenizer = load(name)
        bench = Bench(model, tokenizer, tokens=options.tokens, document_tokens=options.document_tokens)
        rows = report["models"][label] = []
        for k in options.k:
            row = compare(bench, k, options.repeats, clock)
            rows.append({key: round(value, 4) for key, value in row.items()})
            cells = [f"{k}", *(f"{row[key]:.{digits}f}" for key, digits in COLUMNS)]
            print(f"{label:24}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
