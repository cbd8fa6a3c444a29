"""A cache on disk: what a model has answered is not asked again, in this process or another.

One SQLite file. Per-token values are stored, never sums; errors never; nothing that is secret. A key holds all that an
answer depends on: the model's address and name, its tokenizer, the template, the request with its sampling, and the
version of this format. Sampled texts (temperature above 0) are stored only where a seed says which sample is meant.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import UsageError
from ..flows import Batch, Failed
from ..models import LanguageModel
from ..requests import Generate, GenerateIds, Request, Sampling, Score
from ..texts import Generation, Message, Passage, Scoring, TokenLogprob, Usage
from .front import Front

VERSION = 1


class CachedModel(Front):
    """Answers `Generate`, `GenerateIds` and `Score` from `path` where they were answered before; a hit costs nothing
    and its usage says so. Streams are not stored.

    `fingerprint` names the exact model where address, name and tokenizer do not (a checkpoint under a fixed name).
    Equal requests of one batch are asked once. Safe for several threads and processes: whoever comes second finds the
    answer of whoever came first, and writes nothing over it. Raises `UsageError` for a method (cache the model below
    it, `Replug(CachedModel(lm, path))`), `sqlite3.Error` for a file that is no cache.
    """

    def __init__(self, lm: LanguageModel, path: str | Path, *, fingerprint: str = "") -> None:
        below = lm
        while isinstance(below, Front):
            below = below.lm
        if hasattr(below, "lm"):
            kind = type(below).__name__
            raise UsageError(
                f"the answers of {kind} depend on its settings and its retriever, which no key holds: cache the model "
                f"below it, {kind}(CachedModel(lm, path), ...)"
            )
        super().__init__(lm)
        self._store = _Store(Path(path))
        self._model = json.dumps([VERSION, *_identity(lm), fingerprint])
        self.hits = 0
        self.misses = 0

    def answer(self, batch: Batch) -> Sequence[Any]:
        plan = _Plan(batch, self._keys(batch))
        plan.take(self._store.read(plan.keys))
        if plan.asked:
            plan.place(self.lm.answer([batch[index] for index in plan.asked]))
            self._store.write(plan.new)
        return self._counted(plan)

    async def aanswer(self, batch: Batch) -> Sequence[Any]:
        plan = _Plan(batch, self._keys(batch))
        plan.take(await asyncio.to_thread(self._store.read, plan.keys) if any(plan.keys) else {})
        if plan.asked:
            plan.place(await self.lm.aanswer([batch[index] for index in plan.asked]))
            if plan.new:
                await asyncio.to_thread(self._store.write, plan.new)
        return self._counted(plan)

    def close(self) -> None:
        self._store.close()

    def _keys(self, batch: Batch) -> list[str | None]:
        return [_key(self._model, request) for request in batch]

    def _counted(self, plan: _Plan) -> list[Any]:
        stored = sum(key is not None for key in plan.keys)
        missed = sum(plan.keys[index] is not None for index in plan.asked)
        self.hits += stored - missed
        self.misses += missed
        return plan.replies


class _Plan:
    """Which requests of a batch are known, which are asked, and which wait for an equal one."""

    def __init__(self, batch: Batch, keys: list[str | None]) -> None:
        self.keys = keys
        self.replies: list[Any] = [None] * len(batch)
        self.asked: list[int] = []
        self.new: dict[str, str] = {}

    def take(self, known: dict[str, str]) -> None:
        waiting: set[str] = set()
        for index, key in enumerate(self.keys):
            if key is not None and key in known:
                self.replies[index] = _load(known[key])
            elif key is None or key not in waiting:
                self.asked.append(index)
                waiting |= {key} if key else set()

    def place(self, answers: Sequence[Any]) -> None:
        fresh: dict[str, Any] = {}
        for index, answer in zip(self.asked, answers, strict=True):
            self.replies[index] = answer
            if (key := self.keys[index]) is not None:
                fresh[key] = answer
                if isinstance(answer, Generation | Scoring):
                    self.new[key] = _dump(answer)
        for index, key in enumerate(self.keys):
            if self.replies[index] is None and key in fresh:
                answer = fresh[key]
                self.replies[index] = answer if isinstance(answer, Failed) else _load(_dump(answer))


# --- keys ------------------------------------------------------------------------------------------------------------


def _identity(lm: LanguageModel) -> list[Any]:
    """Address, name, tokenizer, template, window and extra fields of a model, whatever stands in front of it."""
    while isinstance(lm, Front):
        lm = lm.lm
    tokenizer = lm.tokenizer
    sample = None if tokenizer is None else [tokenizer.bos_id, sorted(tokenizer.end_ids), tokenizer.encode(_SAMPLE)]
    template = lm.template
    words = [getattr(template, name) for name in type(template).__dataclass_fields__]
    extra = getattr(lm, "cache_identity", None)
    return [type(lm).__name__, lm.name, getattr(lm, "address", None), sample, words, lm.context_window, extra]


_SAMPLE = "The quick brown fox, naïve, 东京 \u2603 1234567890 <s></s>\n\tjumps over it all."


def _key(model: str, request: Request[Any]) -> str | None:
    """The key of a request; None for what is not stored."""
    if isinstance(request, Generate | GenerateIds):
        sampling = request.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            return None
    elif not isinstance(request, Score):
        return None
    fields = {name: getattr(request, name) for name in type(request).__dataclass_fields__}
    text = json.dumps([type(request).__name__, fields], default=_plain, sort_keys=True)
    return hashlib.sha256(f"{model}\n{text}".encode()).hexdigest()


def _plain(value: object) -> Any:
    """A dataclass in a request as JSON. What a passage carries beside its text and title is not sent to the model, but
    its score weighs it in an ensemble."""
    if isinstance(value, Passage):
        return [value.text, value.id, value.title, value.score, value.score_kind]
    if isinstance(value, Message):
        return [value.role, value.content, dict(value.extra)]
    if isinstance(value, Sampling):
        return [value.temperature, value.top_p, value.max_tokens, list(value.stop), value.seed]
    return repr(value)


# --- values ----------------------------------------------------------------------------------------------------------


def _dump(answer: Generation | Scoring) -> str:
    tokens = [[one.token, one.logprob, one.token_id, list(one.top), list(one.top_ids)] for one in answer.tokens]
    trace = None if answer.trace is None else dict(answer.trace)
    if isinstance(answer, Scoring):
        return json.dumps({"kind": "scoring", "tokens": tokens, "trace": trace})
    return json.dumps(
        {"kind": "generation", "text": answer.text, "finish": answer.finish_reason, "tokens": tokens, "trace": trace}
    )


def _load(text: str) -> Generation | Scoring:
    stored = cast(dict[str, Any], json.loads(text))
    tokens = tuple(
        TokenLogprob(token, logprob, token_id, tuple((one, value) for one, value in top), tuple(top_ids))
        for token, logprob, token_id, top, top_ids in stored["tokens"]
    )
    if stored["kind"] == "scoring":
        return Scoring(tokens, Usage(), stored["trace"])
    return Generation(stored["text"], tokens, stored["finish"], Usage(), stored["trace"])


class _Store:
    """Key to text, in SQLite with a write-ahead log. One connection, under a lock, opened when it is first used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=60.0, check_same_thread=False, isolation_level=None)
            connection.execute("PRAGMA busy_timeout=60000")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) STRICT")
            self._connection = connection
        return self._connection

    def read(self, keys: Sequence[str | None]) -> dict[str, str]:
        wanted = sorted({key for key in keys if key is not None})
        found: dict[str, str] = {}
        with self._lock:
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                found.update(self._open().execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part))
        return found

    def write(self, answers: dict[str, str]) -> None:
        with self._lock:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", list(answers.items()))
            connection.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
