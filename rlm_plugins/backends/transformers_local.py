"""Any Hugging Face causal language model in this process.

    lm = TransformersLM("Qwen/Qwen2.5-0.5B-Instruct")       # or a folder, or a model and its tokenizer
    lm.generate("Who founded Velgar?", documents=[...])

Importing this module loads no torch; constructing a `TransformersLM` does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

from ..errors import MissingExtra, UsageError
from ..prompts import QUESTION_ANSWER, PromptTemplate
from ..texts import Message
from ..tokens import Tokenizer
from .chats import encode_conversation
from .local import LocalModel

_REPEATABILITY = {"torch.float32": 1e-5, "torch.float64": 1e-5, "torch.float16": 0.02}
"""How far rounding can move a log-probability (nats) when the shape of a batch changes; 0.15 for bfloat16 and less."""


class TransformersLM(LocalModel):
    """A causal language model from the hub, from a folder, or already loaded (then pass its tokenizer).

    `device=None` is the first accelerator there is, else the CPU. `dtype=None` is the checkpoint's own, but float32 for
    float16 on a CPU, which computes halves slowly. A model that is passed in stays where it is, and is put into
    evaluation mode. `context_window=None` is what the model's configuration says.

    Prompts share what they begin with: a document seen before is not computed again while the stored beginnings fit in
    `prefix_cache_bytes` (0 stores none). `max_batch_tokens` bounds one forward pass over prompts.

    Raises `MissingExtra` without torch and transformers, `UsageError` for a model that cannot be loaded, has an encoder
    or no language-model head, and for a missing tokenizer.
    """

    def __init__(
        self,
        model_or_path: Any,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: Any = None,
        name: str | None = None,
        template: PromptTemplate = QUESTION_ANSWER,
        context_window: int | None = None,
        prefix_cache_bytes: int = 512 << 20,
        max_batch_tokens: int = 16384,
    ) -> None:
        for package in ("torch", "transformers"):
            if find_spec(package) is None:
                raise MissingExtra("TransformersLM", package, "local")
        loaded = not hasattr(model_or_path, "forward")
        if loaded:
            tokenizer = str(model_or_path) if tokenizer is None else tokenizer
            self.model = _load_model(str(model_or_path), device, dtype)
        elif device is not None or dtype is not None:
            raise UsageError("device and dtype are for models loaded by path: move this model yourself, model.to(...)")
        else:
            self.model = _checked(model_or_path)
        if tokenizer is None:
            raise UsageError("a model that is already loaded needs its tokenizer: TransformersLM(model, tokenizer=...)")
        self.model.eval()
        self.hf_tokenizer: Any = _load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        from .torch_rows import TorchRows

        self._rows = TorchRows(self.model, prefix_cache_bytes=prefix_cache_bytes, max_batch_tokens=max_batch_tokens)
        config = self.model.config.get_text_config(decoder=True)
        super().__init__(
            self._rows,
            name=name or (str(model_or_path) if loaded else self.model.config.name_or_path) or "local-model",
            tokenizer=(
                cast(Tokenizer, self.hf_tokenizer)
                if hasattr(self.hf_tokenizer, "encode_chat")
                else TransformersTokenizer(self.hf_tokenizer, end_ids=_end_ids(self.model))
            ),
            context_window=context_window or getattr(config, "max_position_embeddings", None),
            repeatability=_REPEATABILITY.get(str(self.model.dtype), 0.15),
            template=template,
        )

    def clear_prefix_cache(self) -> None:
        """Give up the stored beginnings of prompts, and their memory."""
        self._rows.prefixes.clear()


class TransformersTokenizer:
    """A Hugging Face tokenizer, fast or slow, as a `Tokenizer`.

    `bos_id` is the token that the tokenizer itself puts in front of a text; None where it puts none, whatever
    `bos_token` says: a GPT-2 prompt has no BOS, here as elsewhere.
    """

    def __init__(self, hf_tokenizer: Any, *, end_ids: Sequence[int] = ()) -> None:
        self._hf = hf_tokenizer
        self._lock = (
            threading.Lock()
        )  # a fast tokenizer is switched between plain text and control tokens: not while it is read
        first = self._ids("", add_special_tokens=True)[:1]
        self._bos_id = first[0] if first and first[0] == hf_tokenizer.bos_token_id else None
        own = hf_tokenizer.eos_token_id
        self._end_ids = frozenset((*end_ids, *(() if own is None else (own,))))
        added = hf_tokenizer.added_tokens_decoder.values()
        self._specials = {*hf_tokenizer.all_special_tokens, *(token.content for token in added if token.special)}

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def end_ids(self) -> frozenset[int]:
        return self._end_ids

    def encode(self, text: str) -> list[int]:
        return self._ids(text, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return self._hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        """Raises `UsageError` where the template refuses the conversation (an unknown role, turns out of order)."""
        if self._hf.chat_template is None:
            return None
        return encode_conversation(
            messages, self._specials, render=self._render, encode_template=self._ids, encode_text=self.encode
        )

    def _render(self, turns: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UsageError(f"the tokenizer's chat template refuses this conversation: {error}") from error

    def _ids(self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        with self._lock:
            return self._hf(
                text, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens, verbose=False
            )["input_ids"]


def _end_ids(model: Any) -> tuple[int, ...]:
    """What ends a text, by the model's generation settings or else its configuration: one id, a list, or nothing."""
    generation: Any = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _load_model(path: str, device: str | None, dtype: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        config = cast(Any, AutoConfig.from_pretrained(path))
        _refuse_encoder(config, path)
        if dtype is None:
            halves = str(config.dtype).removeprefix("torch.") == "float16"
            dtype = torch.float32 if halves and device == "cpu" else "auto"
        model = cast(Any, AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype))
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"no causal language model could be loaded from {path!r}; expected a folder with config.json and weights, "
            f"or the name of one on the hub. transformers says: {error}"
        ) from error
    return _checked(model.to(device))


def _checked(model: Any) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UsageError(f"expected a transformers model or the path of one, got {type(model).__name__}")
    _refuse_encoder(config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise UsageError(
            f"{type(model).__name__} has no language-model head, so it gives no probabilities: load it with "
            "AutoModelForCausalLM"
        )
    return model


def _refuse_encoder(config: Any, name: str) -> None:
    if config.is_encoder_decoder:
        raise UsageError(
            f"{name} is an encoder-decoder model ({config.model_type}); documents and their continuation must be one "
            "text, so a causal (decoder-only) model is needed"
        )


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer could be loaded from {path!r}: pass tokenizer=, a folder, a hub name or a tokenizer. "
            f"transformers says: {error}"
        ) from error


__all__ = ["TransformersLM", "TransformersTokenizer"]
