"""Malformed requests against `pldr serve`, ten thousand of them by default.

    python benchmarks/faults_serve.py [--requests 10000] [--rounds 5] [--at-once 16] [--output FILE]

Each fault knows which answers are right. At its end the server has to be healthy, to answer as before, and to be as large as after the first round; no
answer may hold a traceback, and none of the requests may have failed inside (status 500).
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench_serve import lines_of, memory, started
from conditions import conditions, record

KEY = "a-key"
VALID = {
    "prompt": "Once upon a time",
    "max_tokens": 8,
    "temperature": 0,
    "seed": 1,
    "n": 1,
    "stop": ["zzz"],
    "logprobs": 1,
}
# Seconds after which the server gives up on a body, and somewhat more.
ARRIVAL = 45

Status = int | None  # None: the connection was closed without an answer
Fault = Callable[["Client", random.Random], Awaitable[Status]]


class Client:
    """Raw HTTP, as wrong as it is asked to be."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[bytes] = []

    async def exchange(self, *pieces: bytes, pause: float = 0.0, read: bool = True) -> Status:
        """Send pieces over a new connection; the status of what comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
            return await self._status(reader) if read else None
        except ConnectionError:
            return None
        finally:
            writer.close()

    async def _status(self, reader: asyncio.StreamReader) -> Status:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ARRIVAL + 30)
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        self.answers.append(await reader.readexactly(length))
        return int(head.split()[1])

    async def post(
        self, body: bytes, *, path: str = "/v1/completions", key: str = KEY, length: int | None = None
    ) -> Status:
        return await self.exchange(head(len(body) if length is None else length, path, key), body)


def head(length: int | None, path: str = "/v1/completions", key: str = KEY, more: str = "") -> bytes:
    sized = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n{more}{sized}\r\n\r\n"
    ).encode()


async def bad_json(client: Client, dice: random.Random) -> Status:
    text = json.dumps(VALID).encode()
    cut = dice.randrange(len(text))
    return await client.post(text[:cut] if dice.random() < 0.5 else text[:cut] + dice.randbytes(8) + text[cut:-1])


async def wrong_type(client: Client, dice: random.Random) -> Status:
    name = dice.choice(
        ["prompt", "max_tokens", "temperature", "seed", "n", "stop", "logprobs", "stream", "model", "echo"]
    )
    return await client.post(
        json.dumps(VALID | {name: dice.choice([{}, {"a": 1}, [[]], [None], [{}], [1, "a"]])}).encode()
    )


async def huge_number(client: Client, dice: random.Random) -> Status:
    name = dice.choice(["max_tokens", "temperature", "n", "logprobs", "seed", "top_k", "repetition_penalty"])
    number = dice.choice(["1e308", "-1e308", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000])
    if name == "top_k" and number in ("9" * 30, "1e400"):  # as many as there are
        number = "1e308"
    return await client.post(json.dumps(VALID | {name: "@"}).replace('"@"', number).encode())


async def not_a_number(client: Client, dice: random.Random) -> Status:
    name = dice.choice(["max_tokens", "temperature", "top_p", "n", "repetition_penalty", "presence_penalty"])
    number = dice.choice(["NaN", "Infinity", "-Infinity"])
    return await client.post(json.dumps(VALID | {name: "@"}).replace('"@"', number).encode())


async def deep_nesting(client: Client, dice: random.Random) -> Status:
    depth, (opened, closed) = dice.choice([100, 1000, 10_000, 100_000]), dice.choice([("[", "]"), ('{"a":', "}")])
    inner = opened * depth + "1" + closed * depth * dice.choice([0, 1])
    return await client.post(json.dumps(VALID | {"prompt": "@"}).replace('"@"', inner).encode())


async def unknown_field(client: Client, dice: random.Random) -> Status:
    return await client.post(json.dumps(VALID | {f"f{i}": i for i in range(dice.choice([1, 10, 10_000]))}).encode())


async def wrong_prompt(client: Client, dice: random.Random) -> Status:
    prompt = dice.choice(
        [
            None,
            [],
            [-1],
            [10**9],
            [6144],
            [5] * 2000,
            ["a", None],
            [[5], []],
            ["a"] * 500,
            "\ud800",
            [True],
            "a " * 2000,
        ]
    )
    return await client.post(json.dumps(VALID | {"prompt": prompt}).encode())


async def not_utf8(client: Client, dice: random.Random) -> Status:
    return await client.post(b'{"prompt": "' + dice.choice([b"\xff\xfe", b"\xc3", b"\x80abc"]) + b'"}')


async def large_body(client: Client, dice: random.Random) -> Status:
    """Of 100 MB: announced, and sent in part; or chunked, and sent as far as the server reads."""
    return await client.exchange(head(100_000_000), bytes(dice.choice([0, 1, 65_536, 2_000_000])))


async def large_chunks(client: Client, dice: random.Random) -> Status:
    chunk = b"%x\r\n" % 500_000 + bytes(500_000) + b"\r\n"
    return await client.exchange(head(None), *[chunk] * 4)


async def whole_large_body(client: Client, dice: random.Random) -> Status:
    return await client.exchange(head(100_000_000), *[bytes(1_000_000)] * 100)


async def half_open(client: Client, dice: random.Random) -> Status:
    """Nothing, or not all that was announced, and gone without a word."""
    pieces = dice.choice([[], [b"POST /v1"], [head(500)], [head(500), b'{"prompt": ']])
    return await client.exchange(*pieces, pause=dice.random() / 5, read=False)


async def slow_body(client: Client, dice: random.Random) -> Status:
    """In small pieces, in time."""
    body = b'{"prompt": 5}'
    return await client.exchange(head(len(body)), *(body[i : i + 1] for i in range(len(body))), pause=0.02)


async def too_slow(client: Client, dice: random.Random) -> Status:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(head(100) + b"{")
    answer = asyncio.create_task(client._status(reader))
    while not answer.done():
        writer.write(b" ")
        await asyncio.sleep(1)
    writer.close()
    return answer.result()


async def too_slow_head(client: Client, dice: random.Random) -> Status:
    """A byte a second, of headers that never end; the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    ended = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        while not ended.done():
            writer.write(b"G")
            await writer.drain()
            await asyncio.sleep(1)
        assert ended.result() == b"", ended.result()
    ended.cancel()
    writer.close()
    return None


