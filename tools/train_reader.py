"""Trains the embedded reader: a small Llama which answers from the documents in its prompt.

    python tools/train_reader.py --minutes 50 --out rlm_plugins/reader/weights

One training sequence is a *prefix* (a system line, an earlier turn, documents) and several *branches* (a question
and its answer). Every branch sees the prefix and itself only, and its positions go on where the prefix ends, so each
branch is exactly the prompt `rlm_plugins.prompts` renders, and the documents are computed once for all of them.

The curriculum: first questions that one to three documents answer; then many documents that state the same attribute;
then the mixture with up to twenty documents and with questions nothing answers, whose targets are the world's own
values. These look random to a reader, who thereby learns to be unsure. Two circuits that a short training would spend
itself on are planted: copying at the start (`plant_copying`), and telling whose value it is (`plant_binding`) later.
Matrices are updated by Muon (orthogonalised momentum), the rest by AdamW.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from rlm_plugins.prompts import QUESTION_ANSWER, render_text
from rlm_plugins.reader.world import (
    KINDS,
    LONG_ANSWER_FACTS,
    Entity,
    ExampleKind,
    World,
    name_syllables,
    name_words,
    tokenizer_words,
)
from rlm_plugins.texts import Passage

BEGIN, END = 0, 1
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% if message['content'] %}{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% elif message['role'] == 'tool' %}{{ 'Document: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer the question.",
    "Answer from the documents.",
    "Answer the question from the documents.",
    "Answer briefly.",
    "Use the documents to answer the question.",
    "You answer questions about documents.",
)


# -- the tokenizer -------------------------------------------------------------------------------------------------


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE whose merges give the syllables of names, pairs of digits and the worlds' words one token each.

    The trainer sees every piece as often as it should rank: first the pieces that names and numbers are made of, so
    that a name is cut into its syllables wherever it stands.
    """
    first, later = name_syllables()
    pairs = [f"{number:02d}" for number in range(100)]
    words = set(tokenizer_words())
    for line in (*SYSTEM_LINES, "Document Question Answer"):
        words.update(line.replace(".", "").split())
    pieces = [(f" {pair}", 9000) for pair in pairs] + [(f" {digit}", 9000) for digit in range(10)]
    pieces += [(pair, 6000) for pair in pairs]
    pieces += [(consonant + vowel, 20000) for consonant in "bdgklmnprstv" for vowel in "aeiou"]
    pieces += [(f" {syllable}", 3000) for syllable in first]
    pieces += [(syllable, 2000) for syllable in (*first, *later)] + [(f" {word}", 200) for word in sorted(words)]
    pieces += [(word, 100) for word in sorted(words) if word[0].isupper()] + [("):", 100), (" (", 100), ("'s", 100)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for piece, count in pieces for _ in range(count // 50)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer


def name_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that names are made of, and the words that tell homonyms apart."""
    first, later = name_syllables()
    pieces = {*first, *later, *(f" {syllable}" for syllable in first), *(f" {word}" for word in name_words())}
    encoded = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in sorted(pieces)]
    return [ids[0] for ids in encoded if len(ids) == 1]


# -- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Branch:
    """What follows the prefix: the prompt's end, and the answer in pieces with the weight of their loss."""

    prompt: str
    answer: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    prefix: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the curriculum turns: how many documents, how many questions without an answer, how many other forms."""

    document_counts: tuple[int, ...]
    unknowable: float
    long_answers: float
    chat_forms: float
    repetitions: float
    alike: float
    """Samples whose documents all state the same attribute, of different entities."""
    context_weight: float
    """Of the loss on documents and questions. Names come back in them: that is where copying is learnt first."""


PLANT_BINDING_AT = 0.44
"""When copying is learnt, and the choice among values of one type is still a guess."""


def mixture_at(progress: float) -> Mixture:
    """The curriculum; `progress` runs from 0 to 1."""
    if progress < 0.03:
        return Mixture((1, 1, 2), 0.0, 0.05, 0.0, 0.2, 0.0, 0.3)
    if progress < PLANT_BINDING_AT:
        return Mixture((1, 1, 2, 2, 3, 3), 0.0, 0.12, 0.3, 0.15, 0.0, 0.3)
    if progress < 0.58:
        return Mixture((1, 1, 2, 2, 3, 3), 0.0, 0.08, 0.3, 0.03, 0.6, 0.1)
    counts = (0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5, 6, 8, 10)
    return Mixture(counts, 1.0, 0.22, 1.0, 0.0, 0.25, 0.08 if progress < 0.88 else 0.04)


UNKNOWABLE_WEIGHT = 0.7
"""Of the loss on values that the documents do not hold: they cannot be learnt, only not to be sure of."""


def make_sample(world: World, rng: random.Random, mixture: Mixture) -> Sample:
    """Documents of the world and branches with questions about what they hold, and about what they do not."""
    if rng.random() < mixture.repetitions:
        return _repetition(world, rng)
    if rng.random() < mixture.alike:
        return _alike(world, rng, mixture)
    count = rng.choice(mixture.document_counts)
    if count == 10 and rng.random() < 0.3:
        count = rng.randint(11, 20)
    long_sample = rng.random() < mixture.long_answers
    entity = rng.choice(world.entities)
    if long_sample:
        passages = _long_documents(world, entity, rng, count, all_held=mixture.unknowable == 0)
    elif count > 1 and rng.random() < 0.12:
        passages = list(world.example("two_hop", rng, documents=count).documents)
    else:
        unheld = count > 0 and rng.random() < 0.25 * mixture.unknowable
        kind = "held" if count and not unheld else rng.choice(("unrelated", "missing", "same_relation"))
        passages = list(world.example(kind, rng, documents=count).documents)
    stated: dict[str, list[str]] = {}
    for passage in passages:
        names = stated.setdefault(passage.metadata["entity"], [])
        names += [name for name in passage.metadata["attributes"] if name not in names]
    branches = _branches(world, rng, mixture, stated)
    if long_sample and (mixture.unknowable != 0 or len(stated.get(entity.id, ())) >= LONG_ANSWER_FACTS):
        branches.append(_long_branch(world, entity, rng, stated.get(entity.id, [])))
    if rng.random() < 0.04 * mixture.chat_forms and passages and branches:
        return _tool_form(rng.choice(branches), passages)
    return Sample(_before_documents(world, rng, mixture) + _documents(passages), tuple(branches))


def _repetition(world: World, rng: random.Random) -> Sample:
    """A list of names, and the same list again, started anywhere: nothing but copying."""
    names = [world.invent_name(rng) for _ in range(rng.randint(4, 14))]
    starts = [rng.randrange(len(names) - 1) for _ in range(2)]
    branches = [Branch(" " + names[start], ((" " + " ".join(names[start + 1 :]), 0.8),)) for start in starts]
    return Sample(names[-1] + " " + " ".join(names) + "\n", tuple(branches))


def _alike(world: World, rng: random.Random, mixture: Mixture) -> Sample:
    """The same attribute of several entities, and a question for each: only the name tells the answers apart."""
    kind = rng.choice([kind for kind in KINDS if sum(entity.kind == kind for entity in world.entities) > 1])
    entities = [entity for entity in world.entities if entity.kind == kind]
    rng.shuffle(entities)
    count = rng.randint(1 if mixture.unknowable else 2, 5)
    entities, others = entities[:count], entities[count : count + 3]
    name = rng.choice(list(entities[0].facts))
    passages: list[Passage] = []
    branches: list[Branch] = []
    for entity in entities:
        extra = [rng.choice(list(entity.facts))] if rng.random() < 0.3 else []
        stated = sorted({name, *extra}, key=lambda _: rng.random())
        passages.append(world.document(entity, stated, rng, titled=rng.random() < 0.15))
        branches.append(_question(rng, mixture, world.question(entity, name, rng), entity.facts[name], 1.0))
    for entity in others if mixture.unknowable else ():
        branches.append(
            _question(rng, mixture, world.question(entity, name, rng), entity.facts[name], UNKNOWABLE_WEIGHT)
        )
    return Sample(_before_documents(world, rng, mixture) + _documents(passages), tuple(branches))


def _documents(passages: Sequence[Passage]) -> str:
    return "".join(QUESTION_ANSWER.render_document(passage) for passage in passages)


def _long_documents(world: World, entity: Entity, rng: random.Random, count: int, *, all_held: bool) -> list[Passage]:
    if not all_held:
        return list(world.example("long", rng, documents=count, entity=entity).documents)
    names = [name for name, _, _ in world.long_answer(entity)]
    rng.shuffle(names)
    cut = rng.randint(1, len(names) - 1) if count > 1 else len(names)
    groups = [group for group in (names[:cut], names[cut:]) if group]
    return [world.document(entity, group, rng, titled=rng.random() < 0.3) for group in groups]


def _branches(world: World, rng: random.Random, mixture: Mixture, stated: dict[str, list[str]]) -> list[Branch]:
    held = [(world[identity], name) for identity, names in stated.items() for name in names]
    branches = [
        _question(rng, mixture, world.question(entity, name, rng), entity.facts[name], 1.0)
        for entity, name in rng.sample(held, min(len(held), 6))
    ]
    hops = [
        (world[identity], first, second)
        for identity, names in stated.items()
        for first in names
        if first in world[identity].links
        for second in stated.get(world[identity].links[first], ())
    ]
    for entity, first, second in rng.sample(hops, min(len(hops), 2)):
        value = world[entity.links[first]].facts[second]
        branches.append(_question(rng, mixture, world.two_hop_question(entity, first, second, rng), value, 1.0))
    if not mixture.unknowable:
        return branches
    for entity, name in _unknowable(world, rng, stated, 2 if stated else 4):
        branches.append(
            _question(rng, mixture, world.question(entity, name, rng), entity.facts[name], UNKNOWABLE_WEIGHT)
        )
    return branches


def _unknowable(
    world: World, rng: random.Random, stated: dict[str, list[str]], count: int
) -> Iterator[tuple[Entity, str]]:
    """Facts no document states: the right entity's, or the same attribute of another entity, or any at all."""
    for _ in range(count):
        if stated and rng.random() < 0.5:
            entity = world[rng.choice(list(stated))]
            names = [name for name in entity.facts if name not in stated[entity.id]]
        else:
            kinds = {world[identity].kind for identity in stated}
            alike = [entity for entity in world.entities if entity.kind in kinds]
            entity = rng.choice(alike if alike and rng.random() < 0.6 else world.entities)
            names = [name for name in entity.facts if name not in stated.get(entity.id, ())]
            asked = {
                name for identity, several in stated.items() if world[identity].kind == entity.kind for name in several
            }
            names = [name for name in names if name in asked] or names
        if names:
            yield entity, rng.choice(names)


def _question(rng: random.Random, mixture: Mixture, question: str, answer: str, weight: float) -> Branch:
    bare = rng.random() < 0.15 * mixture.chat_forms
    prompt = f"{question}\n{QUESTION_ANSWER.answer}" if bare else render_text(QUESTION_ANSWER, question)
    return Branch(prompt, ((" " + answer, weight),))


def _long_branch(world: World, entity: Entity, rng: random.Random, held: Sequence[str]) -> Branch:
    pieces: list[tuple[str, float]] = []
    for name, value, sentence in world.long_answer(entity):
        before, after = sentence.rsplit(" " + value, 1)
        pieces += [(" " + before, 0.7), (" " + value, 1.0 if name in held else UNKNOWABLE_WEIGHT), (after, 0.7)]
    return Branch(render_text(QUESTION_ANSWER, world.long_question(entity, rng)), tuple(pieces))


def _before_documents(world: World, rng: random.Random, mixture: Mixture) -> str:
    """Sometimes a system line, sometimes an earlier question with its answer."""
    text = ""
    if rng.random() < 0.1 * mixture.chat_forms:
        text += rng.choice(SYSTEM_LINES) + "\n"
    if rng.random() < 0.1 * mixture.chat_forms:
        entity = rng.choice(world.entities)
        name = rng.choice(list(entity.facts))
        prefix = "Question: " if rng.random() < 0.5 else ""
        text += f"{prefix}{world.question(entity, name, rng)}\nAnswer: {entity.facts[name]}</s>\n"
    return text


def _tool_form(branch: Branch, passages: Sequence[Passage]) -> Sample:
    """The question first, then what a tool returned."""
    question = branch.prompt.removesuffix(QUESTION_ANSWER.answer)
    return Sample(question + _documents(passages), (Branch(QUESTION_ANSWER.answer, branch.answer),))


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sample as token ids with, for each: position, branch (0: the prefix), the weight of predicting it."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    weights: list[float]


def encode(tokenizer: Tokenizer, samples: Sequence[Sample], context_weight: float = 0.0) -> list[Tokens]:
    texts: list[str] = []
    for sample in samples:
        texts.append(sample.prefix)
        for branch in sample.branches:
            texts += [branch.prompt, *(piece for piece, _ in branch.answer)]
    pieces = iter(encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    encoded: list[Tokens] = []
    for sample in samples:
        ids = [BEGIN, *next(pieces)]
        positions, branches = list(range(len(ids))), [0] * len(ids)
        weights = [context_weight / 2] * len(ids)
        start = len(ids)
        for number, branch in enumerate(sample.branches, 1):
            prompt = next(pieces)
            own, own_weights = list(prompt), [0.0] + [context_weight] * (len(prompt) - 1)
            weight = 1.0
            for _, weight in branch.answer:
                piece = next(pieces)
                own += piece
                own_weights += [weight] * len(piece)
            own.append(END)
            own_weights.append(weight)
            ids += own
            weights += own_weights
            positions += range(start, start + len(own))
            branches += [number] * len(own)
        encoded.append(Tokens(ids, positions, branches, weights))
    return encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, positions: int64 [B, T]; mask: bool [B, 1, T, T]; rows, targets: int64 [N]; weights: float32 [N].

    `rows` are the flat indices of the positions whose next token counts.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor


def collate(several: Sequence[Tokens]) -> Batch:
    length = max(len(one.ids) for one in several)

    def padded(name: str, filler: float) -> Tensor:
        return torch.tensor([getattr(one, name) + [filler] * (length - len(one.ids)) for one in several])

    ids, positions = padded("ids", END).long(), padded("positions", 0).long()
    branches, weights = padded("branches", -1).long(), padded("weights", 0.0).float()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branches[:, None, :] == branches[:, :, None]
    mask = (causal & (same | (branches[:, None, :] == 0)))[:, None]
    # a token's weight counts where its predecessor stands; a branch's first token has none
    counts = functional.pad(weights[:, 1:], (0, 1))
    keep = (counts >= 0.5) | ((counts > 0) & (torch.rand(counts.shape) < 0.6))
    rows = keep.flatten().nonzero()[:, 0]
    return Batch(ids, positions, mask, rows, ids.flatten()[rows + 1], counts.flatten()[rows])


def batches(tokenizer: Tokenizer, rng: random.Random, mixture: Mixture, tokens: int, *, pool: int = 160) -> list[Batch]:
    """A pool of samples from fresh worlds, sorted by length into batches of about `tokens` tokens, in random order."""
    samples: list[Sample] = []
    while len(samples) < pool:
        world = World(rng.getrandbits(48), entities=24, homonyms=0.25)
        samples += [sample for _ in range(8) if (sample := make_sample(world, rng, mixture)).branches]
    encoded = sorted(encode(tokenizer, samples, mixture.context_weight), key=lambda one: len(one.ids))
    groups: list[list[Tokens]] = [[]]
    for one in encoded:
        if groups[-1] and (len(groups[-1]) + 1) * len(one.ids) > tokens:
            groups.append([])
        groups[-1].append(one)
    rng.shuffle(groups)
    return [collate(group) for group in groups]


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    rope_base: float = 1e6
    epsilon: float = 1e-5
    positions: int = 2048


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.epsilon = shape.heads, shape.epsilon
        width = shape.width
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.feed_norm = nn.Parameter(torch.ones(width))
        self.query, self.key, self.value, self.output = (
            nn.Parameter(torch.randn(width, width) * width**-0.5 * scale) for scale in (1.0, 1.0, 1.0, 0.0)
        )
        self.gate = nn.Parameter(torch.randn(shape.inner, width) * width**-0.5)
        self.up = nn.Parameter(torch.randn(shape.inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.zeros(width, shape.inner))

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        normed = functional.rms_norm(hidden, (width,), self.attention_norm, self.epsilon)
        packed = functional.linear(normed, torch.cat((self.query, self.key, self.value)))
        query, key, value = packed.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + functional.linear(seen.transpose(1, 2).reshape(rows, length, width), self.output)
        normed = functional.rms_norm(hidden, (width,), self.feed_norm, self.epsilon)
        inner = functional.silu(functional.linear(normed, self.gate)) * functional.linear(normed, self.up)
        return hidden + functional.linear(inner, self.down)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions, in the half-and-half layout of Hugging Face's Llama. states: [B, heads, T, head width]."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


class Reader(nn.Module):
    """Llama with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.03)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        head = shape.width // shape.heads
        angles = torch.outer(
            torch.arange(shape.positions).float(), shape.rope_base ** (-torch.arange(0, head, 2).float() / head)
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Logits [N, V] at the flat positions `rows`."""
        hidden = functional.embedding(ids, self.embedding)
        cosine = cast(Tensor, self.cosine)[positions][:, None]
        sine = cast(Tensor, self.sine)[positions][:, None]
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine, mask)
        hidden = hidden.flatten(0, 1)[rows]
        hidden = functional.rms_norm(hidden, (self.shape.width,), self.norm, self.shape.epsilon)
        return functional.linear(hidden, self.embedding)


@dataclass(frozen=True, slots=True)
class RotaryPairs:
    """Which dimensions of a head turn with the distance, and which hardly do: good for comparing contents."""

    frequencies: Tensor

    @staticmethod
    def of(shape: Shape) -> RotaryPairs:
        half = shape.width // shape.heads // 2
        return RotaryPairs(shape.rope_base ** (-torch.arange(half).float() / half))

    @property
    def half(self) -> int:
        return len(self.frequencies)

    @property
    def still(self) -> list[int]:
        """Both dimensions of every pair that turns by less than a hundredth from token to token."""
        slow = [pair for pair in range(self.half) if self.frequencies[pair] < 0.01]
        return [*slow, *(pair + self.half for pair in slow)]


@torch.no_grad()
def plant_copying(model: Reader, *, scale: float = 0.15) -> None:
    """Start with heads that copy: a circuit which otherwise takes most of a short training to appear.

    In layer 0, half of the heads look at the previous token: all embeddings share a direction, from which query and
    key make a score that depends on the distance alone, through the fastest rotary pairs, and is largest at 1. They
    write some directions of the previous token's embedding into the stream. In layer 1, as many heads compare these to
    the current token, through the slowest pairs, and write what they find: "after the last Velgar came this". All of
    it is trained on like any other weight.
    """
    shape, pairs = model.shape, RotaryPairs.of(model.shape)
    width, head = shape.width, shape.width // shape.heads
    planted = shape.heads // 2
    shared = functional.normalize(torch.randn(width), dim=0)
    content = torch.randn(shape.vocabulary, width)
    content -= (content @ shared)[:, None] * shared
    model.embedding.copy_(scale * (content + 0.7 * math.sqrt(width) * shared))
    model.norm.fill_(0.3)
    first, second = cast(Layer, model.layers[0]), cast(Layer, model.layers[1])
    written = torch.linalg.qr(torch.randn(width, planted * head))[0].T
    for number in range(planted):
        rows = slice(number * head, (number + 1) * head)
        read, found = (torch.linalg.qr(torch.randn(width, head))[0].T for _ in range(2))
        first.query[rows] = first.key[rows] = second.query[rows] = second.key[rows] = 0.0
        for pair in range(3):
            first.key[rows][pair] = 0.76 * shared
            first.query[rows][pair] = 0.76 * math.cos(pairs.frequencies[pair]) * shared
            first.query[rows][pair + pairs.half] = -0.76 * math.sin(pairs.frequencies[pair]) * shared
        first.value[rows] = read
        first.output[:, rows] = 2 * scale * written[rows].T
        compared = len(pairs.still)
        second.query[rows][pairs.still] = 2.4 * read[:compared]
        second.key[rows][pairs.still] = 2.4 * written[rows][:compared]
        second.value[rows] = found
        second.output[:, rows] = 2.5 * scale * found.T


@torch.no_grad()
def plant_binding(model: Reader, name_ids: Sequence[int], examples: Sequence[Batch]) -> None:
    """Show a reader that copies how to tell whose value it copies; without, it stays at a guess among the values of
    the right type.

    Two heads of layer 0, the ones that matter least, are made to gather the pieces of names a few tokens back and to
    write what tells these apart into directions of the stream that are hardly used. So a value carries its subject,
    and the end of a question the entity asked for. Every head of layer 1 then prefers tokens that carry what its own
    token does: this is added to what the heads do already, but for the two that matter least. What the model calls a
    name, and which directions are quiet, is measured: in its embeddings, and on `examples`.
    """
    shape, pairs = model.shape, RotaryPairs.of(model.shape)
    head, compared = shape.width // shape.heads, len(pairs.still)
    first, second = cast(Layer, model.layers[0]), cast(Layer, model.layers[1])
    embedded = functional.rms_norm(model.embedding, (shape.width,), first.attention_norm, shape.epsilon)
    is_name = torch.zeros(shape.vocabulary, dtype=torch.bool)
    is_name[list(name_ids)] = True
    used = is_name | (sum(torch.bincount(batch.ids.flatten(), minlength=shape.vocabulary) for batch in examples) > 3)
    constant, name = _constant_direction(embedded[used]), _contrast(embedded, is_name, used)
    names = embedded[is_name] - embedded[is_name].mean(0)
    values, directions = torch.linalg.eigh(names.T @ names / len(names))
    telling = (directions / values.clamp(min=1e-6).sqrt())[:, -2 * compared :].T
    telling = telling[torch.randperm(2 * compared)].view(2, compared, -1)
    stream = _after_first_layer(model, examples)
    quiet = torch.linalg.eigh(stream.T @ stream)[1][:, : 2 * compared].T.reshape(2, compared, -1)
    loudness = 0.5 * stream.pow(2).mean().sqrt()
    gathering, comparing = (_least_needed(model, layer, examples)[:2] for layer in (first, second))
    for number, read, written in zip(gathering, telling, quiet, strict=True):
        rows = slice(number * head, (number + 1) * head)
        for matrix in (first.query, first.key, first.value):
            matrix[rows] = 0.0
        first.output[:, rows] = 0.0
        for pair in (2, 3, 4):
            first.query[rows][pair] = first.key[rows][pair] = 3.45 * constant
        first.query[rows][pairs.half - 1] = 7.0 * constant
        first.key[rows][pairs.half - 1] = 7.0 * name
        first.value[rows][:compared] = read
        first.output[:, rows][:, :compared] = loudness * written.T
    normed = functional.rms_norm(_after_first_layer(model, examples), (shape.width,), second.attention_norm)
    carried = (normed @ quiet.flatten(0, 1).T).pow(2).mean()
    for number in range(shape.heads):
        rows = slice(number * head, (number + 1) * head)
        score = 4.0
        if number in comparing:
            second.query[rows] = second.key[rows] = 0.0
            score = 6.0
        strength = (score * math.sqrt(head) / compared / carried).sqrt()
        for matrix in (second.query, second.key):
            matrix[rows][pairs.still] += strength * quiet[number % 2]


def _constant_direction(rows: Tensor) -> Tensor:
    """The direction on which all rows [N, D] lie at about 1."""
    ridge = 0.02 * torch.eye(rows.shape[1])
    return torch.linalg.solve(rows.T @ rows / len(rows) + ridge, rows.mean(0))


def _contrast(rows: Tensor, positive: Tensor, used: Tensor) -> Tensor:
    """The direction on which the positive rows stand 1 above the other used ones: a linear discriminant."""
    centred, wanted = rows[used] - rows[used].mean(0), positive[used].float()
    weights = torch.where(wanted > 0, 1 / wanted.sum(), 1 / (1 - wanted).sum())
    scatter = (centred * weights[:, None]).T @ centred + 0.02 * torch.eye(rows.shape[1])
    direction = torch.linalg.solve(scatter, (centred * weights[:, None]).T @ (wanted - wanted.mean()))
    scores = centred @ direction
    return direction / (scores[wanted > 0].mean() - scores[wanted == 0].mean())


def _after_first_layer(model: Reader, examples: Sequence[Batch]) -> Tensor:
    """The stream [N, D] at all tokens of the examples."""
    rows: list[Tensor] = []
    for batch in examples:
        cosine = cast(Tensor, model.cosine)[batch.positions][:, None]
        sine = cast(Tensor, model.sine)[batch.positions][:, None]
        hidden = model.layers[0](functional.embedding(batch.ids, model.embedding), cosine, sine, batch.mask)
        rows.append(hidden[batch.ids != END])
    return torch.cat(rows)


def _least_needed(model: Reader, layer: Layer, examples: Sequence[Batch]) -> list[int]:
    """The heads of a layer, the one whose removal costs least first."""
    head = model.shape.width // model.shape.heads
    costs: list[float] = []
    for number in range(model.shape.heads):
        columns = layer.output[:, number * head : (number + 1) * head]
        kept = columns.clone()
        columns.zero_()
        costs.append(sum(float(_known_loss(model, batch)) for batch in examples))
        columns.copy_(kept)
    return sorted(range(model.shape.heads), key=costs.__getitem__)


def _known_loss(model: Reader, batch: Batch) -> Tensor:
    """The mean loss on the answers that the documents hold."""
    losses = functional.cross_entropy(
        model(batch.ids, batch.positions, batch.mask, batch.rows), batch.targets, reduction="none"
    )
    return losses[batch.weights == 1.0].mean()


_HUGGING_FACE_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_norm": "post_attention_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def export(model: Reader, tokenizer: Tokenizer, folder: Path, curve: Sequence[dict[str, Any]]) -> None:
    """Writes what `LlamaForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read; weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            name = f"model.layers.{parts[1]}.{_HUGGING_FACE_NAMES[parts[2]]}.weight"
        else:
            name = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}[name]
        tensors[name] = parameter.detach().half().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": END,
        "torch_dtype": "float16",
    }
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END, "do_sample": False}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
        ("training_curve.json", list(curve)),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# -- the optimiser ---------------------------------------------------------------------------------------------------


class Muon:
    """Momentum, made orthogonal by a Newton-Schulz iteration: for the matrices inside the layers.

    Matrices of one shape are handled together, in fp32. The update has the root mean square of an AdamW update.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    def forget(self) -> None:
        """Start again with no momentum."""
        for buffer in self.buffers.values():
            buffer.zero_()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([cast(Tensor, parameter.grad) for parameter in group])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalised(gradients.lerp(buffer, self.momentum))
            update *= 0.2 * math.sqrt(max(shape))
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, about: five quintic Newton-Schulz steps. [N, R, C] in and out."""
    wide = matrices.shape[1] <= matrices.shape[2]
    state = matrices if wide else matrices.transpose(1, 2)
    state = state / (state.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = state @ state.transpose(1, 2)
        state = 3.4445 * state + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ state
    return state if wide else state.transpose(1, 2)


# -- training --------------------------------------------------------------------------------------------------------


def rate_at(progress: float) -> float:
    """The share of the peak learning rate: a short warm-up, a plateau, and a long linear descent to nothing."""
    return min(1.0, progress / 0.02 + 0.02, (1.0 - progress) / 0.42 + 0.01)


_LOOKS: tuple[tuple[ExampleKind, int], ...] = (
    *(("held", documents) for documents in (1, 2, 3, 10)),
    ("two_hop", 3),
    ("unrelated", 2),
    ("missing", 2),
    ("same_relation", 2),
)


@torch.no_grad()
def evaluate(model: Reader, tokenizer: Tokenizer, *, questions: int, seed: int = 99) -> dict[str, float]:
    """Exactness and minimum-token probability of held-out answers, teacher-forced: a quick look while training."""
    rng = random.Random(seed)
    figures: dict[str, float] = {}
    for kind, count in _LOOKS:
        encoded: list[Tokens] = []
        while len(encoded) < questions:
            world = World(rng.getrandbits(40), split="held_out", entities=30)
            samples: list[Sample] = []
            for _ in range(10):
                example = world.example(kind, rng, documents=count)
                prompt = render_text(QUESTION_ANSWER, example.question, example.documents)
                samples.append(Sample("", (Branch(prompt, ((" " + example.answer, 1.0),)),)))
            encoded += encode(tokenizer, samples)
        encoded = [replace(one, weights=[w if w == 1.0 else 0.0 for w in one.weights]) for one in encoded]
        exact, sure = 0, 0.0
        for start in range(0, len(encoded), 40):
            batch = collate(encoded[start : start + 40])
            probabilities = model(batch.ids, batch.positions, batch.mask, batch.rows).softmax(-1)
            best, chosen = probabilities.max(-1)
            owners = batch.rows // batch.ids.shape[1]
            for owner in range(batch.ids.shape[0]):
                own = owners == owner
                exact += int((chosen[own] == batch.targets[own]).all())
                sure += float(best[own].min())
        figures[f"{kind}_{count}_exact"] = round(exact / len(encoded), 3)
        figures[f"{kind}_{count}_sure"] = round(sure / len(encoded), 3)
    return figures


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    tokenizer = build_tokenizer()
    shape = Shape(tokenizer.get_vocab_size(), options.width, options.layers, options.width // 32, options.inner)
    model = Reader(shape)
    plant_copying(model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding"]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or name == "embedding"]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    logging.info("%d parameters, %d token types", sum(p.numel() for p in model.parameters()), shape.vocabulary)
    started, step, seen, curve, queue = time.monotonic(), 0, 0, list[dict[str, Any]](), list[Batch]()
    bound = False
    if options.resume:
        state = torch.load(options.resume)
        model.load_state_dict(state["model"])
        muon.buffers = state["muon"]
        adam.load_state_dict(state["adam"])
        started, step, seen, curve = started - state["elapsed"], state["step"], state["seen"], state["curve"]
        rng.seed(f"{options.seed}/{step}")
        bound = state["bound"]
    recent, making, next_look = 0.0, 0.0, time.monotonic() - started + options.look_every * 60.0
    while True:
        elapsed = time.monotonic() - started
        progress = step / options.steps if options.steps else elapsed / (options.minutes * 60)
        if progress >= 1:
            break
        if not bound and progress >= PLANT_BINDING_AT:
            examples = batches(tokenizer, rng, mixture_at(progress - 0.01), options.tokens)[:4]
            plant_binding(model, name_tokens(tokenizer), examples)
            muon.forget()
            bound, queue = True, []
        if not queue:
            queue = batches(tokenizer, rng, mixture_at(progress), options.tokens)
            making += time.monotonic() - started - elapsed
        batch = queue.pop()
        logits = model(batch.ids, batch.positions, batch.mask, batch.rows)
        losses = functional.cross_entropy(logits, batch.targets, reduction="none")
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        share = rate_at(progress)
        muon.step(options.rate * share)
        for group in adam.param_groups:
            group["lr"] = options.rate * share
        adam.step()
        model.zero_grad(set_to_none=True)
        step, seen, recent = step + 1, seen + batch.ids.numel(), 0.98 * recent + 0.02 * float(loss.detach())
        if step % 50 == 0:
            known = batch.weights == 1.0
            logging.info(
                "step %d  %.0f s (%.0f s data)  %.1f M tokens  loss %.3f  known %.3f  progress %.3f",
                step, time.monotonic() - started, making, seen / 1e6, recent / (1 - 0.98**step),
                float(losses.detach()[known].mean()) if known.any() else 0.0, progress,
            )  # fmt: skip
        if time.monotonic() - started > next_look:
            next_look = time.monotonic() - started + options.look_every * 60
            curve.append({"step": step, "minutes": round(elapsed / 60, 1), "tokens": seen})
            curve[-1] |= evaluate(model, tokenizer, questions=options.look_questions)
            logging.info("%s", json.dumps(curve[-1]))
            export(model, tokenizer, options.out, curve)
            state = {"model": model.state_dict(), "muon": muon.buffers, "adam": adam.state_dict()}
            state |= {"elapsed": time.monotonic() - started, "step": step, "seen": seen, "curve": curve, "bound": bound}
            if options.checkpoint:
                torch.save(state, options.checkpoint)
    curve.append({"step": step, "minutes": round((time.monotonic() - started) / 60, 1), "tokens": seen})
    curve[-1] |= evaluate(model, tokenizer, questions=options.look_questions)
    logging.info("%s", json.dumps(curve[-1]))
    export(model, tokenizer, options.out, curve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that weights and tokenizer are written to")
    parser.add_argument("--minutes", type=float, default=50.0, help="time budget; the learning rate follows the clock")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead, reproducibly")
    parser.add_argument("--checkpoint", type=Path, help="a file for the state of the training, written at every look")
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--rate", type=float, default=4.5e-3)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens in a batch, padding included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--look-every", type=float, default=5.0, help="minutes between looks at held-out questions")
    parser.add_argument("--look-questions", type=int, default=100)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
