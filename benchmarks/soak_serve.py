"""Memory of `pldr serve` over as many requests as an hour brings at one a second, sent as fast as they are answered.

    python benchmarks/soak_serve.py [MODEL] [--requests 3600] [--warm 100] [--clients 48] [--output FILE]

Requests are of every kind, at random: prompts from a word to almost the whole context, one to 24 new tokens, greedy and drawn, whole and streamed,
several choices, log-probabilities, echo, stops; one in twenty leaves before its end, and one in ten is none at all. Resident memory is read after
every hundredth. From the end of the warm-up on, it may not grow by more than 50 MB.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from bench_serve import memory, some_words, started
from conditions import conditions, record

from pldr import STORIES

EVERY = 100


def some_request(dice: random.Random, words: list[str]) -> dict[str, Any]:
    """A valid one."""
    length = 600 if dice.random() < 0.02 else dice.choice([1, 5, 10, 20, 30, 40, 60, 200])
    start = dice.randrange(len(words) - length)
    asked = {"prompt": " ".join(words[start : start + length]), "max_tokens": dice.randint(1, 24)}
    asked |= {"temperature": dice.choice([0, 0, 0.8]), "stream": dice.random() < 0.5}
    for chance, more in ((0.1, {"n": 3}), (0.2, {"logprobs": 5}), (0.1, {"echo": True}), (0.1, {"stop": ["."]}),
                         (0.05, {"repetition_penalty": 1.2}), (0.1, {"top_p": 0.9, "seed": 1})):  # fmt: skip
        if dice.random() < chance:
            asked |= more
    return asked


async def ask(session: aiohttp.ClientSession, url: str, dice: random.Random, words: list[str]) -> str:
    """One request; what came of it."""
    kind, asked = dice.random(), some_request(dice, words)
    if kind < 0.1:
        asked |= dice.choice(
            [{"prompt": []}, {"max_tokens": "many"}, {"colour": 1}, {"prompt": "a " * 3000}, {"n": -1}]
        )
    leaves = 0.1 <= kind < 0.15
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(dice.random() * 2 if leaves else None):
            async with session.post(f"{url}/v1/completions", json=asked) as response:
                text = await response.text()
                ended = "[DONE]" in text if asked["stream"] else '"usage"' in text
                return str(response.status) if response.status != 200 or ended else "broken off"
    return "left"


async def soak(url: str, count: int, clients: int, seed: int, sizes: list[int], size: Any) -> Counter[str]:
    words, places, came = some_words(), iter(range(count)), Counter[str]()

    async def client(session: aiohttp.ClientSession) -> None:
        for place in places:
            came[await ask(session, url, random.Random(f"{seed} {place}"), words)] += 1
            if sum(came.values()) % EVERY == 0:
                sizes.append(size())

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return came


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=STORIES)
    parser.add_argument("--requests", type=int, default=3600)
    parser.add_argument("--warm", type=int, default=100, help="requests before memory is compared")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--port", type=int, default=8767)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    words = [
        sys.executable,
        "-m",
        "pldr",
        "serve",
        str(arguments.model),
        "--port",
        str(arguments.port),
        "--backend",
        "engine",
    ]
    with tempfile.TemporaryDirectory() as place, started(words, arguments.port, Path(place) / "log") as process:
        sizes = [memory(process)]
        load = lambda count, seed: asyncio.run(  # noqa: E731
            soak(url, count, arguments.clients, seed, sizes, lambda: memory(process))
        )
        load(arguments.warm, 0)
        warm, start = memory(process), time.perf_counter()
        before = len(sizes)
        came = load(arguments.requests, 1)
        seconds = time.perf_counter() - start
        sizes.append(memory(process))
    growth = max(sizes[before:]) - warm
    result = {
        "benchmark": "serve-soak", "model": arguments.model.name, "requests": arguments.requests, "warm": arguments.warm,
        "clients": arguments.clients, "seconds": seconds, "came": dict(sorted(came.items())), "memory": sizes, "memory_after_warm_up": warm,
        "most_growth": growth,
    } | conditions()  # fmt: skip
    record(result, arguments.output)
    assert came.keys() <= {"200", "400", "left"}, came
    assert growth < 50e6, growth


if __name__ == "__main__":
    main()
