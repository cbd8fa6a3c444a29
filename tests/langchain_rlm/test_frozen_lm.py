"""Which LangChain models become language models of the core, and how the others are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_rlm import ChatReplug, FrozenLM

from rlm_plugins.errors import UsageError
from rlm_plugins.methods.replug.ensemble import Replug
from rlm_plugins.requests import Sampling
from rlm_plugins.testing import ScriptedModel


def test_a_model_of_the_core_is_itself(lm: ScriptedModel) -> None:
    assert FrozenLM.from_model(lm) is lm


def test_our_own_chat_models(lm: ScriptedModel) -> None:
    assert isinstance(FrozenLM.from_model(ChatReplug(llm=lm)), Replug)
    bound = FrozenLM.from_model(
        ChatReplug(llm=lm).with_config(tags=["x"]).bind(temperature=0.3, stop="x", max_tokens=9)
    )
    assert bound.sampling == Sampling(temperature=0.3, stop=("x",), max_tokens=9)
    assert lm.sampling == Sampling()
    with pytest.raises(UsageError, match="bound to tools"):
        FrozenLM.from_model(ChatReplug(llm=lm).bind(tools=[]))
    with pytest.raises(UsageError, match="function of LangChain messages"):
        FrozenLM.from_model(ChatReplug(llm=lm, query=lambda messages: "x"))


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (FakeListChatModel(responses=["x"]).with_retry(), "RunnableRetry .* around the ensemble"),
        (
            FakeListChatModel(responses=["x"]).with_fallbacks([FakeListChatModel(responses=["y"])]),
            "RunnableWithFallbacks .* around the ensemble",
        ),
        (FakeListChatModel(responses=["x"]), "FakeListChatModel cannot be used .* What works today: .*TransformersLM"),
        (RunnableLambda(lambda x: x), "RunnableLambda cannot"),
        ("gpt-5", "the string 'gpt-5'"),
        (None, "NoneType"),
        (ChatReplug, "cannot be used"),
    ],
)
def test_what_is_refused(wrapped: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FrozenLM.from_model(wrapped)
    with pytest.raises(UsageError, match=message):
        ChatReplug(llm=wrapped)


def _pipeline(**kwargs: Any) -> Any:
    """What langchain_huggingface makes of a model in this process, as far as it is looked at."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "Who": 3, "founded": 4, "Velgar": 5, "?": 6, "Document": 7, ":": 8}
    words_tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    inner = SimpleNamespace(model=transformers.LlamaForCausalLM(config), tokenizer=tokenizer)
    made = type("HuggingFacePipeline", (), {})()
    made.pipeline, made.pipeline_kwargs = inner, kwargs
    return made


def test_hugging_face_pipelines() -> None:
    pipeline = _pipeline(max_new_tokens=5, temperature=0.7)
    lm = FrozenLM.from_model(pipeline)
    assert lm.sampling == Sampling(max_tokens=5)
    sampled = _pipeline(do_sample=True, top_p=0.9, temperature=0.7)
    assert FrozenLM.from_model(sampled).sampling == Sampling(temperature=0.7, top_p=0.9)
    chat = type("ChatHuggingFace", (), {})()
    chat.llm = pipeline
    message = ChatReplug(llm=chat, max_tokens=3, trace="full").invoke("Who founded Velgar?", documents=[_document()])
    assert message.response_metadata["replug"]["calls"] == 1


def _document() -> Any:
    from langchain_core.documents import Document

    return Document("Velgar")


def test_hugging_face_endpoints_are_refused() -> None:
    chat = type("ChatHuggingFace", (), {})()
    chat.llm = type("HuggingFaceEndpoint", (), {})()
    with pytest.raises(UsageError, match="remote service"):
        FrozenLM.from_model(chat)
