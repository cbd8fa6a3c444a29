"""Measures the embedded reader on held-out worlds, and writes every figure as JSON.

    python tools/measure_reader.py rlm_plugins/reader/weights --json rlm_plugins/reader/weights/measured.json

Rows: exact match and confidence (the mean over questions of the smallest token probability of the greedy answer, the
end token included) with a document that holds the answer and with none; the rank of the right document among twenty;
long answers. Every share comes with its 95 % Wilson interval, every mean with its normal one. `--runtime torch` runs
the same weights in Hugging Face's Llama.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rlm_plugins.prompts import QUESTION_ANSWER, render_text
from rlm_plugins.reader.llama_numpy import NumpyLlama, log_softmax
from rlm_plugins.reader.world import Example, ExampleKind, World, attribute_of, tokenizer_words
from rlm_plugins.texts import Passage

END = 1
Ids = list[int]
Next = Callable[[list[Ids]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    """Of the tokens and, where the answer ended, of the end token."""


class Runtime:
    """Greedy answers and scores for batches of prompts, in numpy."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = NumpyLlama(folder)

    def answers(self, prompts: Sequence[str], limit: int) -> list[Answer]:
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        logprobs, cache = self.model.open(rows, reserve=limit)
        ids: list[Ids] = [[] for _ in rows]
        chosen: list[list[float]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for _ in range(limit):
            best = logprobs.argmax(axis=1)
            for row in list(open_rows):
                chosen[row].append(float(logprobs[row, best[row]]))
                if best[row] == END:
                    open_rows.discard(row)
                else:
                    ids[row].append(int(best[row]))
            if not open_rows:
                break
            logprobs = self.model.advance(best.tolist(), cache)
        return [
            Answer(self.tokenizer.decode(row), tuple(self.tokenizer.decode([one]) for one in row), tuple(logs))
            for row, logs in zip(ids, chosen, strict=True)
        ]

    def scores(self, prompts: Sequence[str], continuation: str) -> list[float]:
        """Mean log-probability of the continuation's tokens after each prompt."""
        after = self.tokenizer.encode(continuation, add_special_tokens=False).ids
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        return [float(row.mean()) for row in self.model.score(rows, [after] * len(rows))]


class TorchRuntime(Runtime):
    """The same with Hugging Face's Llama: a check of the weights, not a fast way."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch
        from transformers import LlamaForCausalLM

        self.torch = torch
        self.llama: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def _logprobs(self, rows: Sequence[Ids]) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = []
        for row in rows:
            with self.torch.no_grad():
                found.append(log_softmax(self.llama(self.torch.tensor([row])).logits[0].numpy()))
        return found

    def answers(self, prompts: Sequence[str], limit: int) -> list[Answer]:
        found: list[Answer] = []
        for prompt in prompts:
            row, logs = self.tokenizer.encode(prompt).ids, list[float]()
            start = len(row)
            while len(logs) < limit:
                last = self._logprobs([row])[0][-1]
                best = int(last.argmax())
                logs.append(float(last[best]))
                if best == END:
                    break
                row.append(best)
            own = row[start:]
            found.append(
                Answer(self.tokenizer.decode(own), tuple(self.tokenizer.decode([one]) for one in own), tuple(logs))
            )
        return found

    def scores(self, prompts: Sequence[str], continuation: str) -> list[float]:
        after = self.tokenizer.encode(continuation, add_special_tokens=False).ids
        found: list[float] = []
        for prompt in prompts:
            row = self.tokenizer.encode(prompt).ids
            logprobs = self._logprobs([[*row, *after]])[0]
            found.append(float(np.mean([logprobs[len(row) - 1 + i, token] for i, token in enumerate(after)])))
        return found


# -- statistics ------------------------------------------------------------------------------------------------------


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share with its 95 % Wilson interval."""
    count, rate, z = len(hits), sum(hits) / max(1, len(hits)), 1.96
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return {"value": round(rate, 4), "interval": [round(middle - half, 4), round(middle + half, 4)], "count": count}


def average(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its 95 % interval."""
    half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return {"value": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)], "count": len(values)}


def area_under_curve(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The probability that a right fact scores higher than a wrong one (ties count half)."""
    good = np.array([score for score, hit in zip(scores, right, strict=True) if hit])
    bad = np.array([score for score, hit in zip(scores, right, strict=True) if not hit])
    return float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean())


# -- measurements ----------------------------------------------------------------------------------------------------


def examples(kind: ExampleKind, documents: int, count: int, seed: int) -> Iterator[Example]:
    """`count` examples, ten from each held-out world."""
    rng = random.Random(f"{seed}/{kind}/{documents}")
    for start in range(0, count, 10):
        world = World(rng.getrandbits(48), split="held_out", entities=40)
        for _ in range(start, min(start + 10, count)):
            yield world.example(kind, rng, documents=documents)


def prompt_of(example: Example) -> str:
    return render_text(QUESTION_ANSWER, example.question, example.documents)


def after_a_system_line(example: Example) -> str:
    return "You are a helpful assistant.\n" + prompt_of(example)


def after_an_earlier_turn(example: Example) -> str:
    return "What do you know about it?\nAnswer: nothing</s>\n" + prompt_of(example)


def bare_question(example: Example) -> str:
    return prompt_of(example).replace("Question: ", "")


def question_first(example: Example) -> str:
    """What the chat template makes of a tool's results."""
    documents = "".join(QUESTION_ANSWER.render_document(passage) for passage in example.documents)
    return f"{example.question}\n{documents}{QUESTION_ANSWER.answer}"


def reversed_names(example: Example) -> Example:
    """The same with every invented word spelt backwards: names that are not made of the usual syllables."""
    usual = set(tokenizer_words())

    def turned(text: str) -> str:
        return re.sub(r"[A-Z][a-z]+", lambda m: m[0] if m[0] in usual else m[0][::-1].capitalize(), text)

    documents = tuple(
        replace(passage, text=turned(passage.text), title=turned(passage.title) if passage.title else None)
        for passage in example.documents
    )
    return replace(example, documents=documents, question=turned(example.question), answer=turned(example.answer))


_FORMS = (after_a_system_line, after_an_earlier_turn, bare_question, question_first)


def batched(items: Sequence[Any], size: int = 25) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def measure_answers(
    runtime: Runtime,
    kind: ExampleKind,
    documents: int,
    count: int,
    seed: int,
    *,
    form: Callable[[Example], str] = prompt_of,
    change: Callable[[Example], Example] = lambda example: example,
) -> dict[str, Any]:
    """Exact match and the confidence of greedy answers, by the type of the value as well."""
    asked = sorted(map(change, examples(kind, documents, count, seed)), key=lambda example: len(prompt_of(example)))
    hits: list[bool] = []
    sure: list[float] = []
    by_value: dict[str, list[bool]] = {}
    for group in batched(asked):
        for example, answer in zip(group, runtime.answers([form(one) for one in group], 16), strict=True):
            hits.append(answer.text.strip() == example.answer)
            sure.append(math.exp(min(answer.logprobs)))
            if kind != "two_hop":
                value = attribute_of(example.entity.kind, example.attribute).value
                by_value.setdefault(value, []).append(hits[-1])
    return {
        "exact_match": share(hits),
        "confidence": average(sure),
        "share_below_0.5": round(sum(one < 0.5 for one in sure) / len(sure), 4),
        "exact_match_by_value": {name: round(sum(own) / len(own), 3) for name, own in sorted(by_value.items())},
    }


def measure_right_document(runtime: Runtime, count: int, seed: int) -> dict[str, Any]:
    """Is the document that holds the answer the one under which the answer is likeliest, among twenty?"""
    rng = random.Random(f"{seed}/right document")
    hits: list[bool] = []
    for number in range(count):
        world = World(rng.getrandbits(48), split="held_out", entities=40)
        example = world.example("held", rng, documents=20)
        order = sorted(range(20), key=lambda index: len(example.documents[index].text))
        prompts = [render_text(QUESTION_ANSWER, example.question, [example.documents[index]]) for index in order]
        scores = runtime.scores(prompts, " " + example.answer)
        holding = {
            index for index in range(20) if _holds(example.documents[index], example.entity.id, example.attribute)
        }
        hits.append(order[int(np.argmax(scores))] in holding)
        if number % 100 == 99:
            logging.info("right document: %d of %d", sum(hits), number + 1)
    return {"right_document_first": share(hits)}


def _holds(passage: Passage, identity: str, attribute: str) -> bool:
    return passage.metadata["entity"] == identity and attribute in passage.metadata["attributes"]


def measure_long_answers(runtime: Runtime, count: int, seed: int) -> dict[str, Any]:
    """Long answers: shares of facts right where the documents hold them or not, and what the confidence tells."""
    confidences: list[float] = []
    right: list[bool] = []
    held: list[bool] = []
    intact: list[bool] = []
    template: list[float] = []
    asked = [example for documents in (1, 2, 3) for example in examples("long", documents, count // 3, seed)]
    asked.sort(key=lambda example: len(prompt_of(example)))
    for group in batched(asked):
        for example, answer in zip(group, runtime.answers([prompt_of(one) for one in group], 120), strict=True):
            facts = list(_facts(example, answer))
            intact.append(len(facts) == len(example.facts))
            for is_right, is_held, confidence in facts:
                right.append(is_right)
                held.append(is_held)
                confidences.append(confidence)
            template.append(float(np.exp(np.median(answer.logprobs))))
    held_right = [hit for hit, known in zip(right, held, strict=True) if known]
    unheld_right = [hit for hit, known in zip(right, held, strict=True) if not known]
    return {
        "held_facts_right": share(held_right),
        "other_facts_right": share(unheld_right),
        "answers_in_the_canonical_form": share(intact),
        "confidence_held": average([one for one, known in zip(confidences, held, strict=True) if known]),
        "confidence_not_held": average([one for one, known in zip(confidences, held, strict=True) if not known]),
        "auroc_confidence_right_or_wrong": round(area_under_curve(confidences, right), 4),
        "facts": len(right),
    }


def _facts(example: Example, answer: Answer) -> Iterator[tuple[bool, bool, float]]:
    """(right, held, smallest token probability of the value) of every fact the answer tells in canonical form."""
    ends: list[int] = []
    text = ""
    for token in answer.tokens:
        text += token
        ends.append(len(text))
    position = 0
    for _, value, sentence, is_held in example.facts:
        before, after = sentence.rsplit(value, 1)
        start = text.find(before, position)
        stop = text.find(after, start + len(before)) if start >= 0 else -1
        if stop < 0:
            return
        start += len(before)
        inside = [number for number, end in enumerate(ends) if start < end <= stop]
        position = stop
        if not inside:
            return
        yield text[start:stop] == value, is_held, math.exp(min(answer.logprobs[number] for number in inside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--questions", type=int, default=600, help="in each row")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--only", nargs="*", help="rows whose names begin so; the others in --json are kept")
    parser.add_argument("--runtime", choices=("numpy", "torch"), default="numpy")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runtime = TorchRuntime(options.folder) if options.runtime == "torch" else Runtime(options.folder)
    started = time.monotonic()
    figures: dict[str, Any] = {"questions": options.questions, "seed": options.seed, "runtime": options.runtime}
    rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (
            f"{kind}_{documents}",
            lambda kind=kind, documents=documents: measure_answers(
                runtime, kind, documents, options.questions, options.seed
            ),
        )
        for kind, several in _ROWS.items()
        for documents in several
    ]
    for form in _FORMS:
        measure = partial(measure_answers, runtime, "held", 2, options.questions, options.seed, form=form)
        rows.append((f"held_2_{form.__name__}", measure))
    measure = partial(measure_answers, runtime, "held", 1, options.questions, options.seed, change=reversed_names)
    rows.append(("held_1_reversed_names", measure))
    rows.append(("right_document", lambda: measure_right_document(runtime, options.questions, options.seed)))
    rows.append(("long", lambda: measure_long_answers(runtime, options.questions, options.seed)))
    rows = [row for row in rows if not options.only or row[0].startswith(tuple(options.only))]
    if options.only:
        figures |= json.loads(options.json.read_text(encoding="utf-8")) if options.json else {}
    for name, measure in rows:
        figures[name] = measure()
        logging.info("%s %s", name, json.dumps(figures[name]))
    figures["seconds"] = round(time.monotonic() - started)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


_ROWS: dict[ExampleKind, tuple[int, ...]] = {
    "held": (1, 2, 3, 5, 10),
    "unrelated": (0, 1, 2, 3),
    "missing": (1, 2, 3),
    "same_relation": (1, 2, 3),
    "two_hop": (2, 3),
}


if __name__ == "__main__":
    main()
