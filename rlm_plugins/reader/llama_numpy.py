"""The Llama forward pass in numpy: the embedded reader without torch.

Single-precision throughout. Rows of different lengths are padded on the left and masked; keys and values are kept in
a cache that grows by doubling. Agreement with torch (log-probabilities within 1e-4) is tested.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ..errors import UsageError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

_MASKED = np.float32(-1e30)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; matrices are stored [in, out], ready to be multiplied from the right, the norms' gains folded in."""

    query_key_value: Floats
    output: Floats
    gate_up: Floats
    down: Floats


@dataclass(slots=True)
class Cache:
    """Keys and values of what was read.

    keys: [layers, B, key heads, head width, capacity]; values: [layers, B, key heads, capacity, head width];
    padding: int64 [B], how many of the first columns of each row are padding; length: columns filled.
    """

    keys: Floats
    values: Floats
    padding: Integers
    length: int = 0

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all."""
        capacity = self.keys.shape[4]
        if columns > capacity:
            more = max(columns, 2 * capacity) - capacity
            self.keys = np.concatenate((self.keys, np.zeros((*self.keys.shape[:4], more), np.float32)), axis=4)
            shape = self.values.shape
            self.values = np.concatenate((self.values, np.zeros((*shape[:3], more, shape[4]), np.float32)), axis=3)


class NumpyLlama:
    """A Hugging Face Llama folder (`config.json`, `model.safetensors`), run in numpy.

    Raises `UsageError` where the folder holds another architecture or a feature this pass does not have (biases,
    scaled rotary positions).
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
            raise UsageError(f"{folder} is not a Llama without biases: model_type is {config.get('model_type')!r}")
        if rope.get("rope_type", "default") != "default":
            raise UsageError(f"rotary positions of type {rope['rope_type']!r} are not supported, only 'default'")
        tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}
        self.vocabulary = int(config["vocab_size"])
        self.context_window = int(config["max_position_embeddings"])
        self.heads = int(config["num_attention_heads"])
        self.key_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_width = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self._epsilon = float(config["rms_norm_eps"])
        self._embedding: Floats = tensors["model.embed_tokens.weight"]
        head = tensors.get("lm_head.weight", self._embedding)
        self._unembedding: Floats = np.ascontiguousarray((head * tensors["model.norm.weight"]).T)
        self._layers = [_layer(tensors, number) for number in range(int(config["num_hidden_layers"]))]
        base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        frequencies = base ** (-np.arange(0, self.head_width, 2, dtype=np.float64) / self.head_width)
        angles = np.outer(np.arange(self.context_window), frequencies)
        self._cosine: Floats = np.cos(angles).astype(np.float32)
        self._sine: Floats = np.sin(angles).astype(np.float32)

    def open(self, prompts: Sequence[Sequence[int]], *, reserve: int = 64) -> tuple[Floats, Cache]:
        """Read the prompts in one batch: the log-probabilities of what comes next, float32 [k, V], and the cache.

        Raises `UsageError` for no prompt, an empty one, or one longer than the context window.
        """
        ids, padding = self._padded(prompts)
        cache = self.empty_cache(padding, ids.shape[1] + reserve)
        return log_softmax(self.forward(ids, cache)[:, 0]), cache

    def advance(self, token_ids: Sequence[int], cache: Cache) -> Floats:
        """Append one token to each row: the log-probabilities of the next, float32 [k, V]."""
        return log_softmax(self.forward(np.asarray(token_ids, np.int64)[:, None], cache)[:, 0])

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        """Log-probabilities of each continuation's tokens after its prompt, one float32 array a row."""
        if any(not row for row in continuations) or any(not row for row in prompts):
            raise UsageError("every row needs a prompt and a continuation of at least one token")
        rows = [[*prompt, *after] for prompt, after in zip(prompts, continuations, strict=True)]
        ids, padding = self._padded(rows)
        longest = max(len(row) for row in continuations)
        logits = self.forward(ids, self.empty_cache(padding, ids.shape[1]), last=longest + 1)
        logprobs = log_softmax(logits)
        return [
            logprobs[row, -len(after) - 1 : -1][np.arange(len(after)), np.asarray(after)]
            for row, after in enumerate(continuations)
        ]

    def empty_cache(self, padding: Integers, capacity: int) -> Cache:
        """A cache for rows whose first `padding` [B] columns are padding."""
        shape = (len(self._layers), len(padding), self.key_heads)
        return Cache(
            np.zeros((*shape, self.head_width, capacity), np.float32),
            np.zeros((*shape, capacity, self.head_width), np.float32),
            padding,
        )

    def forward(self, ids: Integers, cache: Cache, *, last: int = 1) -> Floats:
        """Logits [B, min(last, T), V] of the last positions of `ids` [B, T], which follow what the cache holds.

        Raises `UsageError` where the rows would outgrow the context window.
        """
        rows, length = ids.shape
        start, stop = cache.length, cache.length + length
        if stop - int(cache.padding.min()) > self.context_window:
            raise UsageError(f"{stop} tokens do not fit the context window of {self.context_window}")
        cache.reserve(stop)
        columns = np.arange(start, stop)
        positions = np.maximum(columns[None] - cache.padding[:, None], 0)
        cosine, sine = self._cosine[positions][:, :, None], self._sine[positions][:, :, None]
        mask = _mask(columns, stop, cache.padding)
        hidden: Floats = self._embedding[ids].reshape(rows * length, -1)
        for number, layer in enumerate(self._layers):
            self._attend(hidden, layer, cache, number, (cosine, sine), mask, start)
            if number == len(self._layers) - 1 and last < length:
                hidden = np.ascontiguousarray(hidden.reshape(rows, length, -1)[:, -last:]).reshape(rows * last, -1)
            gate, up = np.split(_normalised(hidden, self._epsilon) @ layer.gate_up, 2, axis=1)
            hidden += (gate / (1 + np.exp(-gate)) * up) @ layer.down
        cache.length = stop
        logits = _normalised(hidden, self._epsilon) @ self._unembedding
        return logits.reshape(rows, -1, self.vocabulary)

    def _attend(
        self,
        hidden: Floats,
        layer: LayerWeights,
        cache: Cache,
        number: int,
        rotation: tuple[Floats, Floats],
        mask: Floats | None,
        start: int,
    ) -> None:
        """Add one layer's attention to `hidden` [B * T, D], and its keys and values to the cache."""
        rows, width, stop = cache.rows, self.head_width, start + hidden.shape[0] // cache.rows
        packed = (_normalised(hidden, self._epsilon) @ layer.query_key_value).reshape(rows, stop - start, -1, width)
        query = _rotated(packed[:, :, : self.heads], *rotation)
        key = _rotated(packed[:, :, self.heads : self.heads + self.key_heads], *rotation)
        cache.keys[number, :, :, :, start:stop] = key.transpose(0, 2, 3, 1)
        cache.values[number, :, :, start:stop] = packed[:, :, self.heads + self.key_heads :].transpose(0, 2, 1, 3)
        keys, values = cache.keys[number, ..., :stop], cache.values[number, :, :, :stop]
        # grouped queries: the heads that share a key head become further rows of one product
        shared = self.heads // self.key_heads
        query = query.reshape(rows, stop - start, self.key_heads, shared, width).transpose(0, 2, 3, 1, 4)
        scores = query.reshape(rows, self.key_heads, -1, width) * np.float32(width**-0.5) @ keys
        if mask is not None:
            scores = scores.reshape(rows, self.key_heads, shared, stop - start, stop)
            scores += mask[:, None, None]
            scores = scores.reshape(rows, self.key_heads, -1, stop)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        seen = (scores @ values).reshape(rows, self.heads, stop - start, width).transpose(0, 2, 1, 3)
        hidden += seen.reshape(rows * (stop - start), -1) @ layer.output

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Integers, Integers]:
        if not rows or any(not row for row in rows):
            raise UsageError("at least one row is needed, and every row needs at least one token")
        longest = max(len(row) for row in rows)
        if longest > self.context_window:
            raise UsageError(f"a row of {longest} tokens does not fit the context window of {self.context_window}")
        padding = np.array([longest - len(row) for row in rows], np.int64)
        ids = np.zeros((len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            ids[number, padding[number] :] = row
        return ids, padding


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _layer(tensors: dict[str, Floats], number: int) -> LayerWeights:
    prefix = f"model.layers.{number}."
    before = tensors[prefix + "input_layernorm.weight"]
    after = tensors[prefix + "post_attention_layernorm.weight"]
    attention = [tensors[f"{prefix}self_attn.{name}_proj.weight"] * before for name in "qkv"]
    feed = [tensors[f"{prefix}mlp.{name}_proj.weight"] * after for name in ("gate", "up")]
    return LayerWeights(
        np.ascontiguousarray(np.concatenate(attention).T),
        np.ascontiguousarray(tensors[prefix + "self_attn.o_proj.weight"].T),
        np.ascontiguousarray(np.concatenate(feed).T),
        np.ascontiguousarray(tensors[prefix + "mlp.down_proj.weight"].T),
    )


def _normalised(hidden: Floats, epsilon: float) -> Floats:
    """Root-mean-square normalisation; its gains are folded into the matrix that follows."""
    mean = np.einsum("nd,nd->n", hidden, hidden)[:, None] / np.float32(hidden.shape[1])
    return hidden / np.sqrt(mean + np.float32(epsilon))


def _rotated(states: Floats, cosine: Floats, sine: Floats) -> Floats:
    """Rotary positions in the half-and-half layout. states: [B, T, heads, width]; the others [B, T, 1, width / 2]."""
    first, second = np.split(states, 2, axis=-1)
    turned = np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return turned.astype(np.float32, copy=False)


def _mask(columns: Integers, stop: int, padding: Integers) -> Floats | None:
    """What each position may see, as 0 or a large negative number [B, T, stop]; None where it may see everything.

    A padding position sees itself, so that its softmax is defined; nothing ever reads it.
    """
    if len(columns) == 1 and not padding.any():
        return None
    every = np.arange(stop)
    visible = (every <= columns[:, None]) & (every >= padding[:, None, None])
    visible |= every == columns[:, None]
    return np.where(visible, np.float32(0), _MASKED).astype(np.float32)
