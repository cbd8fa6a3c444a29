"""REPLUG's token mixture: k prompts, one per document, written on with one common text.

    p(y_t | x, D', y_<t) = sum_{d in D'} lambda(d, x) p(y_t | d o x, y_<t)    (Shi et al. 2023, eq. 2)

Probabilities are mixed, not logits: the average of logits, which public implementations compute, is a product of
experts and has its own name here, `pool="geometric"`. Greedy decoding takes the argmax of the mixture at temperature 1;
at T > 0 each document's distribution is tempered, then mixed, then cut by top-p. With `posterior` the weights follow
lambda_d p_d(y_<t), so that the conditionals chain to RAG-Sequence's sequence-level mixture (Lewis et al. 2020).
Cost: k prompts processed, and k rows a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...mixtures import (
    geometric_mixture,
    leave_one_out_choices,
    mixture,
    poisoning_radius,
    posterior_log_weights,
    responsibilities,
)

Floats = NDArray[np.floating[Any]]
Pool = Literal["probability", "geometric"]


@dataclass
class TokenMixture:
    """The `Mixer` of an ensemble, and what it saw while mixing.

    `log_weights` [k] are the prior weights. `replaceable` [k] says which rows hold a document that an adversary could
    replace (not the null document). `greedy` and `explain` say what is worth computing.
    """

    log_weights: Floats
    replaceable: NDArray[np.bool_]
    pool: Pool = "probability"
    posterior: bool = False
    greedy: bool = True
    explain: bool = False
    tie_margin: float = 0.0
    """Two tokens nearer than this (nats) are a tie."""

    ties: int = field(default=0, init=False)
    radius: int | None = field(default=None, init=False)
    row_logprobs: list[Floats] = field(default_factory=list[Floats], init=False)
    """log p_d of each chosen token, [k] per token, the end token included."""
    decided: list[Floats] = field(default_factory=list[Floats], init=False)
    """Responsibilities [k] per token."""
    missed: list[list[int]] = field(default_factory=list[list[int]], init=False)
    """Per token, the documents without which the greedy choice would have been another one (only with `explain`)."""

    certified: list[bool] = field(default_factory=list[bool], init=False)
    """Per token, whether the whole distributions would have chosen it; filled by those that do not see them whole."""

    def __post_init__(self) -> None:
        self._current = self.log_weights

    def mix(self, rows: Floats) -> Floats:
        if self.pool == "geometric":
            return geometric_mixture(self._current, rows)
        return mixture(self._current, rows)

    def chosen(self, token_id: int, rows: Floats, mixed: Floats) -> None:
        token = rows[:, token_id].astype(np.float64)
        self.row_logprobs.append(token)
        self.decided.append(responsibilities(self._current, token))
        if self.greedy:
            second, first = np.partition(mixed, -2)[-2:]
            self.ties += bool(first - second <= self.tie_margin)
            if self.explain:
                without = leave_one_out_choices(self._current, rows)
                self.missed.append([d for d, other in enumerate(without) if len(without) > 1 and other != token_id])
            if self.pool == "probability" and not self.posterior:
                radius = poisoning_radius(self.log_weights, rows, token_id, replaceable=self.replaceable, mixed=mixed)
                self.radius = max(radius, 0) if self.radius is None else min(self.radius, max(radius, 0))
        if self.posterior:
            self._current = posterior_log_weights(self._current, token)

    @property
    def posterior_weights(self) -> Floats:
        """Weights [k] after the whole text: lambda_d prod_t p_d(y_t), normalised."""
        total = np.sum(self.row_logprobs, axis=0) if self.row_logprobs else np.zeros(len(self.log_weights))
        return np.exp(posterior_log_weights(self.log_weights, total))


def mixture_logprobs(log_weights: Floats, row_logprobs: Floats, *, posterior: bool) -> Floats:
    """log p of each token of a given text under the ensemble: [k, n] to [n]. Sums to the text's log-probability.

    `posterior=False`: RAG-Token's likelihood, prod_t sum_d. True: RAG-Sequence's, sum_d prod_t, token by token.
    """
    current = log_weights
    found: list[float] = []
    for token in row_logprobs.astype(np.float64).T:
        found.append(float(np.logaddexp.reduce(current + token)))
        if posterior:
            current = posterior_log_weights(current, token)
    return np.asarray(found)
