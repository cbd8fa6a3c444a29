"""Arithmetic of mixtures, in log space. Pure functions on arrays: k documents, V tokens, nats.

Log-probabilities come in and go out; probabilities appear where a comparison needs sums of them. Everything is float32
or better. -inf (a probability of zero) is a value; NaN is an error at the place that produced it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError

Floats = NDArray[np.floating[Any]]


def log_softmax(values: ArrayLike) -> Floats:
    """Values [..., V] to log-probabilities [..., V].

    >>> np.exp(log_softmax([0.0, np.log(3.0)])).round(4).tolist()
    [0.25, 0.75]
    """
    array = _floats(values)
    shifted = array - array.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_weights(weights: ArrayLike) -> Floats:
    """Probabilities [k] to their logarithms; raises `UsageError` unless they are finite, not negative and sum to 1."""
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or (array < 0).any():
        raise UsageError(f"document weights must be a list of finite numbers of at least 0, got {weights!r}")
    if abs(array.sum() - 1) > 1e-6:
        raise UsageError(f"document weights must sum to 1, got a sum of {array.sum():.6g}: use a softmax of the scores")
    with np.errstate(divide="ignore"):
        return np.log(array)


def temper(logprobs: Floats, temperature: float) -> Floats:
    """Each row at a temperature: log_softmax(logprobs / T), [..., V]. The smallest T leave only a row's best token."""
    if temperature == 1.0:
        return logprobs
    divisor = np.clip(temperature, np.finfo(logprobs.dtype).tiny, np.finfo(logprobs.dtype).max)
    with np.errstate(over="ignore"):
        return log_softmax((logprobs - logprobs.max(axis=-1, keepdims=True)) / logprobs.dtype.type(divisor))


def mixture(log_weights: Floats, logprobs: Floats) -> Floats:
    """log sum_d w_d p_d(v): rows [k, V] to one row [V]. REPLUG's ensemble (Shi et al. 2023, eq. 2).

    >>> np.exp(mixture(np.log([0.5, 0.5]), np.log([[0.9, 0.1], [0.5, 0.5]]))).round(4).tolist()
    [0.7, 0.3]
    """
    weighted = logprobs + log_weights.astype(logprobs.dtype)[:, None]
    return _log_sum_exp(weighted)


def geometric_mixture(log_weights: Floats, logprobs: Floats) -> Floats:
    """log of the normalised product prod_d p_d(v)^w_d, [k, V] to [V]: a product of experts: any one document can veto.

    It is what averaging logits computes. Raises `UsageError` where every token is vetoed.
    """
    weights = np.exp(log_weights).astype(logprobs.dtype)
    used = weights > 0  # a document of weight 0 has no say, not even by a probability of zero: 0 * -inf is no number
    product = weights[used] @ logprobs[used]
    if np.isneginf(product).all():
        raise UsageError(
            "every next token is impossible under some document, so the product of the documents is zero everywhere: "
            'use pool="probability"'
        )
    return log_softmax(product)


def responsibilities(log_weights: Floats, token_logprobs: Floats) -> Floats:
    """r_d = w_d p_d(y) / sum_e w_e p_e(y): which document decided for the token, probabilities [k].

    >>> responsibilities(np.log([0.5, 0.5]), np.log([0.9, 0.1])).round(4).tolist()
    [0.9, 0.1]
    """
    joint = log_weights + token_logprobs
    return np.exp(joint - _log_sum_exp(joint[:, None])[0])


def posterior_log_weights(log_weights: Floats, token_logprobs: Floats) -> Floats:
    """log of w_d p_d(y) / sum_e w_e p_e(y), [k]: the weights after a token was seen. With them the conditionals chain
    to the sequence-level mixture of RAG-Sequence (Lewis et al. 2020). What no document can have written teaches
    nothing: the weights stay."""
    joint = log_weights + token_logprobs
    total = _log_sum_exp(joint[:, None])[0]
    return log_weights if np.isneginf(total) else joint - total


def leave_one_out_choices(log_weights: Floats, logprobs: Floats) -> NDArray[np.intp]:
    """The greedy token if document d were not there, for each d: ids [k]. With one document: its own choice."""
    if len(log_weights) == 1:
        return logprobs.argmax(axis=-1)
    weighted = np.exp(logprobs.astype(np.float64) + log_weights[:, None])
    choices = (weighted.sum(axis=0) - weighted).argmax(axis=-1)
    # Beside a document that has nearly all the weight the others are lost in the rounding of the difference.
    heaviest = int(np.argmax(log_weights))
    others = np.delete(log_weights, heaviest)
    others = others - others.max() if np.isfinite(others.max()) else np.zeros(len(others))
    choices[heaviest] = mixture(others, np.delete(logprobs, heaviest, axis=0).astype(np.float64)).argmax()
    return choices


def nucleus(logprobs: Floats, top_p: float) -> Floats:
    """The smallest set of most probable tokens whose sum reaches `top_p`, renormalised, the rest -inf; [V] to [V]."""
    if top_p >= 1.0:
        return logprobs
    order = np.argsort(-logprobs, kind="stable")
    before = np.cumsum(np.exp(logprobs[order].astype(np.float64))) - np.exp(logprobs[order].astype(np.float64))
    kept = order[before < top_p]
    cut = np.full_like(logprobs, -np.inf)
    cut[kept] = logprobs[kept]
    return log_softmax(cut)


