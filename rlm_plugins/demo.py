"""The demo: questions answered by REPLUG through both frameworks, beside closed book and concatenation.

The only module of the core that knows the adapters; it imports them when it runs, and goes on without one that is not
installed.
"""

from __future__ import annotations

import math
import random
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .models import Embedder, LanguageModel
from .reader import embedded_encoder, embedded_reader
from .reader.world import World
from .requests import Sampling
from .texts import Passage

SAMPLING = Sampling(max_tokens=32)
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of the demo, and what is right (None: nobody knows)."""

    question: str
    expected: str | None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    text: str
    trace: Mapping[str, Any]


Way = Callable[[str], Answered]


def demo(*, docs: Path | None, questions: Sequence[str] | None, lm: LanguageModel | None, k: int) -> Iterator[str]:
    """Yield the demo's lines; `lm` None is the embedded reader.

    Raises `UsageError` for a folder without texts, or questions that were not given.
    """
    started = time.monotonic()
    if docs is None:
        passages, asked = example_world()
        if questions:
            asked = [Asked(question, None) for question in questions]
    else:
        passages = read_folder(docs)
        if not questions:
            raise UsageError('your own documents need a question: --docs FOLDER --ask "Who ...?"')
        asked = [Asked(question, None) for question in questions]
    own, lm = lm is None, lm or embedded_reader()
    encoder = embedded_encoder()
    yield f"{len(passages)} passages; language model: {lm.name}" + ("; nothing leaves this machine" if own else "")
    if docs is not None and own:
        yield (
            "Note: the embedded reader knows only its invented world and the way its documents are written. For your\n"
            "own documents give it a real model: --model FOLDER, or --base-url URL --model NAME"
        )
    ways: dict[str, Way] = {}
    for name, build in (("LangChain", _langchain), ("LlamaIndex", _llama_index)):
        try:
            ways[name] = build(lm, encoder, passages, k)
        except ImportError as error:
            yield f"{name} is left out: {error}"
    if not ways:
        raise UsageError('the demo needs a framework: pip install "rlm-plugins[langchain,llama-index]"')
    yield f"indexed and ready after {time.monotonic() - started:.1f} s"
    for number, one in enumerate(asked, start=1):
        yield from _show(number, one, ways, lm)
    yield ""
    yield f"{len(asked)} questions, {time.monotonic() - started:.1f} s in all. What the columns mean: docs/replug.md"


def example_world() -> tuple[list[Passage], list[Asked]]:
    """A world no training saw, its corpus, and questions: single facts, a namesake, one that no document answers."""
    world = World(11, split="held_out", entities=24)
    rng = random.Random(3)
    corpus = world.corpus(titled=0.0)
    plain = [entity for entity in world.entities if not entity.qualifier]
    asked: list[Asked] = []
    for kind, attribute in (("town", "founder"), ("firm", "product"), ("ship", "captain")):
        entity = next(entity for entity in plain if entity.kind == kind)
        asked.append(Asked(world.question(entity, attribute, rng), entity.facts[attribute]))
    twin = next((entity for entity in world.entities if entity.qualifier), None)
    if twin is not None:
        attribute = next(iter(twin.facts))
        asked.append(Asked(world.question(twin, attribute, rng), twin.facts[attribute], "there are two of that name"))
    missing = next(entity for entity in plain if entity.kind == "person")
    corpus = [
        passage
        for passage in corpus
        if passage.metadata.get("entity") != missing.id or "animal" not in passage.metadata["attributes"]
    ]
    asked.append(Asked(world.question(missing, "animal", rng), None, "no document says it: look at the confidence"))
    # without the world's own notes: LlamaIndex embeds metadata with the text, and both frameworks shall find the same
    return [Passage(passage.text, id=passage.id) for passage in corpus], asked


def read_folder(folder: Path) -> list[Passage]:
    """Paragraphs of the .txt and .md files below a folder; the file's name is the title."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".txt", ".md"}) if folder.is_dir() else []
    passages = [
        Passage(paragraph.strip(), id=f"{path.relative_to(folder)}#{number}", title=path.stem)
        for path in files
        for number, paragraph in enumerate(re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")))
        if paragraph.strip()
    ]
    if not passages:
        raise UsageError(f"no text was found in {folder}: expected .txt or .md files with paragraphs")
    return passages


def _langchain(lm: LanguageModel, encoder: Embedder, passages: Sequence[Passage], k: int) -> Way:
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_rlm import ChatReplug, RLMEmbeddings
    from langchain_rlm.from_langchain import document_from_passage

    store = InMemoryVectorStore(RLMEmbeddings(encoder))
    store.add_documents([document_from_passage(passage) for passage in passages])
    chat = ChatReplug(llm=lm, retriever=store, k=k, trace="full", max_tokens=SAMPLING.max_tokens)

    def answer(question: str) -> Answered:
        message = chat.invoke(question)
        return Answered(str(message.content), message.response_metadata["replug"])

    return answer


def _llama_index(lm: LanguageModel, encoder: Embedder, passages: Sequence[Passage], k: int) -> Way:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index_rlm import ReplugSynthesizer, RLMEmbedding
    from llama_index_rlm.from_llama_index import node_from_passage

    embedding = RLMEmbedding(embedder=encoder)
    index = VectorStoreIndex([node_from_passage(passage).node for passage in passages], embed_model=embedding)
    synthesizer = ReplugSynthesizer(llm=lm, embed_model=embedding, trace="full", max_tokens=SAMPLING.max_tokens)
    engine = RetrieverQueryEngine(index.as_retriever(similarity_top_k=k), response_synthesizer=synthesizer)

    def answer(question: str) -> Answered:
        response = engine.query(question)
        return Answered(str(response), (response.metadata or {})["replug"])

    return answer


def _show(number: int, asked: Asked, ways: Mapping[str, Way], lm: LanguageModel) -> Iterator[str]:
    answers = {name: way(asked.question) for name, way in ways.items()}
    trace = next(iter(answers.values())).trace
    yield ""
    remark = f"   ({asked.remark})" if asked.remark else ""
    yield f"{number}. {asked.question}{remark}"
    yield "   weight  after  document"
    for place, document in enumerate(trace["documents"], start=1):
        text = textwrap.shorten(document["text"], _WIDTH - 24, placeholder=" ...")
        yield f"    {document['weight']:5.2f}  {document['posterior_weight']:5.2f}  [{place}] {text}"
    tokens = trace["tokens"]
    decided = " ".join(
        f"{token.strip()}[{place + 1}]"
        for token, place in zip(tokens["text"], tokens["decided_by"], strict=True)
        if token.strip()
    )
    yield f"   decided by   {decided}"
    least = min(tokens["logprob"], default=0.0)
    yield f"   least sure token: p = {math.exp(least):.2f}; poisoned documents it survives: {trace['robust_radius']}"
    passages = [Passage(document["text"], title=document["title"]) for document in trace["documents"]]
    rows = {
        "closed book": lm.generate(asked.question, sampling=SAMPLING).text,
        "concatenated": lm.generate(asked.question, documents=passages, sampling=SAMPLING).text,
        **{f"REPLUG, {name}": answer.text for name, answer in answers.items()},
    }
    for name, text in rows.items():
        yield f"   {name:<20} {textwrap.shorten(text, 60, placeholder=' ...'):<32} {_verdict(text, asked)}".rstrip()


def _verdict(text: str, asked: Asked) -> str:
    if asked.expected is None:
        return ""
    return "right" if text.strip() == asked.expected else f"wrong: {asked.expected}"
