"""Inward: LangChain's language models as language models of the core.

`CONVERTERS` is the list of what can be converted, tried in order; each looks at the object alone, imports its class
from nowhere, and returns None for what is not its kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from langchain_core.runnables import RunnableBinding

from rlm_plugins.errors import UsageError
from rlm_plugins.models import LanguageModel
from rlm_plugins.requests import Sampling

Converter = Callable[[Any], LanguageModel | None]

_WORKING = (
    "a language model of rlm_plugins (embedded_reader(), TransformersLM(...)), HuggingFacePipeline or ChatHuggingFace "
    "over a model in this process, and the chat models of langchain_rlm"
)


class FrozenLM:
    """Where a LangChain model becomes a language model of the core, which generates, streams and scores.

    Nothing is loaded or called for it, and the model that is given stays as it is.
    """

    @staticmethod
    def from_model(model: Any) -> LanguageModel:
        """A model of the core as it is, a LangChain model converted; `.bind(...)` becomes how the model samples.

        Raises `UsageError` for what cannot be converted, saying what can, and for retry and fallback wrappers.
        """
        if isinstance(model, LanguageModel):
            return model
        for converter in CONVERTERS:
            found = converter(model)
            if found is not None:
                return found
        raise UsageError(f"{_name(model)} cannot be used as a frozen language model. What works today: {_WORKING}")


# --- converters ------------------------------------------------------------------------------------------------------


def _from_our_own(model: Any) -> LanguageModel | None:
    """ChatReplug and its kin know what they are made of."""
    make: Any = getattr(model, "as_language_model", None)
    return None if make is None or isinstance(model, type) else make()


def _from_wrapper(model: Any) -> LanguageModel | None:
    """Retries and fallbacks would mix the answers of several models or attempts into one distribution: refused."""
    kinds = _kinds(model)
    for kind, advice in (
        ("RunnableRetry", "pass the model itself, and put .with_retry() around the ensemble"),
        ("RunnableWithFallbacks", "pass one model, and put .with_fallbacks([...]) around the ensemble"),
    ):
        if kind in kinds:
            raise UsageError(
                f"a {kind} cannot be a frozen language model, because what answers may change in the middle of an "
                f"answer: {advice}"
            )
    return None


def _from_binding(model: Any) -> LanguageModel | None:
    """`.bind(temperature=0)` and `.with_config(...)`: the model inside, sampling as the binding says."""
    if not isinstance(model, RunnableBinding):
        return None
    below = FrozenLM.from_model(model.bound)
    if not model.kwargs:
        return below
    sampling = _bound_sampling(model.kwargs, below.sampling)
    bound = copy.copy(below)
    bound.sampling = sampling
    return bound


def _from_hugging_face(model: Any) -> LanguageModel | None:
    """HuggingFacePipeline, and ChatHuggingFace over one: the model and the tokenizer in this process."""
    kinds = _kinds(model)
    if "ChatHuggingFace" in kinds:
        pipeline = model.llm
        if "HuggingFacePipeline" not in _kinds(pipeline):
            raise UsageError(
                f"ChatHuggingFace over {_name(pipeline)} calls a remote service; what works today: {_WORKING}"
            )
    elif "HuggingFacePipeline" in kinds:
        pipeline = model
    else:
        return None
    from rlm_plugins.backends.transformers_local import TransformersLM

    inner = pipeline.pipeline
    lm = TransformersLM(inner.model, tokenizer=inner.tokenizer)
    lm.sampling = _pipeline_sampling(getattr(pipeline, "pipeline_kwargs", None) or {}, lm.sampling)
    return lm


CONVERTERS: tuple[Converter, ...] = (_from_wrapper, _from_binding, _from_our_own, _from_hugging_face)
"""Tried in order; wrappers come first, because they lend out the attributes of what they wrap."""


# --- sampling --------------------------------------------------------------------------------------------------------

_SAMPLING_NAMES: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "stop": "stop",
    "stop_sequences": "stop",
    "seed": "seed",
}


def _bound_sampling(bound: Mapping[str, Any], sampling: Sampling) -> Sampling:
    unknown = sorted(bound.keys() - _SAMPLING_NAMES.keys())
    if unknown:
        raise UsageError(
            f"the model is bound to {', '.join(unknown)}, which a frozen language model does not take; it takes "
            f"{', '.join(_SAMPLING_NAMES)}: pass the model without that binding"
        )
    return replace(sampling, **_values(bound))


def _pipeline_sampling(kwargs: Mapping[str, Any], sampling: Sampling) -> Sampling:
    """A pipeline samples only when told to `do_sample`, whatever its temperature."""
    named = {name: value for name, value in kwargs.items() if name in _SAMPLING_NAMES}
    if not kwargs.get("do_sample"):
        named["temperature"] = 0.0
        named.pop("top_p", None)
    elif "temperature" not in named:
        named["temperature"] = 1.0
    return replace(sampling, **_values(named))


def _values(named: Mapping[str, Any]) -> dict[str, Any]:
    values = {_SAMPLING_NAMES[name]: value for name, value in named.items() if value is not None}
    if "stop" in values:
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return values


def _kinds(model: Any) -> set[str]:
    """The names of the object's classes: an import of each framework's class is not needed to know it."""
    return {kind.__name__ for kind in type(model).__mro__}


def _name(model: Any) -> str:
    if isinstance(model, str):
        return f"the string {model!r}"
    return f"an object of the class {type(model).__module__}.{type(model).__qualname__}"
