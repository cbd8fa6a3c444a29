"""The embedded reader, a small language model that comes with the library, trained to answer from documents of made-up
worlds, and the embedded encoder, which finds those documents. They make the demo, the examples and the tests run
offline; they know nothing of the real world."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from ..backends.local import LocalModel
    from .static_encoder import StaticEncoder

WEIGHTS = Path(__file__).parent / "weights"


def embedded_reader(backend: Literal["auto", "numpy", "torch"] = "auto") -> LocalModel:
    """The embedded reader. `auto` runs it in torch where torch and transformers are installed, else in numpy: the same
    weights and, within 1e-4, the same log-probabilities.

    Raises `MissingExtra` for `torch` without them, `UsageError` where the weights are missing.
    """
    if backend not in ("auto", "numpy", "torch"):
        raise UsageError(f'backend must be "auto", "numpy" or "torch", got {backend!r}')
    if not (WEIGHTS / "model.safetensors").is_file():
        raise UsageError(
            f"the embedded reader's weights are not in {WEIGHTS}: install a released package, or train them with "
            "python tools/train_reader.py --out rlm_plugins/reader/weights"
        )
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if backend == "torch" and missing:
        raise MissingExtra('embedded_reader("torch")', missing[0], "local")
    if backend == "numpy" or missing:
        from ..backends.numpy_reader import NumpyLM

        return NumpyLM(WEIGHTS, name="embedded-reader")
    from transformers.utils import logging

    from ..backends.transformers_local import TransformersLM

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for four megabytes is noise in every example
    try:
        return TransformersLM(str(WEIGHTS), device="cpu", name="embedded-reader")
    finally:
        if shown:
            logging.enable_progress_bar()


def embedded_encoder() -> StaticEncoder:
    """The embedded encoder: mean token vectors, small enough to come with the library. It needs no torch.

    Raises `UsageError` where its files are missing.
    """
    from .static_encoder import StaticEncoder

    return StaticEncoder()


__all__ = ["embedded_encoder", "embedded_reader"]
