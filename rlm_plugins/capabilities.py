"""What a model can do, and which way of running a method that makes possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .errors import Unsupported


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model gives. Methods choose their way by this alone (`choose_strategy`)."""

    output_logprobs: bool = False
    """Log-probabilities of the tokens it writes."""
    top_logprobs: int = 0
    """How many alternatives per token, at most."""
    prompt_logprobs: bool = False
    """Log-probabilities of a given text (echo or prompt log-probs), aligned."""
    continuation: str | None = None
    """The strategy by which it continues a partial answer; None where it cannot."""
    batched_prompts: bool = False
    token_ids: bool = False
    """Prompts may be token ids."""
    logit_bias: Literal["raw", "biased"] | None = None
    """Whether returned log-probs ignore the bias (`raw`) or include it; None where there is no bias."""
    full_distribution: bool = False
    """The whole next-token distribution, row by row (a model in this process)."""
    repeatability: float = 0.0
    """The largest difference between the log-probs of two identical calls, nats. Closer choices are ties."""
    token_entries: bool = True
    """Whether each token written has an entry of its own in the log-probs (some servers lose parts of characters)."""
    notes: tuple[str, ...] = ()
    """What a probe found that a user should know, in words."""


Method = Literal["native", "naive", "draft_verify", "certificate", "latent", "answer"]

_STRATEGIES: tuple[tuple[Method, str, Callable[[Capabilities], bool]], ...] = (
    ("native", "token", lambda can: can.full_distribution),
    ("naive", "token", lambda can: can.token_ids and can.top_logprobs > 0),
)
"""(way, ensemble, whether the model can) in order of preference: the one table that decides how an ensemble is run."""


def choose_strategy(capabilities: Capabilities, ensemble: Literal["auto", "token", "answer"]) -> Method:
    """How to run a REPLUG ensemble on a model with these capabilities. Raises `Unsupported` where there is no way."""
    for method, kind, possible in _STRATEGIES:
        if ensemble in ("auto", kind) and possible(capabilities):
            return method
    raise Unsupported(
        f"REPLUG with ensemble={ensemble!r}",
        "full_distribution",
        found=capabilities.full_distribution,
        remedy="use a model in this process: embedded_reader(), TransformersLM(...), or one wrapped by FrozenLM; or a "
        "completions endpoint that takes token ids and gives top log-probs, with tokenizer=",
    )
