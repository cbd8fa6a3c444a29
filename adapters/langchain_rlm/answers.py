"""Outward: one question to an ensemble, and its answer in LangChain's shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.texts import Chunk, Generation, TokenLogprob, Usage


@dataclass(frozen=True)
class Question:
    """One call, ready to be asked, and its answer in LangChain's shapes."""

    ensemble: Replug
    arguments: dict[str, Any]
    logprobs: int | None
    """Alternatives listed per token; None: no log-probs at all."""

    def stream(self) -> Generator[Chunk]:
        return cast(Generator[Chunk], self.ensemble.stream(**self.arguments))

    def astream(self) -> AsyncGenerator[Chunk]:
        return cast(AsyncGenerator[Chunk], self.ensemble.astream(**self.arguments))

    async def agenerate(self) -> Generation:
        return await self.ensemble.agenerate(**self.arguments)

    def generate(self) -> Generation:
        if self.arguments["deadline"] is None:
            return self.ensemble.generate(**self.arguments)
        chunks: list[Chunk] = list(self.stream())  # in a thread, time is looked at between tokens only
        return cast(Generation, chunks[-1].final)

    def result(self, generation: Generation) -> ChatResult:
        message = AIMessage(
            content=generation.text,
            response_metadata=self._metadata(generation),
            usage_metadata=_usage(generation.usage),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def chunk(self, chunk: Chunk) -> ChatGenerationChunk:
        if chunk.final is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text))
        message = AIMessageChunk(
            content=chunk.text,
            response_metadata=self._metadata(chunk.final),
            usage_metadata=_usage(chunk.final.usage),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _metadata(self, generation: Generation) -> dict[str, Any]:
        metadata: dict[str, Any] = {"model_name": self.ensemble.name, "finish_reason": generation.finish_reason}
        if generation.trace is not None:
            metadata["replug"] = dict(generation.trace)
        if self.logprobs is not None:
            metadata["logprobs"] = {"content": [_logprob(token, self.logprobs) for token in generation.tokens]}
        return metadata


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_prompt_tokens),
    )


def _logprob(token: TokenLogprob, alternatives: int) -> dict[str, Any]:
    """A token as OpenAI writes it."""

    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "bytes": list(text.encode()), "logprob": max(logprob or 0.0, -9999.0)}

    return entry(token.token, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top[:alternatives]]}
