"""A dense retriever as files.

    manifest.json                 version, metric, count, dimension, the embedder's fingerprint, sha256 of the others
    passages-<sha256>.jsonl       one passage a line: id, text, title, metadata
    index-<sha256>.faiss          the faiss index; absent where there are no passages

The data files are named by their content and the manifest is put in place last, in one step: whoever opens the folder,
also after a crash, finds the old retriever or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError
from ..texts import Passage

VERSION = 1
_MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    metric: Literal["cosine", "inner_product"]
    count: int = Field(ge=0)
    dimension: int = Field(ge=0)
    fingerprint: str
    passages_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    index_sha256: str | None = Field(pattern="^[0-9a-f]{64}$")

    def files(self) -> list[str]:
        index = [] if self.index_sha256 is None else [f"index-{self.index_sha256[:16]}.faiss"]
        return [f"passages-{self.passages_sha256[:16]}.jsonl", *index]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    text: str
    title: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a folder holds."""

    index: Any
    passages: tuple[Passage, ...]
    metric: Literal["cosine", "inner_product"]


def save(
    folder: Path,
    index: Any,
    passages: Sequence[Passage],
    *,
    metric: Literal["cosine", "inner_product"],
    fingerprint: str,
) -> None:
    """Write a retriever. Raises `UsageError` for metadata that is not JSON, and a folder that cannot be written."""
    lines = "".join(_line(passage) for passage in passages).encode()
    vectors = _to_bytes(index) if passages else None
    manifest = _Manifest(
        version=VERSION,
        metric=metric,
        count=len(passages),
        dimension=int(index.d) if passages else 0,
        fingerprint=fingerprint,
        passages_sha256=_sha256(lines),
        index_sha256=None if vectors is None else _sha256(vectors),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _files_in_use(folder)
        for name, data in zip(manifest.files(), (lines, vectors), strict=False):
            _put(folder / name, data or b"")
        _put(folder / _MANIFEST, manifest.model_dump_json(indent=1).encode())
        for name in set(before) - set(manifest.files()):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot save the retriever to {folder}: {error}") from error


def load(folder: Path, fingerprint: str, *, trust_index: bool) -> Saved:
    """Read a retriever. Raises `UsageError`: see `DenseRetriever.load`."""
    manifest = _manifest(folder)
    if manifest.fingerprint != fingerprint:
        raise UsageError(
            f"{folder} was made with the embedder {manifest.fingerprint!r}, got {fingerprint!r}: vectors of different "
            "embedders cannot be compared; load it with the first, or build it anew with DenseRetriever.from_passages"
        )
    digests = (manifest.passages_sha256, manifest.index_sha256)
    files = [_get(folder / name, str(sha)) for name, sha in zip(manifest.files(), digests, strict=False)]
    passages = _passages(folder / manifest.files()[0], files[0])
    if len(passages) != manifest.count:
        raise _damaged(folder, f"it has {len(passages)} passages, the manifest says {manifest.count}")
    if len({passage.id for passage in passages}) != len(passages):
        raise _damaged(folder, "two of its passages have the same id")
    if (manifest.index_sha256 is None) != (not passages):
        raise _damaged(folder, "passages without an index, or an index without passages")
    index = _from_bytes(folder, files[1], manifest, trust_index=trust_index) if passages else None
    return Saved(index, passages, manifest.metric)


# --- passages and manifest -------------------------------------------------------------------------------------------


def _line(passage: Passage) -> str:
    row = {"id": passage.id, "text": passage.text, "title": passage.title, "metadata": dict(passage.metadata)}
    try:
        return json.dumps(row) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the metadata of the passage {passage.id!r} cannot be saved as JSON ({error}): "
            "keep to strings, numbers, booleans, None, lists and dictionaries"
        ) from error


def _passages(path: Path, data: bytes) -> tuple[Passage, ...]:
    passages: list[Passage] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = _Row.model_validate(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"line {number} is not a passage: {_first(error)}") from error
        passages.append(Passage(row.text, id=row.id, title=row.title, metadata=row.metadata))
    return tuple(passages)


def _manifest(folder: Path) -> _Manifest:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no saved retriever (there is no {_MANIFEST}): pass a folder that DenseRetriever.save wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it cannot be read: {_first(error)}") from error
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found != VERSION:
        raise UsageError(
            f"{folder} was saved in the format of version {found}, this library reads {VERSION}: "
            "use the library that wrote it, or build it anew with DenseRetriever.from_passages"
        )
    try:
        return _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise _damaged(path, f"it is not the manifest of a retriever: {_first(error)}") from error


def _files_in_use(folder: Path) -> list[str]:
    """What the retriever saved here before consists of; nothing where there is none that could be read."""
    try:
        return _manifest(folder).files()
    except UsageError:
        return []


# --- the index -------------------------------------------------------------------------------------------------------

_FLAT_HEADER = struct.Struct("<4siqqqBiQ")  # kind, dimension, count, two unused, trained, metric, number of floats


def _to_bytes(index: Any) -> bytes:
    faiss: Any = importlib.import_module("faiss")
    return faiss.serialize_index(index).tobytes()


def _from_bytes(folder: Path, data: bytes, manifest: _Manifest, *, trust_index: bool) -> Any:
    faiss: Any = importlib.import_module("faiss")
    exact = data[:4] == b"IxFI"
    if exact:
        _check_flat(folder, data, manifest)
    elif not trust_index:
        raise UsageError(
            f"{folder} holds a faiss index that is not the exact one, and that only faiss can read: "
            "pass trust_index=True if the folder is your own, or comes from someone you trust"
        )
    try:
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except Exception as error:
        raise _damaged(folder, f"faiss cannot read its index: {_first(error)}") from error
    sizes = (index.ntotal, index.d, index.metric_type)
    if sizes != (manifest.count, manifest.dimension, faiss.METRIC_INNER_PRODUCT):
        raise _damaged(
            folder,
            f"its index holds {index.ntotal} vectors of {index.d} dimensions (metric {index.metric_type}), "
            f"the manifest says {manifest.count} of {manifest.dimension} for inner products",
        )
    return index


def _check_flat(folder: Path, data: bytes, manifest: _Manifest) -> None:
    """The exact index is a header and float32 vectors [count, dimension]: every byte is accounted for."""
    floats = manifest.count * manifest.dimension
    if not floats or len(data) != _FLAT_HEADER.size + 4 * floats:
        raise _damaged(folder, f"its index has {len(data)} bytes, not those of {manifest.count} vectors")
    _, dimension, count, _, _, trained, metric, size = _FLAT_HEADER.unpack_from(data)
    if (dimension, count, trained, metric, size) != (manifest.dimension, manifest.count, 1, 0, floats):
        raise _damaged(folder, "the header of its index does not agree with the manifest")
    if not np.isfinite(np.frombuffer(data, dtype="<f4", offset=_FLAT_HEADER.size)).all():
        raise _damaged(folder, "its index holds NaN or infinity")


# --- files -----------------------------------------------------------------------------------------------------------


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _put(path: Path, data: bytes) -> None:
    """Write a file in one step: it is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _get(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error}") from error
    if _sha256(data) != sha256:
        raise _damaged(path, "its content is not what was saved (sha256)")
    return data


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} is damaged: {what}; restore it, or build it anew with DenseRetriever.from_passages")


def _first(error: Exception) -> str:
    lines = str(error).splitlines()
    return " ".join(line.strip() for line in lines[:3]) or type(error).__name__
