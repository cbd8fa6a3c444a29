"""The embedded encoder: a text's vector is the mean of its tokens' vectors, made a unit vector. No torch.

The folder is one of sentence-transformers (`StaticEmbedding`, then `Normalize`): `SentenceTransformer(folder)` gives
the same vectors, and tuning it there gives a folder that this class reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ..errors import UsageError
from ..models import Embedder

ENCODER = Path(__file__).parent / "encoder"


class StaticEncoder(Embedder):
    """Queries and documents through one matrix of token vectors; float32, unit norm (a text without tokens: zeros).

    Raises `UsageError` where the folder holds no static embedding.

    >>> encoder = StaticEncoder()
    >>> query, documents = encoder.embed_query("Who founded Velgar?"), ["Bora Tinel founded Velgar.", "It rains."]
    >>> (encoder.embed_documents(documents) @ query).argmax()
    np.int64(0)
    """

    def __init__(self, folder: str | Path = ENCODER) -> None:
        folder = _module_folder(Path(folder))
        weights = load_file(folder / "model.safetensors")
        if "embedding.weight" not in weights:
            raise UsageError(f"{folder} holds {sorted(weights)}, not the 'embedding.weight' of a static embedding")
        digest = hashlib.sha256()
        for file in ("model.safetensors", "tokenizer.json"):
            digest.update((folder / file).read_bytes())
        self._fingerprint = digest.hexdigest()
        self._vectors: NDArray[np.float32] = weights["embedding.weight"].astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def dimension(self) -> int:
        return self._vectors.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and tokenizer."""
        return self._fingerprint

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if encoding.ids:
                mean = self._vectors[encoding.ids].mean(axis=0)
                vectors[row] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return vectors


def _module_folder(folder: Path) -> Path:
    """Where the static embedding of a sentence-transformers folder lies: in itself or in its first module."""
    for candidate in (folder, *sorted(folder.glob("0_*"))):
        if (candidate / "model.safetensors").is_file() and (candidate / "tokenizer.json").is_file():
            return candidate
    raise UsageError(f"{folder} is not a folder of sentence-transformers with a static embedding")


__all__ = ["ENCODER", "StaticEncoder"]
