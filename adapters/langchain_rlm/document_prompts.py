"""A LangChain document prompt as a template of the core."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from langchain_core.prompts import PromptTemplate as LangChainPrompt

from rlm_plugins.errors import UsageError
from rlm_plugins.prompts import PromptTemplate
from rlm_plugins.texts import Passage

_TEXT = "\x00page_content\x00"


@dataclass(frozen=True)
class DocumentPrompt(PromptTemplate):
    """A template whose documents are written by a LangChain prompt: `page_content` is the text, all other variables
    are metadata. A prompt that does not end in a new line is given one, for the question stands below it."""

    prompt: LangChainPrompt | None = None

    def around_text(self, passage: Passage) -> tuple[str, str]:
        assert self.prompt is not None
        wanted = [name for name in self.prompt.input_variables if name != "page_content"]
        missing = [name for name in wanted if name not in passage.metadata]
        if missing:
            raise UsageError(
                f"document_prompt wants the metadata {', '.join(missing)}, but passage "
                f"{passage.id or passage.text[:40]!r} has {', '.join(passage.metadata) or 'none'}"
            )
        values = {name: passage.metadata[name] for name in wanted}
        before, after = self.prompt.format(**values, page_content=_TEXT).split(_TEXT)
        return before, after if (before + _TEXT + after).endswith("\n") else after + "\n"


def template_from(prompt: Any, base: PromptTemplate) -> PromptTemplate:
    """A template of the core as it is, or LangChain's document prompt in the words that `base` has for the rest.

    Raises `UsageError` for another object, and for a prompt that does not hold `page_content` exactly once.
    """
    if isinstance(prompt, PromptTemplate):
        return prompt
    if not isinstance(prompt, LangChainPrompt):
        raise UsageError(
            "document_prompt must be a PromptTemplate of rlm_plugins or a LangChain PromptTemplate with "
            f"{{page_content}}, got {type(prompt).__name__}"
        )
    names = dict.fromkeys(prompt.input_variables, "")
    held = prompt.format(**names | {"page_content": _TEXT}).count(_TEXT) if "page_content" in names else 0
    if held != 1:
        raise UsageError(f"document_prompt must hold {{page_content}} exactly once, got {prompt.template!r}")
    words: dict[str, Any] = {one.name: getattr(base, one.name) for one in fields(PromptTemplate)}
    words["name"] = "langchain_document_prompt"
    return DocumentPrompt(**words, prompt=prompt)
