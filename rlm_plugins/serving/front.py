"""What all that stands in front of a model shares: it looks like the model, and passes on what it has nothing to do
with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..capabilities import Capabilities
from ..flows import Batch
from ..models import LanguageModel


class Front(LanguageModel):
    """A model in front of `lm`, alike in name, template, tokenizer, window, sampling and capabilities."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.name = lm.name
        self.template = lm.template
        self.tokenizer = lm.tokenizer
        self.context_window = lm.context_window
        self.sampling = lm.sampling

    @property
    def capabilities(self) -> Capabilities:
        return self.lm.capabilities

    def answer(self, batch: Batch) -> Sequence[Any]:
        return self.lm.answer(batch)

    async def aanswer(self, batch: Batch) -> Sequence[Any]:
        return await self.lm.aanswer(batch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lm!r})"
