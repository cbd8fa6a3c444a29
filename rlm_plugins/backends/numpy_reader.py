"""A Llama folder as a language model without torch: numpy, `tokenizers` and `jinja2` are enough.

Meant for the embedded reader, and for small models where installing torch is not worth it. Prompts share what they
begin with, as in `torch_rows`; the arithmetic is `rlm_plugins.reader.llama_numpy`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..prompts import QUESTION_ANSWER, PromptTemplate
from ..requests import Rows
from ..texts import Message
from ..tokens import TokenIds
from .chats import encode_conversation
from .local import LocalModel
from .prefix_cache import PrefixCache, batches
from .row_jobs import Job, RowSet, last_ids, reading, scoring, spread_of

if TYPE_CHECKING:
    from ..reader.llama_numpy import Cache, NumpyLlama

Floats = NDArray[np.float32]
_Job = Job[tuple[Floats, Floats]]

_ROOM = 64  # columns kept free for tokens to come


class NumpyLM(LocalModel):
    """A folder with a Llama (`config.json`, `model.safetensors`, `tokenizer.json` and the tokenizer's settings).

    Raises `UsageError` where a file is missing or the model is of another kind.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        template: PromptTemplate = QUESTION_ANSWER,
        prefix_cache_bytes: int = 512 << 20,
        max_batch_tokens: int = 8192,
    ) -> None:
        from ..reader.llama_numpy import NumpyLlama

        folder = Path(folder)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / file).is_file():
                raise UsageError(f"{folder} has no {file}: expected the folder of a Hugging Face Llama")
        self.model = NumpyLlama(folder)
        self._rows = NumpyRows(self.model, prefix_cache_bytes=prefix_cache_bytes, max_batch_tokens=max_batch_tokens)
        super().__init__(
            self._rows,
            name=name or folder.name,
            tokenizer=TokenizersTokenizer(folder),
            context_window=self.model.context_window,
            repeatability=1e-5,
            template=template,
        )

    def clear_prefix_cache(self) -> None:
        """Give up the stored beginnings of prompts, and their memory."""
        self._rows.prefixes.clear()


class NumpyRows:
    """The `RowRunner` of a `NumpyLlama`; parameters as of `TorchRows`."""

    def __init__(self, model: NumpyLlama, *, prefix_cache_bytes: int, max_batch_tokens: int) -> None:
        self.model = model
        self.prefixes = PrefixCache[tuple[Floats, Floats]](prefix_cache_bytes)
        self.computed_tokens = 0
        """Tokens sent through the model so far, padding left out."""
        self._max_batch_tokens = max_batch_tokens

    def open_rows(self, prompts: tuple[TokenIds, ...]) -> RowSet[Cache]:
        distinct = list(dict.fromkeys(prompts))
        jobs = [reading(prompt, self.prefixes) for prompt in distinct]
        before = self.computed_tokens
        groups = batches([job.to_compute for job in jobs], limit=self._max_batch_tokens)
        caches, logits = zip(*(self._prefill([jobs[index] for index in group]) for group in groups), strict=True)
        rows = RowSet(
            [caches[0] if len(caches) == 1 else _joined(self.model, caches)],
            spread_of(prompts, distinct, [index for group in groups for index in group]),
            prompt_tokens=(total := sum(map(len, prompts))),
            cached=total - (self.computed_tokens - before),
        )
        _settle(rows, np.concatenate(logits)[:, -1])
        return rows

    def advance(self, rows: Rows, token_id: int) -> Floats:
        rows = cast("RowSet[Cache]", rows)
        [cache] = rows.open_parts()
        self.computed_tokens += cache.rows
        ids = np.full((cache.rows, 1), token_id, np.int64)
        return _settle(rows, self.model.forward(ids, cache)[:, -1])

    def score_rows(self, prompts: tuple[TokenIds, ...], continuations: tuple[TokenIds, ...]) -> list[Floats]:
        from ..reader.llama_numpy import log_softmax

        jobs = [scoring(*row, self.prefixes) for row in zip(prompts, continuations, strict=True)]
        scores = [np.zeros(0, np.float32)] * len(jobs)
        for group in batches([job.to_compute for job in jobs], limit=self._max_batch_tokens):
            _, logits = self._prefill([jobs[index] for index in group])
            for index, row in zip(group, logits, strict=True):
                target = np.asarray(continuations[index], np.int64)
                logprobs = log_softmax(row[len(row) - len(target) :])
                scores[index] = logprobs[np.arange(len(target)), target]
        return scores

    def _prefill(self, jobs: Sequence[_Job]) -> tuple[Cache, Floats]:
        """Compute prompts in one batch: their cache, and the logits of the last wanted columns, [B, keep, V]."""
        lengths = np.array([len(job.ids) for job in jobs])
        columns = int(lengths.max())
        computed = max(job.to_compute for job in jobs)
        self.computed_tokens += int(np.minimum(lengths, computed).sum())
        cache = self.model.empty_cache((columns - lengths).astype(np.int64), columns + _ROOM)
        cache.length = columns - computed
        for row, job in enumerate(jobs):
            first = columns - len(job.ids)
            if first < cache.length:
                known = cache.length - first
                keys, values = zip(*job.blocks, strict=True)
                cache.keys[:, row, :, :, first : cache.length] = np.concatenate(keys, axis=3)[..., :known]
                cache.values[:, row, :, first : cache.length] = np.concatenate(values, axis=2)[:, :, :known]
        ids = np.array([last_ids(job, computed) for job in jobs], np.int64)
        logits = self.model.forward(ids, cache, last=max(job.keep for job in jobs))
        for row, job in enumerate(jobs):
            self.prefixes.add(job.ids[: job.prompt_length], lambda start, end, row=row: _taken(cache, row, start, end))
        return cache, logits


