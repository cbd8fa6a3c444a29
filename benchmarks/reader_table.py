"""What REPLUG does to a small reader's answers: exact match against closed book, one document and concatenation.

    python benchmarks/reader_table.py --questions 600 --out reader_table.json --markdown docs/reader-results.md

Held-out worlds, the embedded reader and the embedded encoder; the passages of a world are retrieved for each question
by the encoder, so that a retrieval miss counts as everybody's miss (the row `recall` says how many there are). Poisoned
rows replace the last retrieved passages by passages that state a wrong value for the asked attribute, weighted by their
own cosine. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlm_plugins import DenseRetriever, LanguageModel, Passage, Replug, Sampling, embedded_encoder, embedded_reader
from rlm_plugins.reader.world import Entity, World
from rlm_plugins.retrieval.scores import score_by_embeddings

SAMPLING = Sampling(max_tokens=16)


@dataclass(frozen=True, slots=True)
class Item:
    question: str
    answer: str
    wrong: tuple[str, str]
    """Two wrong values of the right type, which the poison states."""
    poison: tuple[Passage, Passage]
    """Scored like the rest."""
    retrieved: tuple[Passage, ...]
    stranger: Passage


def items(count: int, entities: int = 60) -> Iterator[Item]:
    encoder = embedded_encoder()
    rng = random.Random(5)
    per_world = math.ceil(count / 3)
    left = count
    for seed in (101, 102, 103):
        world = World(seed, split="held_out", entities=entities)
        corpus = world.corpus()
        retriever = DenseRetriever.from_passages(corpus, encoder)
        facts = [(entity, attribute) for entity in world.entities for attribute in entity.facts]
        for entity, attribute in rng.sample(facts, min(per_world, left, len(facts))):
            left -= 1
            question = world.question(entity, attribute, rng)
            others = [
                other.facts[attribute]
                for other in world.entities
                if other.kind == entity.kind and other.facts[attribute] != entity.facts[attribute]
            ]
            wrong = (others[0], others[1]) if len(others) > 1 else (others[0], others[0])
            poison = [_stating(world, entity, attribute, value, rng) for value in wrong]
            first, second = score_by_embeddings(question, poison, encoder)
            yield Item(
                question,
                entity.facts[attribute],
                wrong,
                (first, second),
                tuple(retriever.retrieve(question, 10)),
                rng.choice([passage for passage in corpus if passage.metadata["entity"] != entity.id]),
            )


def _stating(world: World, entity: Entity, attribute: str, value: str, rng: random.Random) -> Passage:
    """A passage that says something false in the words of a true one."""
    return world.document(replace(entity, facts={**entity.facts, attribute: value}), [attribute], rng)


def poisoned(item: Item, k: int, count: int) -> list[Passage]:
    """The k best passages with the last `count` replaced by poison."""
    return [*item.retrieved[: k - count], *item.poison[:count]]


Answer = Callable[[Item], str]


def ways(lm: LanguageModel, ks: Sequence[int]) -> dict[str, Answer]:
    def plain(documents: Callable[[Item], Sequence[Passage]]) -> Answer:
        return lambda item: lm.generate(item.question, documents=documents(item), sampling=SAMPLING).text

    def ensemble(replug: Replug, documents: Callable[[Item], Sequence[Passage]]) -> Answer:
        return lambda item: replug.generate(item.question, documents=documents(item), sampling=SAMPLING).text

    token = Replug(lm, trace="off")
    posterior = Replug(lm, trace="off", posterior=True)
    uniform = Replug(lm, trace="off", weights="uniform")
    found: dict[str, Answer] = {
        "closed book": plain(lambda item: ()),
        "one random document": plain(lambda item: (item.stranger,)),
        "top-1": plain(lambda item: item.retrieved[:1]),
    }
    for k in ks:
        found[f"concatenated, k={k}"] = plain(lambda item, k=k: item.retrieved[:k])
        found[f"REPLUG, k={k}"] = ensemble(token, lambda item, k=k: item.retrieved[:k])
        found[f"REPLUG posterior, k={k}"] = ensemble(posterior, lambda item, k=k: item.retrieved[:k])
    for count in (1, 2):
        name = f"k=10, {count} poisoned"
        found[f"concatenated, {name}"] = plain(lambda item, n=count: poisoned(item, 10, n))
        found[f"REPLUG, {name}"] = ensemble(token, lambda item, n=count: poisoned(item, 10, n))
        found[f"REPLUG posterior, {name}"] = ensemble(posterior, lambda item, n=count: poisoned(item, 10, n))
        found[f"REPLUG uniform, {name}"] = ensemble(uniform, lambda item, n=count: poisoned(item, 10, n))
    return found


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--backend", choices=("auto", "numpy", "torch"), default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    lm = embedded_reader(arguments.backend)
    asked = list(items(arguments.questions))
    rows: list[dict[str, Any]] = []
    for k in sorted({1, *arguments.ks}):
        hits = sum(any(item.answer in passage.text for passage in item.retrieved[:k]) for item in asked)
        rows.append(_row(f"(recall@{k}: a retrieved passage states the answer)", hits, len(asked)))
    answers = ways(lm, arguments.ks)
    right = dict.fromkeys(answers, 0)
    for number, item in enumerate(asked, start=1):  # one question all ways, so that its prompts are computed once
        for name, answer in answers.items():
            right[name] += answer(item).strip() == item.answer
        if number % 50 == 0:
            print(f"{number} of {len(asked)} questions", flush=True)
    rows += [_row(name, count, len(asked)) for name, count in right.items()]
    print("\n".join(_line(row) for row in rows))
    if arguments.out:
        arguments.out.write_text(json.dumps({"model": lm.name, "rows": rows}, indent=1) + "\n")
    if arguments.markdown:
        command = f"python benchmarks/reader_table.py --questions {arguments.questions}"
        arguments.markdown.write_text(_page(rows, command))


def _row(name: str, right: int, count: int) -> dict[str, Any]:
    low, high = wilson(right, count)
    return {"way": name, "exact": right / count, "low": low, "high": high, "questions": count}


def _line(row: dict[str, Any]) -> str:
    return f"{row['way']:<52} {row['exact']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"


def _page(rows: Sequence[dict[str, Any]], command: str) -> str:
    lines = [
        "# What the ways of using documents do to the embedded reader",
        "",
        "Exact match on held-out worlds, 95 % intervals. The passages are retrieved by the embedded encoder among all",
        "passages of the question's world; a poisoned passage states a wrong value in the words of a true one.",
        "",
        f"    {command}",
        "",
        "| way | exact match | 95 % interval |",
        "|---|---|---|",
        *(f"| {row['way']} | {row['exact']:.3f} | {row['low']:.3f} to {row['high']:.3f} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
