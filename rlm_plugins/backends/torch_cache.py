"""What a Hugging Face model remembers of the tokens it has read: which kind of cache it keeps, and a faster one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

CacheKind = Literal["full", "windows", "state", "none"]

ROOM = 64
"""Columns kept free for tokens to come."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """How a model keeps what it has read; the kinds are explained in `torch_rows`."""

    kind: CacheKind
    layers: int = 0
    examples: tuple[Tensor, ...] = ()
    """Keys and values of one token in one layer, [1, H, 1, d], where all layers are alike."""


def cache_shape(cache: DynamicCache) -> CacheShape:
    """What one token left in a cache made for the model's configuration."""
    layers = cast(list[Any], cache.layers)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return CacheShape("state")
    shapes = {
        (type(layer), layer.keys.shape, layer.values.shape, layer.keys.device) if layer.is_initialized else None
        for layer in layers
    }
    if len(shapes) != 1 or not layers[0].is_initialized or type(layers[0]) is not DynamicLayer:
        return CacheShape("windows")
    keys, values = cast(Tensor, layers[0].keys), cast(Tensor, layers[0].values)
    return CacheShape("full", len(layers), (keys, values))


class RoomyCache:
    """Keys and values of all layers, each [L, B, H, columns, d], with room at the end: a new token is written in its
    place, where a `DynamicCache` copies everything to append it."""

    def __init__(self, shape: CacheShape, rows: int, columns: int) -> None:
        self.shape = shape
        self.buffers = [
            example.new_empty(shape.layers, rows, example.shape[1], columns, example.shape[3])
            for example in shape.examples
        ]
        self._layers = [_RoomyLayer() for _ in range(shape.layers)]
        self.seen_by_model = DynamicCache()
        self.seen_by_model.layers = cast(list[Any], self._layers)
        self.filled = 0

    @property
    def filled(self) -> int:
        """Columns in use."""
        return self._layers[-1].filled

    @filled.setter
    def filled(self, columns: int) -> None:
        keys, values = self.buffers
        for index, layer in enumerate(self._layers):
            layer.bind(keys[index], values[index], columns)

    def make_room(self, columns: int) -> None:
        old = self.buffers[0].shape[3]
        if columns > old:
            filled = self.filled
            self.buffers = [functional.pad(buffer, (0, 0, 0, max(columns, 2 * old) - old)) for buffer in self.buffers]
            self.filled = filled

    def put(self, row: int, start: int, end: int, blocks: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill a row's columns before `end`: up to `start` zeros (a masked NaN is still NaN once multiplied by 0), then
        what is stored."""
        for index, buffer in enumerate(self.buffers):
            buffer[:, row, :, : min(start, end)] = 0
            if start < end:
                buffer[:, row, :, start:end] = torch.cat([block[index] for block in blocks], dim=2)[:, :, : end - start]

    def take(self, row: int, first: int, start: int, end: int) -> tuple[tuple[Tensor, Tensor], int]:
        """A copy of a row's positions, whose text begins in column `first`: [L, H, T, d] each, and its bytes."""
        keys, values = (buffer[:, row, :, first + start : first + end].clone() for buffer in self.buffers)
        return (keys, values), keys.nbytes + values.nbytes

    @staticmethod
    def joined(caches: Sequence[RoomyCache], columns: int) -> RoomyCache:
        """The rows of several caches in one, moved to the right until all end at `columns`."""
        whole = RoomyCache(caches[0].shape, sum(cache.buffers[0].shape[1] for cache in caches), columns + ROOM)
        row = 0
        for cache in caches:
            filled = cache.filled
            for buffer, old in zip(whole.buffers, cache.buffers, strict=True):
                rows = slice(row, row + old.shape[1])
                buffer[:, rows, :, : columns - filled] = 0
                buffer[:, rows, :, columns - filled : columns] = old[..., :filled, :]
            row += cache.buffers[0].shape[1]
        whole.filled = columns
        return whole


class _RoomyLayer(DynamicLayer):
    """One layer of a `RoomyCache`, as the model sees it."""

    def bind(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self._keys, self._values, self.filled = keys, values, filled
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self._keys[:, :, start : self.filled] = key_states
        self._values[:, :, start : self.filled] = value_states
        self.keys, self.values = self._keys[:, :, : self.filled], self._values[:, :, : self.filled]
        return self.keys, self.values
