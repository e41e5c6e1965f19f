"""Servers under load: `pldr serve`, and others with the same model where they can be started.

    python benchmarks/bench_serve.py [MODEL] [--servers pldr,frozen,transformers,vllm] [--clients 64] [--requests 2000] [--output FILE]

Each server is started as a user starts it and asked for greedy streams over HTTP: first by one client, one request at a time, which
gives the answers that are compared with; then by many clients at once. A request to `pldr serve` that fails, or whose text is not the one that
the same prompt got alone, stops the run, unless the two part where the two most probable tokens are within 1e-5: a batch rounds otherwise. Then, of `pldr serve` alone: memory before and after, and SIGTERM in the midst of a load, after
which every request that was accepted must have had its whole answer.

"pldr" serves the model, and the others a frozen form of it: "frozen" is `pldr serve` with that, beside `transformers serve` and vLLM, which
needs an environment of its own (--vllm-python).
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
from conditions import conditions, record

from pldr import HELD_OUT, STORIES, Engine, freeze_checkpoint, load_model, load_tokenizer
from pldr.engine.text import continuation

# The command with our classes known to it, as `import pldr` in a program of one's own makes them known.
TRANSFORMERS = "import pldr.modeling_pldr; from transformers.cli.transformers import main; main()"


class Answer(NamedTuple):
    """Of one request: its text, or None where it failed; seconds to its first text and to its end."""

    text: str | None
    first: float
    seconds: float


def command(server: str, model: str, port: int, vllm_python: str) -> list[str]:
    match server:
        case "pldr":
            return [sys.executable, "-m", "pldr", "serve", model, "--port", str(port), "--backend", "engine"]
        case "transformers":  # by default its cache takes more than half of the memory, and is slower
            cache = ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
            options = ["--continuous-batching", "--device", "cpu", "--port", str(port), *cache]
            return [sys.executable, "-c", TRANSFORMERS, "serve", model, *options]
        case "vllm":  # likewise
            options = ["--port", str(port), "--dtype", "float32", "--gpu-memory-utilization", "0.1"]
            words = ["env", "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1", vllm_python]
            return [*words, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
    raise ValueError(server)


@contextlib.contextmanager
def started(words: list[str], port: int, log: Path) -> Iterator[subprocess.Popen]:
    """A server that answers."""
    with log.open("w") as stream, subprocess.Popen(words, stdout=stream, stderr=stream) as process:
        try:
            asyncio.run(healthy(f"http://127.0.0.1:{port}/health", process, log))
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise TimeoutError(url)


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: str, new: int) -> Answer:
    """One greedy stream."""
    asked = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    start, first, text, ended = time.perf_counter(), 0.0, "", False
    async with session.post(f"{url}/v1/completions", json=asked) as response:
        if response.status != 200:
            return Answer(None, 0.0, time.perf_counter() - start)
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                text += choice["text"]
                ended |= choice.get("finish_reason") is not None
            first = first or (time.perf_counter() - start if text else 0.0)
    return Answer(text if ended else None, first, time.perf_counter() - start)


async def load(url: str, model: str, prompts: list[str], new: int, clients: int) -> tuple[list[Answer], float]:
    """Answers in the order of the prompts, which so many clients ask one after the other; and seconds in all."""
    answers: list[Answer] = [Answer(None, 0.0, 0.0)] * len(prompts)
    places = iter(range(len(prompts)))

    async def client(session: aiohttp.ClientSession) -> None:
        for place in places:
            with contextlib.suppress(aiohttp.ClientError):
                answers[place] = await ask(session, url, model, prompts[place], new)

    start = time.perf_counter()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)
    ) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return answers, time.perf_counter() - start


def some_words() -> list[str]:
    """Of the held-out excerpts."""
    return " ".join(json.loads(line)["text"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()).split()


def some_prompts(count: int) -> list[str]:
    """Of 4 to 60 words."""
    dice, words = random.Random(0), some_words()
    starts = [dice.randrange(len(words) - 60) for _ in range(count)]
    return [" ".join(words[start : start + dice.randint(4, 60)]) for start in starts]


def summary(answers: list[Answer], seconds: float, new: int) -> dict[str, float]:
    """Rates, and times in seconds."""
    first, whole = (sorted(getattr(answer, name) for answer in answers) for name in ("first", "seconds"))
    at = lambda values, share: values[min(int(share * len(values)), len(values) - 1)]  # noqa: E731
    return {
        "requests": len(answers), "seconds": seconds, "requests_per_second": len(answers) / seconds,
        "tokens_per_second_at_most": len(answers) * new / seconds,
        "first_token_p50": at(first, 0.5), "first_token_p99": at(first, 0.99),
        "request_p50": at(whole, 0.5), "request_p99": at(whole, 0.99), "request_mean": statistics.fmean(whole),
    }  # fmt: skip


def parted_at_a_tie(engine: Engine, prompt: str, text: str, expected: str, new: int) -> bool:
    """Whether two continuations go apart where two tokens are as probable as each other, within 1e-5."""
    (greedy,) = engine.generate(prompt, max_new_tokens=new, logprobs=True, top_logprobs=2)
    ids = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for place, ((_, first), (_, second)) in enumerate(greedy.top_logprobs, 1):
        if not text.startswith(continuation(engine.tokenizer, ids, greedy.token_ids[:place])):
            return greedy.text == expected and first - second < 1e-5
    return False


def measure(
    url: str,
    name: str,
    model: Path,
    process: subprocess.Popen,
    prompts: list[str],
    requests: int,
    arguments: argparse.Namespace,
) -> dict:
    """One request at a time, then many; every text compared."""
    alone, seconds = asyncio.run(load(url, name, prompts, arguments.new, 1))
    if any(answer.text is None for answer in alone):
        raise RuntimeError("of requests one at a time, some failed")
    expected = {prompt: answer.text for prompt, answer in zip(prompts, alone, strict=True)}
    dice = random.Random(1)
    asked = [dice.choice(prompts) for _ in range(requests)]
    worked = processor_time(process)
    many, took = asyncio.run(load(url, name, asked, arguments.new, arguments.clients))
    worked = processor_time(process) - worked
    failed = sum(answer.text is None for answer in many)
    others = [(prompt, answer.text) for prompt, answer in zip(asked, many, strict=True)
              if answer.text not in (None, expected[prompt])]  # fmt: skip
    engine = Engine(load_model(model), load_tokenizer(model), max_batch=1)
    ties = sum(parted_at_a_tie(engine, prompt, text, expected[prompt], arguments.new) for prompt, text in others)
    one, load_of_many = summary(alone, seconds, arguments.new), summary(many, took, arguments.new)
    return {
        "one_at_a_time": one, "many": load_of_many | {"clients": arguments.clients, "failed": failed, "other_text": len(others), "of_them_at_ties": ties, "processor_seconds_per_request": worked / requests},
        "throughput_ratio": load_of_many["requests_per_second"] / one["requests_per_second"],
    }  # fmt: skip


def memory(process: subprocess.Popen) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def processor_time(process: subprocess.Popen) -> float:
    """Seconds that a server and its processes have worked: what it needs, whatever else the machine does."""
    root = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (root, *root.children(recursive=True)))


def terminated_under_load(
    url: str, name: str, process: subprocess.Popen, prompts: list[str], log: Path, clients: int
) -> dict:
    """SIGTERM while every client waits for an answer: what the server accepted, and what clients got whole."""
    time.sleep(2)  # the last lines of the load before
    before = len(answered(log))

    async def run() -> list[Answer]:
        asking = asyncio.create_task(load(url, name, prompts, 64, clients))
        await asyncio.sleep(3)
        process.send_signal(signal.SIGTERM)
        return (await asking)[0]

    whole = sum(answer.text is not None for answer in asyncio.run(run()))
    code = process.wait(60)
    lines = answered(log)[before:]
    return {
        "exit_code": code, "accepted": sum(line["status"] == 200 for line in lines), "whole_answers": whole,
        "open_at_signal": next(line["open"] for line in lines_of(log) if line["event"] == "shutting down"),
        "sent_away_with_503": sum(line["status"] == 503 for line in lines),
    }  # fmt: skip


def lines_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def answered(log: Path) -> list[dict]:
    return [line for line in lines_of(log) if line["event"] == "request" and line["path"] == "/v1/completions"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=STORIES)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--peer-requests", type=int, default=256, help="of the servers with the frozen form")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--servers", default="pldr", help="pldr, frozen, transformers, vllm")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prompts = some_prompts(arguments.prompts)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        frozen = Path(place) / "frozen"
        freeze_checkpoint(arguments.model, frozen, prompts=prompts[:8])
        for title in arguments.servers.split(","):
            model, server = (arguments.model if title == "pldr" else frozen), title.replace("frozen", "pldr")
            log, url = Path(place) / "log", f"http://127.0.0.1:{arguments.port}"
            words = command(server, str(model), arguments.port, arguments.vllm_python)
            with started(words, arguments.port, log) as process:
                name = model.name if server == "pldr" else str(model)
                asyncio.run(load(url, name, prompts, arguments.new, arguments.clients))  # warm: every row of the cache
                warm = memory(process)
                count = arguments.requests if title == "pldr" else arguments.peer_requests
                try:
                    results[title] = measure(url, name, model, process, prompts, count, arguments)
                except RuntimeError as error:
                    if server == "pldr":
                        raise
                    results[title] = {"error": str(error)}  # a peer's own trouble is a result, too
                    continue
                if server == "pldr":
                    results[title] |= {"memory_before": warm, "memory_after": memory(process)}
                if title == "pldr":
                    results[title]["sigterm"] = terminated_under_load(
                        url, name, process, prompts * 5, log, arguments.clients
                    )
            print(title, json.dumps(results[title], indent=1))
            many, sigterm = results[title]["many"], results[title].get("sigterm")
            assert server != "pldr" or (not many["failed"] and many["other_text"] == many["of_them_at_ties"]), many
            assert sigterm is None or sigterm["whole_answers"] == sigterm["accepted"] >= sigterm["open_at_signal"], (
                sigterm
            )
    settings = {name: getattr(arguments, name) for name in ("clients", "requests", "peer_requests", "prompts", "new")}
    record(
        {"benchmark": "serve", "model": arguments.model.name} | settings | {"servers": results} | conditions(),
        arguments.output,
    )


if __name__ == "__main__":
    main()
