"""REPLUG over an endpoint, the plain way: per token, k requests of one token with their top-n log-probs, mixed.

Only the listed tokens' probabilities are known, so the mixture is known within bounds. For token v

    lo(v) = sum_{d lists v} w_d p_d(v),    hi(v) = lo(v) + sum_{d does not} w_d b_d

with b_d the most an unlisted token of document d can have. The token with the largest lo is written; it is *certified*,
which means that the whole distributions would have chosen it too, when its lo is above every other hi. Nothing is
renormalised. Cost: k calls of one token per token; prompts grow by what was written, so a server with a prefix cache
pays for each prompt once. Differs from the paper in that it says which choices are certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...decoding import Decoded
from ...errors import Unsupported
from ...flows import Flow, T, ask_all
from ...mixtures import mixture_bounds, unlisted_bound
from ...requests import Advance, GenerateIds, OpenRows, Sampling
from ...texts import Generation, Usage
from ...tokens import TokenIds
from .mixture import Floats, TokenMixture

_ONE = Sampling(max_tokens=1)


@dataclass
class ListedRows:
    """The next-token distributions of k prompts as far as an endpoint lists them. `Rows`, for whoever decodes."""

    prompts: list[TokenIds]
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """[k, V'], -inf for what is not listed; V' reaches as far as the listed ids."""
    unlisted: Floats = field(default_factory=lambda: np.empty(0))
    """b_d [k]: the most an unlisted token can have."""
    usage: Usage = field(default_factory=Usage)

    @property
    def prompt_tokens(self) -> int:
        return self.usage.prompt_tokens

    @property
    def cached_prompt_tokens(self) -> int:
        return self.usage.cached_prompt_tokens

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


@dataclass
class ListedMixture(TokenMixture):
    """`TokenMixture` over `ListedRows`: the same, and whether each choice is certain."""

    rows: ListedRows = field(default_factory=lambda: ListedRows([]))

    def chosen(self, token_id: int, rows: Floats, mixed: Floats) -> None:
        listed = [{int(v): math.exp(row[v]) for v in np.flatnonzero(np.isfinite(row))} for row in rows]
        bounds, others = mixture_bounds(np.exp(self.log_weights), listed, self.rows.unlisted)
        lower = bounds[token_id][0]
        rival = max([upper for token, (_, upper) in bounds.items() if token != token_id] + [others])
        self.certified.append(lower > rival)
        self.ties += bool(lower > rival and math.log(lower) - math.log(max(rival, 1e-300)) <= self.tie_margin)
        known = np.where(np.isfinite(rows[:, token_id]), rows[:, token_id], np.log(self.rows.unlisted))
        filled = rows.copy()
        filled[:, token_id] = known  # the most it can have been, where a document did not list it
        super().chosen(token_id, filled, mixed)


def decode_listed(
    decoding: Flow[Decoded], mixer: ListedMixture, top: int, end_ids: frozenset[int], sampling: Sampling
) -> Flow[Decoded]:
    """Run `decode_rows` over an endpoint that lists `top` tokens. Usage is what the endpoint says.

    Raises `Unsupported` for sampling, posterior weights and the geometric pool, which need whole distributions.
    """
    for asked, name in (
        (sampling.temperature > 0, "sampling from a mixture"),
        (mixer.posterior, "posterior=True"),
        (mixer.pool == "geometric", 'pool="geometric"'),
    ):
        if asked:
            raise Unsupported(name, "full_distribution", found=False, remedy="use a model in this process")
    decoded = yield from listed_rows(decoding, mixer.rows, top, end_ids)
    written = replace(mixer.rows.usage, completion_tokens=decoded.usage.completion_tokens)
    return replace(decoded, usage=written)


def listed_rows(flow: Flow[T], rows: ListedRows, top: int, end_ids: frozenset[int]) -> Flow[T]:
    """Run a flow that asks for rows (`OpenRows`, `Advance`) on a model that answers `GenerateIds`."""
    batch = next(flow)
    while True:
        replies = None
        match batch:
            case [OpenRows(prompts)]:
                rows.prompts = list(prompts)
                yield from _ask_rows(rows, top, end_ids)
                replies = [rows]
            case [Advance(_, token_id)]:
                rows.prompts = [(*prompt, token_id) for prompt in rows.prompts]
                yield from _ask_rows(rows, top, end_ids)
                replies = [rows.logprobs]
            case _:
                replies = yield batch
        try:
            batch = flow.send(replies)
        except StopIteration as stop:
            return stop.value


def _ask_rows(rows: ListedRows, top: int, end_ids: frozenset[int]) -> Flow[None]:
    answers = yield from ask_all([GenerateIds(prompt, _ONE, top) for prompt in rows.prompts])
    found = [_listed(answer, top, end_ids) for answer in answers]
    width = 1 + max(max(listed) for listed, _ in found)
    rows.logprobs = np.full((len(found), max(2, width)), -np.inf, np.float32)
    for row, (listed, _) in zip(rows.logprobs, found, strict=True):
        row[list(listed)] = list(listed.values())
    rows.unlisted = np.array([max(bound, 1e-9) for _, bound in found])
    for answer in answers:
        rows.usage = rows.usage + answer.usage


def _listed(answer: Generation, top: int, end_ids: frozenset[int]) -> tuple[dict[int, float], float]:
    """Token ids with log-probabilities, and the most an unlisted one can have (1: nothing is certain)."""
    if not answer.tokens:
        if answer.finish_reason == "stop" and end_ids:  # this document's choice is to end, by how much is not said
            return {min(end_ids): 0.0}, 1.0
        raise _no_ids()
    token = answer.tokens[0]
    if not token.top_ids:
        raise _no_ids()
    listed = {one: value for one, (_, value) in zip(token.top_ids, token.top, strict=True)}
    if any(math.isinf(value) for value in listed.values()):
        return {one: value for one, value in listed.items() if math.isfinite(value)}, 1.0
    whole = len(listed) >= top
    return listed, unlisted_bound([math.exp(value) for value in listed.values()], ordered=whole)


def _no_ids() -> Unsupported:
    return Unsupported(
        "mixing token by token over an endpoint",
        "token ids of the alternatives",
        found=None,
        remedy="use a server that names tokens by id (vLLM) together with tokenizer=",
    )