async def left_stream(client: Client, dice: random.Random) -> Status:
    """Gone after the first pieces of a long stream, or before them."""
    body = json.dumps(
        VALID | {"max_tokens": 900, "stream": dice.random() < 0.7, "ignore_eos": True, "n": dice.choice([1, 4])}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(head(len(body)) + body)
    await writer.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(100), dice.choice([0.01, 0.1, 0.5]))
    writer.transport.abort() if dice.random() < 0.5 else writer.close()
    return None


async def wrong_key(client: Client, dice: random.Random) -> Status:
    return await client.post(
        json.dumps(VALID).encode(), key=dice.choice(["", "b", KEY + "x", KEY[:-1], "\x7f", "é" * 1000])
    )


async def wrong_place(client: Client, dice: random.Random) -> Status:
    return await client.post(
        b"{}",
        path=dice.choice(["/", "/v1", "/v1/completions/x", "/../etc/passwd", "/v1/engines/%00", "//v1/completions"]),
    )


async def wrong_method(client: Client, dice: random.Random) -> Status:
    method = dice.choice(["PUT", "DELETE", "PATCH"]).encode()
    return await client.exchange(head(2).replace(b"POST", method), b"{}")


async def no_http(client: Client, dice: random.Random) -> Status:
    line = dice.choice(
        [b"\x16\x03\x01", b"GET / HTTP/9.9", b"\x00" * 50, b"A" * 100, b"GET  /  HTTP/1.1", b"PRI * HTTP/2.0"]
    )
    return await client.exchange(line + b"\r\n\r\n")


async def wrong_framing(client: Client, dice: random.Random) -> Status:
    more = dice.choice(["content-length: -5\r\n", "content-length: abc\r\n", f"x: {'y' * 70_000}\r\n", "a b: c\r\n"])
    return await client.exchange(head(2, more=more), b"{}")


async def wrong_chunks(client: Client, dice: random.Random) -> Status:
    """The body's frame breaks while it is read: no answer is promised, as nobody knows where it would belong."""
    return await client.exchange(head(None), b"zz\r\n{}\r\n", read=False)


