"""Retrieval-based language models over a frozen model, as parts of LangChain and LlamaIndex.

The adapters are packages of their own: `langchain_rlm` and `llama_index_rlm`. Importing this one loads no torch, no
faiss and no framework.
"""

from .backends.openai_compatible import OpenAICompatibleLM
from .backends.transformers_local import TransformersLM
from .capabilities import Capabilities
from .errors import (
    DeadlineExceeded,
    MissingExtra,
    ModelError,
    RetrievalError,
    RLMError,
    Unsupported,
    UsageError,
)
from .methods.replug.ensemble import PAPER, Replug, ReplugSettings
from .models import Embedder, LanguageModel, Retriever, aprobe, probe
from .prompts import CONTINUATION, QUESTION_ANSWER, PromptTemplate
from .reader import embedded_encoder, embedded_reader
from .requests import Sampling
from .retrieval import DenseRetriever
from .texts import Chunk, Generation, Message, Passage, Scoring, TokenLogprob, Usage

__all__ = [
    "CONTINUATION",
    "PAPER",
    "QUESTION_ANSWER",
    "Capabilities",
    "Chunk",
    "DeadlineExceeded",
    "DenseRetriever",
    "Embedder",
    "Generation",
    "LanguageModel",
    "Message",
    "MissingExtra",
    "ModelError",
    "OpenAICompatibleLM",
    "Passage",
    "PromptTemplate",
    "RLMError",
    "Replug",
    "ReplugSettings",
    "RetrievalError",
    "Retriever",
    "Sampling",
    "Scoring",
    "TokenLogprob",
    "TransformersLM",
    "Unsupported",
    "Usage",
    "UsageError",
    "aprobe",
    "embedded_encoder",
    "embedded_reader",
    "probe",
]
