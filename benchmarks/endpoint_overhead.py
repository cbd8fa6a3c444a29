"""What our layers add to a call of the bare SDK, in microseconds, on the loopback address.

    python benchmarks/endpoint_overhead.py [--calls 300] [--json FILE]

The server runs in a process of its own. Calls of both kinds alternate, so that a busy machine slows both; medians are
compared. Both ask for one token with five alternatives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

PROMPT = "Document: Bora Tinel founded Velgar.\nQuestion: Who founded Velgar?\nAnswer:"


def serve(connection: Connection) -> None:
    from rlm_plugins.loopback import LoopbackEndpoint
    from rlm_plugins.testing import RandomModel

    with LoopbackEndpoint(RandomModel()) as endpoint:
        connection.send(endpoint.base_url)
        connection.recv()


async def stall(lm: object, questions: int) -> float:
    """The longest time, in ms, that the event loop did not turn while so many questions were asked at once."""
    from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
    from rlm_plugins.requests import Sampling

    assert isinstance(lm, OpenAICompatibleLM)
    await lm.agenerate("warm", sampling=Sampling(max_tokens=1))
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    asked = [lm.agenerate(f"Question {n}", sampling=Sampling(max_tokens=1)) for n in range(questions)]
    await asyncio.gather(*asked)
    watching.cancel()
    return worst * 1e3


def measure(base_url: str, calls: int) -> dict[str, float]:
    """Median microseconds a call, by way of calling; and the stall of the loop in ms."""
    import openai

    from rlm_plugins.backends.openai_compatible import OpenAICompatibleLM
    from rlm_plugins.capabilities import Capabilities
    from rlm_plugins.requests import Sampling
    from rlm_plugins.serving import BudgetedModel, CachedModel, LimitedModel, RetryingModel
    from rlm_plugins.serving.budget import Budget
    from rlm_plugins.testing import ByteTokenizer

    can = Capabilities(output_logprobs=True, top_logprobs=20, continuation="completions")
    lm = OpenAICompatibleLM("local", base_url=base_url, capabilities=can, max_retries=0)
    full = BudgetedModel(RetryingModel(LimitedModel(lm)), Budget(calls=1 << 30))
    one = Sampling(max_tokens=1)
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    aclient = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    question = "Who founded Velgar?"

    def bare() -> object:
        return client.completions.create(model="local", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5)

    async def abare() -> object:
        return await aclient.completions.create(model="local", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5)

    with tempfile.TemporaryDirectory() as folder:
        cached = CachedModel(lm, Path(folder) / "cache.sqlite")
        ways: dict[str, Callable[[], object]] = {
            "SDK": bare,
            "ours": lambda: lm.generate(question, sampling=one, top_logprobs=5),
            "ours behind retries, limits, budget": lambda: full.generate(question, sampling=one, top_logprobs=5),
            "ours, from the cache": lambda: cached.generate(question, sampling=one, top_logprobs=5),
        }
        found = {name: statistics.median(times) for name, times in _alternate(ways, calls).items()}
        cached.close()

    async def in_loop() -> dict[str, float]:
        aways: dict[str, Callable[[], Awaitable[object]]] = {
            "SDK, async": abare,
            "ours, async": lambda: lm.agenerate(question, sampling=one, top_logprobs=5),
        }
        times: dict[str, list[float]] = {name: [] for name in aways}
        for turn in range(calls + 10):
            for name, way in aways.items():
                begun = time.perf_counter()
                await way()
                if turn >= 10:
                    times[name].append((time.perf_counter() - begun) * 1e6)
        longest = await stall(OpenAICompatibleLM("local", base_url=base_url, tokenizer=ByteTokenizer()), 200)
        await aclient.close()
        return {**{name: statistics.median(each) for name, each in times.items()}, "stall_ms_200_questions": longest}

    found |= asyncio.run(in_loop())
    client.close()
    lm.close()
    return found


def _alternate(ways: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(calls + 10):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if turn >= 10:
                times[name].append((time.perf_counter() - begun) * 1e6)
    return times


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--calls", type=int, default=300)
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        found = measure(ours.recv(), chosen.calls)
    finally:
        ours.send(None)
        server.join(10)
    print(f"{'one call, median of ' + str(chosen.calls):40} {'us':>9} {'over the SDK':>13}")
    for name, value in found.items():
        if name.startswith("stall"):
            print(f"{'longest stall of the loop, 200 questions':40} {value:7.1f} ms")
        else:
            base = found["SDK, async" if "async" in name else "SDK"]
            print(f"{name:40} {value:9.0f} {value - base:+13.0f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
