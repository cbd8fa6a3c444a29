"""rlm-plugins as native parts of LangChain."""

from __future__ import annotations

from rlm_plugins.errors import MissingExtra

try:
    import langchain_core  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError as error:
    if error.name != "langchain_core":
        raise
    raise MissingExtra("langchain_rlm", "langchain-core", "langchain") from error

from .embeddings import RLMEmbeddings
from .frozen_lm import FrozenLM
from .replug import ChatReplug
from .retriever import ReplugRetriever

__all__ = ["ChatReplug", "FrozenLM", "RLMEmbeddings", "ReplugRetriever"]
