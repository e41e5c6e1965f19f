"""How long the studio lets one wait: from its first line to a model that answers, to the first token, at a switch, for the grid.

    python benchmarks/bench_studio.py [MODEL] [--output FILE]

It starts `pldr studio` and asks as the page does. Usable is a model that writes; the story model does so before torch is there. Each number is the
median of five but the start's, after the server has warmed up; `first` is the time of a request that nothing was kept for. On two cores the story
model should be usable within 3 s, switch within 0.5 s, and take 1 s for the rest.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conditions import conditions, record

TEXT = "Once upon a time there was an old king who lived in a castle by the sea. He had three daughters, and"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    words = [arguments.model] * (arguments.model is not None)
    command = [sys.executable, "-m", "pldr", "studio", *words, "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = re.search(r"http://\S+", process.stderr.readline())
        assert address, "no address in the first line"
        try:
            result = measure(address[0])
        finally:
            process.terminate()
    record({"benchmark": "studio"} | result | conditions("cpu"), arguments.output)


def measure(url: str) -> dict[str, Any]:
    def ask(path: str, **fields: Any) -> Any:
        body = json.dumps(fields).encode() if fields else None
        request = urllib.request.Request(f"{url}api/{path}", body, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    begun = time.perf_counter()
    page = seconds(lambda: urllib.request.urlopen(url, timeout=60).read())

    def first_token(operator: str) -> None:
        answer = ask("generate", prompt=TEXT, operator=operator, max_new_tokens=20, temperature=0.8, seed=0)
        answer.readline()  # the prompt's tokens
        answer.readline()
        answer.close()

    while "layers" not in (state := json.load(ask("state"))):
        time.sleep(0.02)
    usable, early = time.perf_counter() - begun, None if state["ready"] else seconds(lambda: first_token("cached"))
    while not (state := json.load(ask("state")))["ready"]:
        time.sleep(0.05)
    ready = time.perf_counter() - begun
    first = seconds(lambda: first_token("cached"))
    time.sleep(10)  # it warms up
    operators = [name for name in state["operators"] if name != "learned"] + ["factored:8"]
    switches = {name: [seconds(partial(first_token, name)) for _ in range(6)] for name in operators}

    def grid(text: str) -> None:
        ask("grid", text=text, tensor="G_LM", operator=state["operators"][0]).read()

    grids = [seconds(partial(grid, TEXT + " x" * number)) for number in range(5)]
    return {
        "model": {name: state[name] for name in ("name", "kind", "layers", "heads", "head_dim", "parameters")},
        "seconds": {
            "page": page, "usable": usable, "first token, torch being imported": early, "ready": ready,
            "first token at once": first,
            "switch, first": {name: values[0] for name, values in switches.items()},
            "switch": {name: statistics.median(values[1:]) for name, values in switches.items()},
            "grid": statistics.median(grids),
        },
    }  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
