"""rlm-plugins as native parts of LlamaIndex."""

from __future__ import annotations

from rlm_plugins.errors import MissingExtra

try:
    import llama_index.core  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError as error:
    if error.name not in ("llama_index", "llama_index.core"):
        raise
    raise MissingExtra("llama_index_rlm", "llama-index-core", "llama-index") from error