def _taken(cache: Cache, row: int, start: int, end: int) -> tuple[tuple[Floats, Floats], int]:
    """A copy of a row's positions, and its bytes."""
    first = int(cache.padding[row])
    keys = cache.keys[:, row, :, :, first + start : first + end].copy()
    values = cache.values[:, row, :, first + start : first + end].copy()
    return (keys, values), keys.nbytes + values.nbytes


def _joined(model: NumpyLlama, caches: Sequence[Cache]) -> Cache:
    """The rows of several caches in one, moved to the right until all end in the same column."""
    columns = max(cache.length for cache in caches)
    padding = np.concatenate([cache.padding + columns - cache.length for cache in caches])
    whole = model.empty_cache(padding, columns + _ROOM)
    whole.length, row = columns, 0
    for cache in caches:
        rows, shift = slice(row, row + cache.rows), columns - cache.length
        whole.keys[:, rows, :, :, shift:columns] = cache.keys[..., : cache.length]
        whole.values[:, rows, :, shift:columns] = cache.values[:, :, :, : cache.length]
        row += cache.rows
    return whole


def _settle(rows: RowSet[Cache], logits: Floats) -> Floats:
    """Logits [B, V] of the computed rows become the log-probabilities of all rows, [k, V]."""
    from ..reader.llama_numpy import log_softmax

    logprobs = log_softmax(logits)
    rows.current = logprobs if rows.spread is None else logprobs[rows.spread]
    return rows.current


class TokenizersTokenizer:
    """The tokenizer of a model folder as a `Tokenizer`, by the `tokenizers` and `jinja2` packages alone.

    It reads `tokenizer.json`, the special tokens and the chat template of `tokenizer_config.json` (or
    `chat_template.jinja`), and the end tokens of `generation_config.json`.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer

        folder = Path(folder)
        self._controls = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._plain.encode_special_tokens = True
        settings = _json(folder / "tokenizer_config.json")
        self._named = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in settings.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and token
        }
        first = self._controls.encode("").ids[:1]
        bos = self._id("bos_token")
        self._bos_id = bos if first and first[0] == bos else None
        said = _json(folder / "generation_config.json").get("eos_token_id")
        ends: list[int] = [] if said is None else [said] if isinstance(said, int) else list(said)
        eos = self._id("eos_token")
        self._end_ids = frozenset[int]([*ends, *(() if eos is None else (eos,))])
        added = self._controls.get_added_tokens_decoder().values()
        self._specials = {token.content for token in added if token.special}
        self._template = _chat_template(folder, settings)

    def _id(self, name: str) -> int | None:
        return self._controls.token_to_id(self._named[name]) if name in self._named else None

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def end_ids(self) -> frozenset[int]:
        return self._end_ids

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._controls.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        """Raises `UsageError` where the template refuses the conversation (an unknown role, turns out of order)."""
        if self._template is None:
            return None
        return encode_conversation(
            messages,
            self._specials,
            render=self._render,
            encode_template=lambda text: self._controls.encode(text, add_special_tokens=False).ids,
            encode_text=self.encode,
        )

    def _render(self, turns: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        assert self._template is not None
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._named)
        except TemplateError as error:
            raise UsageError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """The compiled template, in the environment that transformers gives it; None where there is none."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    file = folder / "chat_template.jinja"
    source: Any = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one["template"] for one in source if one["name"] == "default"), None)
    if not source:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    cast(dict[str, Any], environment.globals)["raise_exception"] = refuse
    return environment.from_string(source)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


__all__ = ["NumpyLM", "NumpyRows", "TokenizersTokenizer"]
