"""Trains the embedded encoder: token vectors whose mean finds the passage that answers a question.

    python tools/train_encoder.py --out rlm_plugins/reader/encoder --steps 1500

The pairs are questions and passages of training worlds; a passage is right for a question where it holds the fact.
All passages of a step stand against all its questions, among them the same entity's other facts and the same facts of
other entities. `--measure` reports recall on held-out worlds, for passages that name their entity and for passages
that leave it to their title.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from rlm_plugins.reader.static_encoder import StaticEncoder
from rlm_plugins.reader.world import World, name_syllables, tokenizer_words
from rlm_plugins.texts import Passage


def build_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A lower-casing byte-level BPE: the worlds' words and syllables, then what `texts` are written with.

    Every word gets a leading space, wherever it stands, so that "(Velgar" and " Velgar" are cut alike.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first, later = name_syllables()
    # the trainer sees words; a syllable that goes on with a name is shown behind a first one that is split off
    pieces = [(consonant + vowel, 200) for consonant in "bdgklmnprstv" for vowel in "aeiou"]
    pieces += [(syllable, 60) for syllable in first]
    pieces += [(f"{number:02d}", 80) for number in range(100)]
    pieces += [(word, 4) for word in tokenizer_words()]
    rng = random.Random(0)
    names = [rng.choice(first) + rng.choice(later) for _ in range(8000)]
    lines = [*(piece for piece, count in pieces for _ in range(count)), *names, *texts]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=3,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def pairs(world: World, rng: random.Random, count: int) -> tuple[list[str], list[Passage], Tensor]:
    """Questions, passages and which passage holds which answer, bool [questions, passages]."""
    passages = rng.sample(corpus := world.corpus(), min(count, len(corpus)))
    questions: list[str] = []
    facts: list[tuple[str, str]] = []
    for passage in passages:
        identity, name = passage.metadata["entity"], rng.choice(passage.metadata["attributes"])
        questions.append(world.question(world[identity], name, rng))
        facts.append((identity, name))
    held = [
        [identity == passage.metadata["entity"] and name in passage.metadata["attributes"] for passage in passages]
        for identity, name in facts
    ]
    return questions, passages, torch.tensor(held)


def full_text(passage: Passage) -> str:
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


class Encoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.bag = nn.EmbeddingBag(tokenizer.get_vocab_size(), width, mode="mean")
        nn.init.normal_(self.bag.weight, std=0.5)

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
        flat = torch.tensor([token for row in ids for token in row])
        return functional.normalize(self.bag(flat, torch.from_numpy(starts)), dim=-1)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    texts = [line for file in options.text for line in file.read_text(encoding="utf-8").splitlines()]
    encoder = Encoder(build_tokenizer(texts, options.vocabulary), options.width)
    logging.info("%d tokens of %d dimensions", *encoder.bag.weight.shape)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=options.rate)
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, (options.steps - step) / (0.5 * options.steps))
        world = World(rng.getrandbits(48), entities=70, homonyms=0.2)
        questions, passages, held = pairs(world, rng, options.batch)
        use_titles = rng.random() < 0.5
        scores = encoder(questions) @ encoder([full_text(p) if use_titles else p.text for p in passages]).T
        scores = scores / options.temperature
        right = scores.masked_fill(~held, -torch.inf)
        loss = (scores.logsumexp(1) - right.logsumexp(1)).mean() + (scores.logsumexp(0) - right.logsumexp(0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            logging.info("step %d  %.0f s  loss %.3f", step + 1, time.monotonic() - started, float(loss.detach()))
    save(encoder, options.out)


def save(encoder: Encoder, folder: Path) -> None:
    """A sentence-transformers folder; single precision, so that it can be tuned as it is."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    weights = encoder.bag.weight.detach().half().float().numpy()
    model: Any = SentenceTransformer(
        modules=[StaticEmbedding(encoder.tokenizer, embedding_weights=weights), Normalize()], device="cpu"
    )
    model.save(str(folder), create_model_card=False)
    modules = [("", "StaticEmbedding"), ("1_Normalize", "Normalize")]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]  # under the names that older versions know too
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, *, passages: int = 1000, seed: int = 4711) -> dict[str, Any]:
    """Recall at 1 and 5 for one question about every passage of a held-out collection of `passages`."""
    encoder = StaticEncoder(folder)
    figures: dict[str, Any] = {"passages": passages, "seed": seed}
    world = World(seed, split="held_out", entities=passages // 5)
    rng = random.Random(seed)
    corpus = rng.sample(world.corpus(titled=0.0), passages)
    anonymous = [
        world.document(world[p.metadata["entity"]], p.metadata["attributes"], rng, titled=True, named=False)
        for p in corpus
    ]
    for name, collection, texts in (
        ("passages_that_name_their_entity", corpus, [p.text for p in corpus]),
        ("only_the_title_names_it_title_in_the_text", anonymous, [full_text(p) for p in anonymous]),
        ("nothing_names_it", anonymous, [p.text for p in anonymous]),
    ):
        vectors = encoder.embed_documents(texts)
        hits = {1: 0, 5: 0}
        for passage in collection:
            identity, asked = passage.metadata["entity"], rng.choice(passage.metadata["attributes"])
            query = encoder.embed_query(world.question(world[identity], asked, rng))
            best = np.argsort(-(vectors @ query))[:5]
            holds = [
                collection[index].metadata["entity"] == identity and asked in collection[index].metadata["attributes"]
                for index in best
            ]
            for depth in hits:
                hits[depth] += any(holds[:depth])
        figures[name] = {f"recall@{depth}": round(hit / len(collection), 4) for depth, hit in hits.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="English files the tokenizer also learns from")
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="only measure what is in --out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.measure:
        train(options)
    figures = measure(options.out)
    logging.info("%s", json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