def poisoning_radius(
    log_weights: Floats,
    logprobs: Floats,
    token: int,
    *,
    replaceable: NDArray[np.bool_] | None = None,
    mixed: Floats | None = None,
) -> int:
    """How many documents an adversary may replace, whatever they then say, without changing the greedy `token`.

    Token t survives any replacement of m documents if for every other v
    sum_d w_d (p_d(t) - p_d(v)) > sum of the m largest w_d (1 + p_d(t) - p_d(v)). The weights must be fixed: they must
    not depend on what the documents say. `replaceable` [k] leaves out rows no adversary reaches (the null document).
    `mixed` is their mixture [V], where it is known already: then few of the k x V probabilities have to be computed.
    Returns the largest such m, -1 where t does not even win now.
    """
    weights = np.exp(log_weights.astype(np.float64))
    exposed = weights if replaceable is None else weights * replaceable
    mixed = mixture(log_weights, logprobs) if mixed is None else mixed
    chosen = np.exp(logprobs[:, token].astype(np.float64))
    few = min(64, len(mixed))
    order = np.argpartition(-mixed, few - 1)
    rivals, rest = order[:few], order[few:]
    rivals = rivals[rivals != token]
    radius = _radius(weights, exposed, chosen, np.exp(logprobs[:, rivals].astype(np.float64)))
    if not len(rest):
        return radius
    # No other token has more probability than the best of the rest (and a little, for the rounding of `mixed`). If one
    # that had all of that, and yet counted as impossible in every document, could not do more harm, an exact look at
    # the rest can be spared.
    lead = weights @ chosen - np.exp(float(mixed[rest].max()) + 1e-4)
    harm = np.cumsum(np.sort(exposed * (1 + chosen))[::-1])
    if lead > 0 and int((harm < lead).sum()) >= radius:
        return radius
    return min(radius, _radius(weights, exposed, chosen, np.exp(logprobs[:, rest[rest != token]].astype(np.float64))))


def _radius(weights: Floats, exposed: Floats, chosen: Floats, rivals: Floats) -> int:
    """`poisoning_radius` against given rivals, [k, R]."""
    reach = int((exposed > 0).sum())
    if rivals.shape[1] == 0:
        return reach
    lead = weights @ (chosen[:, None] - rivals)  # [R]
    gains = np.sort(exposed[:, None] * (1 + chosen[:, None] - rivals), axis=0)[::-1]  # [k, R], the worst first
    survived = (np.cumsum(gains, axis=0)[:reach] < lead).sum(axis=0)
    return int(np.where(lead > 0, survived, -1).min())


# --- bounds from a truncated top-n -----------------------------------------------------------------------------------


def unlisted_bound(listed: ArrayLike, *, ordered: bool = True) -> float:
    """The largest probability a token can have that is not among the listed ones.

    `listed` are the probabilities [n] of n distinct tokens. If they are the n most probable (`ordered`), an unlisted
    one is at most the smallest of them and what is left over; and never above 1 / (n + 1). Otherwise only what is left.

    >>> round(unlisted_bound([0.6, 0.3]), 4), round(unlisted_bound([0.6, 0.3], ordered=False), 4)
    (0.1, 0.1)
    >>> round(unlisted_bound([0.3, 0.05]), 4), round(unlisted_bound([0.3, 0.05], ordered=False), 4)
    (0.05, 0.65)
    """
    array = np.asarray(listed, dtype=np.float64)
    left = max(0.0, 1.0 - float(array.sum()))
    if not array.size or not ordered:
        return left
    return min(float(array.min()), left, 1.0 / (array.size + 1))


def mixture_bounds(
    weights: ArrayLike, listed: list[dict[int, float]], unlisted: ArrayLike
) -> tuple[dict[int, tuple[float, float]], float]:
    """Bounds on mixture probabilities when each document lists only some tokens.

    `listed[d]` maps token id to probability under document d; `unlisted[d]` bounds every token it does not list.
    Returns {token: (lower, upper)} for every token listed anywhere, and the upper bound of all other tokens.
    """
    lam = np.asarray(weights, dtype=np.float64)
    caps = np.asarray(unlisted, dtype=np.float64)
    bounds: dict[int, tuple[float, float]] = {}
    for token in {token for document in listed for token in document}:
        lower = sum(w * document.get(token, 0.0) for w, document in zip(lam, listed, strict=True))
        upper = sum(w * document.get(token, cap) for w, document, cap in zip(lam, listed, caps, strict=True))
        bounds[token] = (float(lower), float(upper))
    return bounds, float(lam @ caps)


def _floats(values: ArrayLike) -> Floats:
    array = np.asarray(values)
    return array if np.issubdtype(array.dtype, np.floating) and array.itemsize >= 4 else array.astype(np.float64)


def _log_sum_exp(values: Floats) -> Floats:
    """Over the first axis, [k, ...] to [...]; all -inf gives -inf."""
    top = values.max(axis=0)
    safe = np.where(np.isneginf(top), 0, top).astype(values.dtype)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe).sum(axis=0))
