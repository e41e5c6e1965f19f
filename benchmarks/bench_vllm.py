"""Tokens a second in vLLM, of one request and of many at once.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/bench_vllm.py [MODEL] [--requests 1 16 64] [--new 64] [--output FILE]

Greedy continuations of equal length, without the cache of prefixes, in float32. They must be those of `pldr.Engine`, or nothing is
measured. A learned operator is frozen first. `make test-vllm` makes an environment that has vLLM.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conditions import conditions, record

from pldr import HELD_OUT, STORIES, Engine, freeze_checkpoint, load_model, load_tokenizer


def beginnings(model: Path, count: int) -> list[list[int]]:
    """Token ids of the first 16 tokens of stories that the model has not seen."""
    tokenizer = load_tokenizer(model)
    with HELD_OUT.open(encoding="utf-8") as lines:
        stories = [json.loads(line)["text"] for line in lines]
    ids = [token for story in stories for token in tokenizer(story)["input_ids"]]
    return [ids[start : start + 16] for start in range(0, 40 * count, 40)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: Path, requests: list[int], new: int, repeats: int) -> dict[str, Any]:
    """
    Raises:
        SystemExit: vLLM's continuations are others than the engine's.
    """
    import vllm

    prompts = beginnings(model, max(requests))
    completions = Engine(load_model(model)).generate(prompts, max_new_tokens=new, ignore_end=True)
    expected = [completion.token_ids for completion in completions]
    server = vllm.LLM(
        str(model),
        dtype="float32",
        max_num_seqs=max(requests),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.05,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

    def by_vllm(count: int) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[:count]]
        return [list(done.outputs[0].token_ids) for done in server.generate(asked, greedy, use_tqdm=False)]

    if by_vllm(max(requests)) != expected:
        raise SystemExit("vLLM's continuations are not those of the engine")
    rates = {}
    for count in requests:
        per_second = [count * new / seconds(lambda count=count: by_vllm(count)) for _ in range(repeats)]
        rates[count] = {"tokens/s": statistics.median(per_second), "all": per_second}
    return {"rates": rates, "new": new, "vllm": vllm.__version__, **conditions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=STORIES)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model
        if load_model(model).config.operator == "learned":
            model = Path(scratch) / model.name
            freeze_checkpoint(arguments.model, model, prompts="Once upon a time there was a little dog.")
        record(measure(model, arguments.requests, arguments.new, arguments.repeats), arguments.output)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
