"""What an embedder handed over, checked; unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import RetrievalError


def checked(vectors: NDArray[np.float32], texts: Sequence[str], *, dimension: int | None = None) -> NDArray[np.float32]:
    """Vectors [n, dim] as contiguous float32, one for each text.

    Raises `RetrievalError` for a wrong number or dimension of vectors, and for values that are not finite.
    """
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.ndim != 2 or array.shape[0] != len(texts) or array.shape[1] < 1:
        raise RetrievalError(f"the embedder was given {len(texts)} texts and returned an array of shape {array.shape}")
    if dimension is not None and array.shape[1] != dimension:
        raise RetrievalError(
            f"the embedder returned vectors of {array.shape[1]} dimensions, expected {dimension}: "
            "queries and documents must be embedded by the same model with the same settings"
        )
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if wrong.size:
        raise RetrievalError(
            f"the embedder returned a vector with NaN or infinity for {wrong.size} of {len(texts)} texts, "
            f"the first {_shown(texts[int(wrong[0])])}: check the model (half precision overflows) and the text"
        )
    return array


def unit(vectors: NDArray[np.float32], texts: Sequence[str]) -> NDArray[np.float64]:
    """Vectors [n, dim] divided by their lengths. Raises `RetrievalError` for a zero vector: it has no cosine."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    zero = np.flatnonzero(lengths[:, 0] == 0)
    if zero.size:
        raise RetrievalError(
            f"the embedder returned a zero vector for {zero.size} of {len(texts)} texts, "
            f"the first {_shown(texts[int(zero[0])])}: a zero vector has no cosine; leave such texts out"
        )
    return wide / lengths


def cosines(query: NDArray[np.float64], documents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines [n] of a query [dim] with documents [n, dim], all unit vectors.

    Each is summed on its own, so that it is the same to the last bit whichever other documents stand beside it.
    """
    return np.clip((documents * query).sum(axis=1), -1.0, 1.0)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
