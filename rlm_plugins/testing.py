"""For tests, yours and ours: a model that says what it is told to, with exact log-probs, and a ban on requests.

>>> lm = ScriptedModel({"Velgar": "Bora Tinel"}, confidence=0.9)
>>> lm.generate("Who founded Velgar?").text
'Bora Tinel'
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from .backends.local import LocalModel
from .texts import Message
from .tokens import TokenIds

BOS, END = 256, 257
VOCABULARY = 258


class ByteTokenizer:
    """One token a byte, BOS 256, end 257. A conversation is written `role: content`, one turn a line."""

    bos_id: int | None = BOS
    end_ids = frozenset({END})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BOS).decode("utf-8", errors="replace")

    def encode_chat(self, messages: Sequence[Message]) -> list[int] | None:
        turns = "".join(f"{message.role}: {message.content}\n" for message in messages)
        return [BOS, *self.encode(turns + "assistant:")]


class ScriptedModel(LocalModel):
    """A local model over bytes whose answer is a function of the prompt.

    `answers` maps a prompt to its answer, or a piece of text to the answer of every prompt that contains it (the first
    that fits; otherwise the answer is empty). The scripted next byte has probability `confidence`; the rest is spread
    over all others, unevenly but always in the same way. `computed` counts the prompts.
    """

    def __init__(
        self,
        answers: Mapping[str, str] | Callable[[str], str],
        *,
        confidence: float = 0.9,
        context_window: int | None = 8192,
    ) -> None:
        self.runner = _ScriptRunner(_rule(answers), confidence)
        super().__init__(
            self.runner,
            name="scripted",
            tokenizer=ByteTokenizer(),
            context_window=context_window,
            repeatability=0.0,
        )

    @property
    def computed(self) -> int:
        return self.runner.computed


def _rule(answers: Mapping[str, str] | Callable[[str], str]) -> Callable[[str], str]:
    if callable(answers):
        return answers
    return lambda prompt: next((answer for piece, answer in answers.items() if piece in prompt), "")


class _ScriptRows:
    def __init__(self, runner: _ScriptRunner, prompts: tuple[TokenIds, ...]) -> None:
        self.scripts = [runner.script(prompt) for prompt in prompts]
        self.prompt_tokens = sum(map(len, prompts))
        self.cached_prompt_tokens = 0
        self.written: list[int] = []
        self._runner = runner
        self.closed = False

    @property
    def logprobs(self) -> NDArray[np.float32]:
        return np.stack([self._runner.distribution(script, self.written) for script in self.scripts])

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.close()


class _ScriptRunner:
    def __init__(self, rule: Callable[[str], str], confidence: float) -> None:
        self._rule = rule
        self._confidence = confidence
        self.computed = 0
        self.opened: list[_ScriptRows] = []

    def script(self, prompt: TokenIds) -> list[int]:
        text = ByteTokenizer().decode(prompt)
        return [*(" " + self._rule(text)).encode(), END]

    def distribution(self, script: list[int], written: list[int]) -> NDArray[np.float32]:
        seed = hashlib.sha256(repr((script, written)).encode()).digest()
        spread = np.random.default_rng(int.from_bytes(seed[:8], "little")).dirichlet(np.full(VOCABULARY, 0.3))
        spread[BOS] = 0.0
        probabilities = spread / spread.sum()
        if script[: len(written)] == written and len(written) < len(script):
            probabilities = probabilities * (1 - self._confidence)
            probabilities[script[len(written)]] += self._confidence
        with np.errstate(divide="ignore"):
            return np.log(probabilities).astype(np.float32)

    def open_rows(self, prompts: tuple[TokenIds, ...]) -> _ScriptRows:
        self.computed += len(prompts)
        self.opened.append(_ScriptRows(self, prompts))
        return self.opened[-1]

    def advance(self, rows: _ScriptRows, token_id: int) -> NDArray[np.float32]:
        rows.written.append(token_id)
        return rows.logprobs

    def score_rows(
        self, prompts: tuple[TokenIds, ...], continuations: tuple[TokenIds, ...]
    ) -> list[NDArray[np.float32]]:
        self.computed += len(prompts)
        found: list[NDArray[np.float32]] = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            script = self.script(prompt)
            scores = [self.distribution(script, list(continuation[:n]))[token] for n, token in enumerate(continuation)]
            found.append(np.asarray(scores, dtype=np.float32))
        return found


class RandomModel(LocalModel):
    """A local model over bytes whose next-token distribution is a fixed random function of everything before it.

    However a text is split into prompt and continuation, it has one probability; every other text has another. So what
    is shifted by one, cut or rendered differently shows. `follows` maps a text to what comes after it, with
    probability `confidence` a byte; elsewhere the model writes letters.
    """

    def __init__(
        self,
        follows: Mapping[str, str] | None = None,
        *,
        confidence: float = 0.9,
        seed: int = 0,
        context_window: int | None = 8192,
    ) -> None:
        super().__init__(
            _RandomRunner({key.encode(): value.encode() for key, value in (follows or {}).items()}, confidence, seed),
            name="random",
            tokenizer=ByteTokenizer(),
            context_window=context_window,
            repeatability=0.0,
        )


class _RandomRows:
    def __init__(self, runner: _RandomRunner, prompts: tuple[TokenIds, ...]) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.cached_prompt_tokens = 0
        self.texts = [list(prompt) for prompt in prompts]
        self._runner = runner

    @property
    def logprobs(self) -> NDArray[np.float32]:
        return np.stack([self._runner.distribution(text) for text in self.texts])

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


class _RandomRunner:
    def __init__(self, follows: Mapping[bytes, bytes], confidence: float, seed: int) -> None:
        self._follows = follows
        self._confidence = confidence
        self._seed = seed
        self._likely = np.full(VOCABULARY, -10.0)
        self._likely[[*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJ .,"]] = 0.0
        self._likely[END] = -1.0
        self._likely[BOS] = -np.inf

    def distribution(self, ids: Sequence[int]) -> NDArray[np.float32]:
        seed = hashlib.sha256(repr((self._seed, list(ids))).encode()).digest()
        values = 2.5 * np.random.default_rng(int.from_bytes(seed[:8], "little")).normal(size=VOCABULARY) + self._likely
        probabilities = np.exp(values - values.max())
        probabilities /= probabilities.sum()
        expected = self._next(bytes(i for i in ids if i < BOS))
        if expected is not None:
            probabilities *= 1 - self._confidence
            probabilities[expected] += self._confidence
        with np.errstate(divide="ignore"):
            return np.log(probabilities).astype(np.float32)

    def _next(self, text: bytes) -> int | None:
        for key, value in self._follows.items():
            at = text.rfind(key)
            written = text[at + len(key) :]
            if at >= 0 and value.startswith(written):
                return value[len(written)] if len(written) < len(value) else END
        return None

    def open_rows(self, prompts: tuple[TokenIds, ...]) -> _RandomRows:
        return _RandomRows(self, prompts)

    def advance(self, rows: _RandomRows, token_id: int) -> NDArray[np.float32]:
        for text in rows.texts:
            text.append(token_id)
        return rows.logprobs

    def score_rows(
        self, prompts: tuple[TokenIds, ...], continuations: tuple[TokenIds, ...]
    ) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            scores = [self.distribution([*prompt, *continuation[:n]])[token] for n, token in enumerate(continuation)]
            found.append(np.asarray(scores, dtype=np.float32))
        return found


@contextmanager
def forbid_requests() -> Generator[None]:
    """No connection leaves this process inside: an attempt raises `AssertionError` naming the address."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address!r} was attempted where requests are forbidden")

    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        socket.socket.connect, socket.socket.connect_ex = connect, connect_ex  # type: ignore[method-assign]
