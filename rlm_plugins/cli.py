"""The command line: `rlm-plugins demo | probe`. Arguments in, text out; the work is elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .capabilities import Capabilities, choose_strategy
from .errors import RLMError, Unsupported, UsageError
from .models import probe

if TYPE_CHECKING:
    from .models import LanguageModel


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        for line in arguments.run(arguments):
            print(line, flush=True)
    except RLMError as error:
        print(f"rlm-plugins: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlm-plugins", description="Retrieval-based language models over a frozen model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="answer questions with REPLUG, through LangChain and LlamaIndex, offline")
    demo.add_argument("--docs", type=Path, metavar="FOLDER", help="your own .txt and .md files instead of the example")
    demo.add_argument("--ask", action="append", metavar="QUESTION", help="a question (repeat for several)")
    demo.add_argument("--k", type=int, default=5, help="documents per question (default: %(default)s)")
    _add_model(demo, "the folder of a Hugging Face causal model (extra `local`), or with --base-url a model's name")
    demo.set_defaults(run=_demo)

    ask = commands.add_parser("probe", help="what an endpoint gives, and which methods that makes possible")
    _add_model(ask, "the model's name at the endpoint")
    ask.set_defaults(run=_probe)
    return parser


def _add_model(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--model", metavar="NAME", help=meaning)
    parser.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible endpoint (extra `openai`)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the served model's tokenizer: token ids, exact scores")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="the environment variable that holds the key")


def _language_model(arguments: argparse.Namespace) -> LanguageModel | None:
    """The model the arguments name; None where they name none."""
    if arguments.base_url is None:
        if arguments.tokenizer or arguments.api_key_env:
            raise UsageError("--tokenizer and --api-key-env belong to an endpoint: pass --base-url as well")
        if arguments.model is None:
            return None
        from .backends.transformers_local import TransformersLM

        return TransformersLM(arguments.model)
    if arguments.model is None:
        raise UsageError("an endpoint serves models by name: pass --model NAME with --base-url")
    from .backends.numpy_reader import TokenizersTokenizer
    from .backends.openai_compatible import OpenAICompatibleLM

    key = None
    if arguments.api_key_env:
        key = os.environ.get(arguments.api_key_env)
        if not key:
            raise UsageError(f"the environment variable {arguments.api_key_env} holds no key")
    tokenizer = TokenizersTokenizer(Path(arguments.tokenizer)) if arguments.tokenizer else None
    return OpenAICompatibleLM(arguments.model, base_url=arguments.base_url, api_key=key, tokenizer=tokenizer)


def _demo(arguments: argparse.Namespace) -> Iterator[str]:
    from .demo import demo

    lm = _language_model(arguments)
    return demo(docs=arguments.docs, questions=arguments.ask, lm=lm, k=arguments.k)


def _probe(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.base_url is None:
        raise UsageError("probe asks an endpoint: pass --base-url URL and --model NAME")
    lm = _language_model(arguments)
    assert lm is not None
    can = probe(lm)
    yield f"{lm.name} at {arguments.base_url}"
    for field in fields(Capabilities):
        yield f"  {field.name:<20} {getattr(can, field.name)!r}"
    yield ""
    yield "what that makes possible"
    try:
        way = choose_strategy(can, "token")
        calls = "k prompts, and k rows a token" if way == "native" else "k one-token calls for each token of the answer"
        yield f"  REPLUG, token mixture   yes, {way}: {calls}"
    except Unsupported as error:
        yield f"  REPLUG, token mixture   no: {error}"
    scored = "yes: one call a text" if can.prompt_logprobs else "no: it gives no log-probs of a given text"
    if not can.prompt_logprobs and can.logit_bias == "raw":
        scored = "yes, by forced decoding: one call for each token of the text"
    yield f"  scoring a given text    {scored}"


if __name__ == "__main__":
    sys.exit(main())