# Which answers are right, and how often a fault comes.
FAULTS: dict[Fault, tuple[set[Status], int]] = {
    bad_json: ({400}, 10), wrong_type: ({400}, 10), huge_number: ({400}, 8), not_a_number: ({400}, 8), deep_nesting: ({400}, 6),
    unknown_field: ({400}, 4), wrong_prompt: ({400}, 8), not_utf8: ({400}, 4), large_body: ({413}, 5), large_chunks: ({413}, 2),
    half_open: ({None}, 6), slow_body: ({400}, 3), left_stream: ({None}, 6), wrong_key: ({401, 400}, 8), wrong_place: ({404, 401}, 5),
    wrong_method: ({405}, 4), no_http: ({400, 404}, 4), wrong_framing: ({400}, 4), wrong_chunks: ({None}, 2),
}  # fmt: skip
# Those that take long by themselves, so often.
LONG: dict[Fault, tuple[set[Status], int]] = {
    whole_large_body: ({413}, 20),
    too_slow: ({408}, 20),
    too_slow_head: ({None}, 20),
}


async def campaign(
    port: int, arguments: argparse.Namespace, seed: int, counts: Counter, wrong: list[str]
) -> tuple[Counter, list[str]]:
    """One round: how often each fault had which answer; and what was not right."""
    dice = random.Random(seed)
    faults = [fault for fault, (_, weight) in FAULTS.items() for _ in range(weight)]
    left = [(fault, right) for fault, (right, count) in LONG.items() for _ in range(count // arguments.rounds)]
    chosen = [dice.choice(faults) for _ in range(arguments.requests // arguments.rounds - len(left))]
    long = asyncio.gather(*(one(port, *fault, random.Random(i), counts, wrong) for i, fault in enumerate(left)))
    places = iter(enumerate(chosen, seed << 32))

    async def worker() -> None:
        for seed, fault in places:
            await one(port, fault, FAULTS[fault][0], random.Random(seed), counts, wrong)

    await asyncio.gather(long, *(worker() for _ in range(arguments.at_once)))
    return counts, wrong


async def one(
    port: int, fault: Fault, right: set[Status], dice: random.Random, counts: Counter, wrong: list[str]
) -> None:
    client = Client(port)
    try:
        status = await fault(client, dice)
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        status = None
        wrong.append(f"{fault.__name__}: {error!r}")
    counts[fault.__name__, status] += 1
    if status not in right:
        wrong.append(f"{fault.__name__}: {status}")
    for answer in client.answers:
        if b"Traceback" in answer or "error" not in json.loads(answer):
            wrong.append(f"{fault.__name__}: {answer[:200]!r}")


async def valid(port: int) -> bytes:
    client = Client(port)
    assert await client.post(json.dumps(VALID | {"n": 4}).encode()) == 200
    return json.dumps([choice["text"] for choice in json.loads(client.answers[0])["choices"]]).encode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--rounds", type=int, default=5, help="memory is compared between the end of the first and the last"
    )
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["PLDR_API_KEY"] = KEY
    words = [sys.executable, "-m", "pldr", "serve", "--port", str(arguments.port), "--backend", "engine"]
    with tempfile.TemporaryDirectory() as place, started(words, arguments.port, log := Path(place) / "log") as process:
        before, start = asyncio.run(valid(arguments.port)), time.perf_counter()
        counts, wrong, sizes = Counter(), [], [memory(process)]
        for seed in range(arguments.rounds):
            counts, wrong = asyncio.run(campaign(arguments.port, arguments, seed, counts, wrong))
            sizes.append(memory(process))
        seconds = time.perf_counter() - start
        same = asyncio.run(valid(arguments.port)) == before
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        lines = lines_of(log)
    failed_inside = [line for line in lines if line.get("status") == 500 or "traceback" in line]
    answers: dict[str, dict[str, int]] = {}
    for (name, status), count in sorted(counts.items(), key=str):
        answers.setdefault(name, {})[str(status)] = count
    result = {
        "benchmark": "serve-faults", "requests": sum(counts.values()), "seconds": seconds, "answers": answers, "wrong": wrong[:50],
        "wrong_in_all": len(wrong), "failed_inside": failed_inside[:5], "valid_request_as_before": same, "exit_code": code,
        "memory": sizes, "memory_growth_after_the_first_round": sizes[-1] - sizes[1],
    } | conditions()  # fmt: skip
    record(result, arguments.output)
    assert not wrong and not failed_inside and same and code == 0 and sizes[-1] - sizes[1] < 50e6, "see above"  # noqa: PT018


if __name__ == "__main__":
    main()
