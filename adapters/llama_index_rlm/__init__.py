"""rlm-plugins as native parts of LlamaIndex."""

from __future__ import annotations

from rlm_plugins.errors import MissingExtra

try:
    import llama_index.core  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError as error:
    if error.name not in ("llama_index", "llama_index.core"):
        raise
    raise MissingExtra("llama_index_rlm", "llama-index-core", "llama-index") from error

from .embedding import RLMEmbedding
from .from_llama_index import LlamaIndexEmbedder, LlamaIndexRetriever, node_from_passage, passage_from_node
from .frozen_lm import FrozenLM, messages_from_chat
from .llm import ReplugLLM
from .synthesizer import ReplugSynthesizer

__all__ = [
    "FrozenLM",
    "LlamaIndexEmbedder",
    "LlamaIndexRetriever",
    "RLMEmbedding",
    "ReplugLLM",
    "ReplugSynthesizer",
    "messages_from_chat",
    "node_from_passage",
    "passage_from_node",
]
