"""Document weights: retrieval scores to a distribution over the documents.

    lambda(d, x) = exp(s(d, x) / tau) / sum_{d' in D'} exp(s(d', x) / tau)        (Shi et al. 2023, eq. 1)

The paper's tau is 1, which makes weights of cosines almost uniform (.85 against .75: a ratio of 1.11). Here tau depends
on the kind of score: .1 for a cosine (what LSR trains at), 1 for a logit; kinds without a natural scale (inner product,
distance, rank, probability) need an explicit one. Weights are always a softmax, never scores over their sum: negative
scores would turn the ranking round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from ...mixtures import log_softmax
from ...texts import Passage, ScoreKind

Weighting = Literal["softmax", "uniform"]

TEMPERATURES: dict[ScoreKind, float] = {"cosine": 0.1, "logit": 1.0}
"""The default tau by kind of score."""

_SMALLER_IS_BETTER: frozenset[ScoreKind] = frozenset({"distance", "rank"})


def document_weights(
    scores: Sequence[float],
    kind: ScoreKind,
    *,
    weights: Weighting = "softmax",
    temperature: float | None = None,
) -> NDArray[np.float64]:
    """Weights [k], probabilities. Raises `UsageError` for scores that are not finite and kinds that need a temperature.

    >>> document_weights([0.85, 0.75], "cosine").round(3).tolist()
    [0.731, 0.269]
    >>> document_weights([0.85, 0.75], "cosine", temperature=1.0).round(3).tolist()
    [0.525, 0.475]
    """
    array = np.asarray(scores, dtype=np.float64)
    if not array.size:
        raise UsageError("there are no documents to weigh")
    if not np.isfinite(array).all():
        raise UsageError(f"document scores must be finite, got {array.tolist()}: check the embeddings or the store")
    if weights == "uniform" or kind == "uniform":
        return np.full(array.size, 1.0 / array.size)
    if temperature is None:
        temperature = TEMPERATURES.get(kind)
    if temperature is None:
        raise UsageError(
            f"scores of the kind {kind!r} have no natural scale: pass weight_temperature (a score difference of one "
            'temperature is a factor of e in weight), or weights="uniform"'
        )
    if not 0 < temperature < float("inf"):
        raise UsageError(f"weight_temperature must be a finite number above 0, got {temperature!r}")
    better = -array if kind in _SMALLER_IS_BETTER else array
    with np.errstate(over="ignore"):  # a difference too large for a float is a weight of 0
        return np.exp(log_softmax((better - better.max()) / temperature)).astype(np.float64)


def passage_weights(
    passages: Sequence[Passage], *, weights: Weighting = "softmax", temperature: float | None = None
) -> NDArray[np.float64]:
    """Weights [k] of passages by the scores they carry; uniform where none carries one.

    Raises `UsageError` when only some are scored, or by different kinds of score, unless `weights` is uniform.
    """
    if weights == "uniform":
        return document_weights([0.0] * len(passages), "uniform")
    kinds = {passage.score_kind for passage in passages}
    if len(kinds) > 1:
        raise UsageError(
            f"the documents carry different kinds of score, {sorted(str(kind) for kind in kinds)}: score them in one "
            'way (scores="embeddings"), or use weights="uniform"'
        )
    kind = passages[0].score_kind if passages else None
    scores = [0.0 if passage.score is None else passage.score for passage in passages]
    return document_weights(scores, kind or "uniform", weights=weights, temperature=temperature)
