"""Decoding speed of the four cache modes and the frozen model.

    python benchmarks/bench_cache.py [--preset v51-110M-1] [--prompt 128] [--new 64] [--device cpu] [--output FILE]

The published implementation, measured on two CPU cores in fp32 at the same sizes: no cache 1.39 s per token at 130 tokens,
KV 72 ms, KV+G 69 ms. Weights are random: speed does not depend on them.

Before anything is timed, the modes are driven along the same forced tokens and their logits compared; a benchmark of a
wrong answer stops there. The floor is the time to read every weight once a token at the measured memory bandwidth.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from conditions import conditions, record

from pldr import PldrConfig, PldrForCausalLM, freeze, make_cache

MODES = {"none": (False, False), "g": (False, True), "kv": (True, False), "kv+g": (True, True)}
# Seconds per token of the published implementation (two cores, fp32).
PUBLISHED = {"none": 1.39, "kv": 0.072, "kv+g": 0.069}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.inference_mode()
def decode(model, prompt, tokens, kv, g):
    """Feed forced tokens one at a time after the prompt; returns the logits of each step and its seconds."""
    cache = make_cache(model.config, kv=kv, g=g)
    device = str(model.device)
    model(prompt, past_key_values=cache, use_cache=kv, logits_to_keep=1)
    seen, logits, seconds = prompt, [], []
    for i in range(tokens.shape[1]):
        new = tokens[:, i : i + 1]
        seen = torch.cat([seen, new], 1)
        synchronize(device)
        start = time.perf_counter()
        step = model(new if kv else seen, past_key_values=cache, use_cache=kv, logits_to_keep=1)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        logits.append(step.logits[:, -1])
    return torch.stack(logits), seconds


def bandwidth(device: str) -> float:
    """Bytes per second of a plain read of 1 GB."""
    data = torch.ones(250_000_000, device=device)
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="v51-110M-1")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-new", type=int, default=4, help="tokens to time in the modes without a KV-cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig.preset(arguments.preset)).eval().to(arguments.device)
    prompt = torch.randint(4, 32000, (1, arguments.prompt), device=arguments.device)
    tokens = torch.randint(4, 32000, (1, arguments.new), device=arguments.device)
    frozen = freeze(copy.deepcopy(model), prompt)

    # Correct first: with G_LM from the prompt in every mode, the logits are those of the frozen model's full forward.
    with torch.inference_mode():
        check = frozen(torch.cat([prompt, tokens], 1), use_cache=False).logits[0, arguments.prompt :]
    for kv, g in ((True, True), (True, False), (False, True)):
        count = arguments.new if kv else arguments.slow_new
        error = (decode(model, prompt, tokens[:, :count], kv, g)[0][:, 0] - check[:count]).abs().max().item()
        assert error < 1e-3, f"kv={kv} g={g}: logits differ by {error}"

    rows = {}
    for name, running, (kv, g) in [*((n, model, m) for n, m in MODES.items()), ("frozen", frozen, (True, False))]:
        count = arguments.new if kv else arguments.slow_new
        decode(running, prompt, tokens[:, :2], kv, g)
        runs = [statistics.median(decode(running, prompt, tokens[:, :count], kv, g)[1])
                for _ in range(arguments.repeats)]  # fmt: skip
        rows[name] = {"seconds_per_token": statistics.median(runs), "spread": max(runs) - min(runs)}
    for name, row in rows.items():
        row["tokens_per_second"] = 1 / row["seconds_per_token"]
        row["speed_up_over_no_cache"] = rows["none"]["seconds_per_token"] / row["seconds_per_token"]
        if arguments.device == "cpu" and arguments.preset == "v51-110M-1" and name in PUBLISHED:
            row["speed_up_over_published"] = PUBLISHED[name] / row["seconds_per_token"]

    # Read at every cached step: all but the embedding table, of which one row is read.
    weights = sum(p.numel() * 4 for n, p in frozen.named_parameters() if "embed_tokens" not in n)
    rate = bandwidth(arguments.device)
    result = {
        "benchmark": "cache",
        "preset": arguments.preset, "prompt": arguments.prompt, "new": arguments.new, "dtype": "float32",
        "modes": rows,
        "floor_seconds_per_token": weights / rate, "bandwidth_bytes_per_second": rate,
    } | conditions(arguments.device)  # fmt: skip
    print(f"{'mode':>8} {'ms/token':>9} {'tokens/s':>9} {'× none':>8} {'× published':>12}")
    for name, row in rows.items():
        published = f"{row['speed_up_over_published']:.1f}" if "speed_up_over_published" in row else ""
        print(f"{name:>8} {1e3 * row['seconds_per_token']:9.1f} {row['tokens_per_second']:9.1f} "
              f"{row['speed_up_over_no_cache']:8.1f} {published:>12}")  # fmt: skip
    print(f"floor of a cached step (weights read once): {1e3 * result['floor_seconds_per_token']:.1f} ms")
    record(result, arguments.output)


if __name__ == "__main__":
    main()
