"""Rows of token ids through a Hugging Face causal model: one batch, one key-value cache, beginnings reused.

Rows are padded on the left, so that every row's next token stands in the last column:

    row 0   . . a b c d e f       n = 6 tokens
    row 1   g h i j k l m n       n = 8 tokens
                    [-----]       the last S columns are computed; what stands before them comes from the store

A batch computes S columns whatever a row could reuse beyond that, so each row takes n - S tokens from the store, and
no hole ever opens between what is stored and what is computed. Rows with much and rows with little left to compute go
in batches of their own.

What a model permits is seen from what one token leaves in its cache:

| cache | rows of several lengths | beginnings reused |
|---|---|---|
| `full`: attention to everything, in every layer alike | one batch | yes |
| `windows`: sliding windows, or layers of several shapes | one batch | no: a window forgets what another prompt needs |
| `state`: anything else (recurrent, hybrid, own positions) | a batch per length: padding would enter the state | no |
| `none` | a batch per length, the whole text again at every token | no |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from ..requests import Rows
from ..tokens import TokenIds
from .prefix_cache import PrefixCache, batches
from .row_jobs import Job, RowSet, last_ids, reading, scoring, spread_of
from .torch_cache import ROOM, CacheShape, RoomyCache, cache_shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Job = Job[tuple[Tensor, Tensor]]

_SCORE_BYTES = 1 << 28  # logits that one batch of scores may hold


class TorchRows:
    """The `RowRunner` of a Hugging Face causal model.

    `prefix_cache_bytes` bounds the stored beginnings of prompts (0: none); `max_batch_tokens` the tokens, padding
    included, of one forward pass over prompts.
    """

    def __init__(self, model: Any, *, prefix_cache_bytes: int, max_batch_tokens: int) -> None:
        self.model = model
        self.prefixes = PrefixCache[tuple[Tensor, Tensor]](prefix_cache_bytes)
        self.computed_tokens = 0
        """Tokens sent through the model so far, padding left out."""
        self._device = torch.device(model.device)
        self._max_batch_tokens = max_batch_tokens
        parameters = inspect.signature(model.forward).parameters
        self._takes_cache = "past_key_values" in parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._shape: CacheShape | None = None

    # -- what a backend is asked ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def open_rows(self, prompts: tuple[TokenIds, ...]) -> RowSet[_Part]:
        distinct = list(dict.fromkeys(prompts))
        self._look_once()
        jobs = [reading(prompt, self.prefixes) for prompt in distinct]
        before = self.computed_tokens
        parts: list[_Part] = []
        logits: list[Tensor] = []
        groups = self._groups(jobs, under_way=True)
        for group in groups:
            part, last = self._prefill([jobs[index] for index in group])
            parts.append(part)
            logits.append(last[:, -1])
        if len(parts) > 1 and self.shape.kind == "full":
            parts = [_merged(parts)]
        rows = RowSet(
            parts,
            spread_of(prompts, distinct, [index for group in groups for index in group]),
            prompt_tokens=(total := sum(map(len, prompts))),
            cached=total - (self.computed_tokens - before),
        )
        _settle(rows, logits)
        return rows

    @torch.inference_mode()
    def advance(self, rows: Rows, token_id: int) -> NDArray[np.float32]:
        rows = cast(RowSet[_Part], rows)
        return _settle(rows, [self._step(part, token_id) for part in rows.open_parts()])

    @torch.inference_mode()
    def score_rows(
        self, prompts: tuple[TokenIds, ...], continuations: tuple[TokenIds, ...]
    ) -> list[NDArray[np.float32]]:
        self._look_once()
        jobs = [scoring(*row, self.prefixes) for row in zip(prompts, continuations, strict=True)]
        scores: list[NDArray[np.float32]] = [torch.zeros(0).numpy()] * len(jobs)
        most_logits = 4 * self._vocabulary * max((job.keep for job in jobs), default=1)
        rows_at_once = max(1, _SCORE_BYTES // most_logits)
        for group in self._groups(jobs, under_way=False):
            for at in range(0, len(group), rows_at_once):
                chunk = group[at : at + rows_at_once]
                for index, logits in zip(chunk, self._prefill([jobs[index] for index in chunk])[1], strict=True):
                    target = torch.tensor(continuations[index], dtype=torch.long, device=self._device)
                    logprobs = torch.log_softmax(logits[logits.shape[0] - len(target) :].float(), dim=-1)
                    scores[index] = logprobs.gather(-1, target[:, None])[:, 0].cpu().numpy()
        return scores

    # -- computing -----------------------------------------------------------------------------------------------------

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def shape(self) -> CacheShape:
        """How the model keeps what it has read; found out with one token, once."""
        self._look_once()
        assert self._shape is not None
        return self._shape

    def _look_once(self) -> None:
        if self._shape is None:
            self._shape = self._look()
            if self._shape.kind != "full":
                self.prefixes.budget = 0

    def _look(self) -> CacheShape:
        if not self._takes_cache:
            return CacheShape("none")
        cache = DynamicCache(config=self.model.config)
        one = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        output = self.model(input_ids=one, past_key_values=cache, use_cache=True)
        if getattr(output, "past_key_values", None) is not cache:
            return CacheShape("none")
        return cache_shape(cache) if self._takes_positions else CacheShape("state")

    def _groups(self, jobs: Sequence[_Job], *, under_way: bool) -> list[list[int]]:
        """Which rows to compute together; `under_way` says that they are to be continued."""
        if self.shape.kind in ("state", "none"):
            lengths = sorted({len(job.ids) for job in jobs})
            return [[index for index, job in enumerate(jobs) if len(job.ids) == length] for length in lengths]
        if self.shape.kind == "windows" and under_way:
            return [list(range(len(jobs)))]  # such parts cannot be merged again, and every part costs a pass per token
        return batches([job.to_compute for job in jobs], limit=self._max_batch_tokens)

    def _prefill(self, jobs: Sequence[_Job]) -> tuple[_Part, Tensor]:
        """Compute prompts in one batch. Returns them under way, and the logits of the last columns that are wanted of
        any, [B, keep, V]."""
        keep = max(job.keep for job in jobs)
        lengths = [len(job.ids) for job in jobs]
        columns = max(lengths)
        computed = max(job.to_compute for job in jobs)
        self.computed_tokens += sum(min(computed, length) for length in lengths)
        ids = torch.tensor([last_ids(job, computed) for job in jobs], device=self._device)
        starts = torch.tensor([columns - length for length in lengths], device=self._device)
        counted = torch.arange(columns + ROOM, device=self._device) - starts[:, None]
        mask = (counted >= 0).long()
        positions = counted.clamp(min=0)
        if self.shape.kind == "full":
            cache = RoomyCache(self.shape, len(jobs), columns + ROOM)
            for row, job in enumerate(jobs):
                cache.put(row, columns - lengths[row], columns - computed, job.blocks)
            cache.filled = columns - computed
        else:
            cache = DynamicCache(config=self.model.config) if self.shape.kind != "none" else None
        part = _Part(cache, mask, columns, positions[:, columns : columns + 1].clone())
        if cache is None:
            part.ids = ids
        logits = self._forward(ids, mask[:, :columns], positions[:, columns - computed : columns], cache, keep)
        if isinstance(cache, RoomyCache):
            for row, job in enumerate(jobs):
                self.prefixes.add(job.ids[: job.prompt_length], partial(cache.take, row, columns - lengths[row]))
        return part, logits

    def _step(self, part: _Part, token_id: int) -> Tensor:
        """Append a token to every row of a part; logits [B, V]."""
        ids = torch.full((part.mask.shape[0], 1), token_id, device=self._device)
        self.computed_tokens += ids.shape[0]
        if part.ids is not None:
            ids = part.ids = torch.cat((part.ids, ids), dim=1)
        part.columns += 1
        if part.columns > part.mask.shape[1]:
            part.mask = torch.cat((part.mask, torch.ones_like(part.mask)), dim=1)
        if isinstance(part.cache, RoomyCache):
            part.cache.make_room(part.columns)
        logits = self._forward(ids, part.mask[:, : part.columns], part.positions, part.cache, 1)
        part.positions += 1
        return logits[:, -1]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids}
        if cache is not None:
            inputs |= {
                "past_key_values": cache.seen_by_model if isinstance(cache, RoomyCache) else cache,
                "use_cache": True,
            }
        if self.shape.kind in ("full", "windows"):
            inputs |= {"attention_mask": mask, "position_ids": positions}
        if self._keeps_logits:
            inputs["logits_to_keep"] = keep
        return self.model(**inputs).logits[:, -keep:]


@dataclass(slots=True)
class _Part:
    """Rows that advance together."""

    cache: Any
    mask: Tensor
    """1 where a column holds a token, and where one will, [B, columns and more]."""
    columns: int
    positions: Tensor
    """Of the next token, [B, 1]."""
    ids: Tensor | None = None
    """Everything so far, [B, columns], for a model without a cache."""


def _merged(parts: Sequence[_Part]) -> _Part:
    """Parts of several lengths as one, in their order."""
    columns = max(part.columns for part in parts)
    mask = [functional.pad(part.mask, (columns - part.columns, 0))[:, : columns + ROOM] for part in parts]
    return _Part(
        RoomyCache.joined([cast(RoomyCache, part.cache) for part in parts], columns),
        torch.cat(mask),
        columns,
        torch.cat([part.positions for part in parts]),
    )


def _settle(rows: RowSet[_Part], logits: Sequence[Tensor]) -> NDArray[np.float32]:
    """Logits [B, V] of each part become the log-probabilities of all rows, [k, V]."""
    together = logits[0] if len(logits) == 1 else torch.cat(list(logits))
    logprobs = torch.log_softmax(together.float(), dim=-1)
    rows.current = (logprobs if rows.spread is None else logprobs[rows.spread]).cpu().numpy()
    return rows.current
