"""The command line: `rlm-plugins demo`. Arguments in, text out; the work is elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import RLMError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except RLMError as error:
        print(f"rlm-plugins: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlm-plugins", description="Retrieval-based language models over a frozen model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="answer questions with REPLUG, through LangChain and LlamaIndex, offline")
    demo.add_argument("--docs", type=Path, metavar="FOLDER", help="your own .txt and .md files instead of the example")
    demo.add_argument("--ask", action="append", metavar="QUESTION", help="a question (repeat for several)")
    demo.add_argument("--model", metavar="FOLDER", help="a Hugging Face causal model (needs the extra `local`)")
    demo.add_argument("--k", type=int, default=5, help="documents per question (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    for line in demo(docs=arguments.docs, questions=arguments.ask, model=arguments.model, k=arguments.k):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
