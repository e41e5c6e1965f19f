"""Decoding speed on a GPU: the engine, `generate`, and a Llama of the same size in the same ways.

    python benchmarks/bench_decode.py [--batches 1 8 32 128] [--peers 1 32 128] [--output FILE]

Weights are random, bf16, of the 110M shape: speed does not depend on them. Before anything is timed, the engine is driven
along forced tokens: its error against the model in fp32 must be no larger than that of the same model in plain bf16, by a
bootstrap over prompts; a benchmark of a wrong answer stops there.

Milliseconds per token count from the first token on, the median of the repeats, host and choice of the token included;
"first" is the time of the first token, the prompt included. Of the engine both are taken in one run; of `generate`, which
does not tell when its first token is there, from runs of one and of all tokens. The share of the bandwidth is what a step
must read, weights and cache, over what a copy would move in that time, at the copy bandwidth measured here.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import conditions
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pldr import PldrConfig, PldrForCausalLM, freeze, make_cache
from pldr.engine import Engine, Options
from pldr.engine.decoder import STEPS, Decoder
from pldr.operator import factor
from pldr.ops import decode

PROMPT, NEW, CONTEXT = 128, 256, 1024
# Of the same size at its best: 2,432 is the next width of the gated unit that matrix units like.
LLAMA = {
    "vocab_size": 32000, "hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 5,
    "num_attention_heads": 14, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 1 GiB, read and write counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), 10)


def prompts(batch: int, tokens: int = PROMPT) -> torch.Tensor:
    return torch.randint(4, 32000, (batch, tokens), generator=torch.Generator().manual_seed(batch)).cuda()


# --- correct first --------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate(exact: PldrForCausalLM, plain: PldrForCausalLM, batch: int = 16, steps: int = 24) -> dict[str, float]:
    """Relative errors of logits along forced tokens against fp32, of the engine and of plain bf16.

    Raises:
        SystemExit: the engine's is the larger one.
    """
    given, forced = prompts(batch, 48), prompts(batch + 1, steps)[:batch]

    def by_model(model: PldrForCausalLM) -> torch.Tensor:
        cache = make_cache(model.config)
        logits = [model(given, past_key_values=cache).logits[:, -1].float()]
        return torch.stack(
            logits + [model(forced[:, i : i + 1], past_key_values=cache).logits[:, -1].float() for i in range(steps)], 1
        )

    def by_engine(rows: int) -> torch.Tensor:
        found = []
        for start in range(0, batch, rows):
            decoder = Decoder(plain, rows, CONTEXT, graphs=False)
            logits = [decoder.prefill(0, given[start : start + rows].tolist()).float()]
            decoder.state.positions[:] += 1
            for i in range(steps):
                decoder.state.tokens[:] = forced[start : start + rows, i]
                logits.append(decoder.logits(rows).float())
                decoder.state.positions[:] += 1
            found.append(torch.stack(logits, 1))
        return torch.cat(found)

    true = by_model(exact)

    def errors(found: torch.Tensor) -> torch.Tensor:
        return ((found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).cpu()

    of_plain = errors(by_model(plain))
    result = {"plain_bf16": float(of_plain.mean())}
    draws = torch.randint(batch, (2000, batch), generator=torch.Generator().manual_seed(0))
    for rows in (1, batch):
        of_engine = errors(by_engine(rows))
        upper = float((of_engine - of_plain)[draws].mean(1).quantile(0.95))
        result |= {f"engine_batch_{rows}": float(of_engine.mean()), f"upper_95_of_difference_batch_{rows}": upper}
        if not upper <= 0:
            raise SystemExit(f"the engine's error is larger than plain bf16's: {result}")
    return result


# --- rows -----------------------------------------------------------------------------------------------------------


def row_of(name: str, batch: int, per_token: float, first: float | None = None) -> dict[str, object]:
    """A row of the record, from seconds; also printed."""
    row = {"what": name, "batch": batch, "ms_per_token": per_token * 1e3, "tokens_per_second": batch / per_token}
    if first is not None:
        row["first_ms"] = first * 1e3
    print(
        ", ".join(f"{key}: {value:,.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
        flush=True,
    )
    gc.collect()
    torch.cuda.empty_cache()
    return row


def engine_row(
    name: str, model: PldrForCausalLM, batch: int, repeats: int, tokens: int = PROMPT, new: int = NEW
) -> dict[str, object]:
    engine = Engine(model, max_batch=batch)
    given, options = prompts(batch, tokens).tolist(), Options(max_new_tokens=new, ignore_end=True)
    firsts, rest = [], []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        requests = [engine.submit(prompt, options) for prompt in given]
        engine.join()
        first = time.perf_counter()
        while requests[0].finish_reason is None:
            engine.step(STEPS)
        firsts.append(first - start)
        rest.append((time.perf_counter() - first) / (new - 1))
    row = row_of(name, batch, statistics.median(rest[1:]), statistics.median(firsts[1:]))
    decoder = engine.decoder
    read = sum(
        w.numel()
        for layer in decoder.layers
        for w in (layer.qkv.weight, layer.output.weight, *(p.weight for p in layer.unit))
    )
    cached = sum((k[0, :, 0].numel() + v[0, :, 0].numel()) for k, v in zip(decoder.keys, decoder.values, strict=True))
    operators = sum(G.numel() if G.dim() == 3 else batch * G[0].numel() for G in decoder.operators)
    total = read + decoder.head.weight.numel() + operators + batch * (tokens + new / 2) * cached
    return row | {"bytes_per_step": 2 * total, "prompt": tokens, "new": new}


def generate_row(name: str, model: torch.nn.Module, batch: int, repeats: int, **settings: object) -> dict[str, object]:
    given = prompts(batch)
    model.generation_config.eos_token_id = None

    def run(new: int) -> object:
        return model.generate(
            given, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **settings
        )

    first, whole = seconds(lambda: run(1), repeats), seconds(lambda: run(NEW), repeats)
    return row_of(name, batch, (whole - first) / (NEW - 1), first)


def graph_row(name: str, model: torch.nn.Module, batch: int, repeats: int) -> dict[str, object]:
    """A compiled step in a CUDA graph of its own, the most probable token included: what a user can write by hand."""
    cache = StaticCache(model.config, PROMPT + NEW)
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    with torch.inference_mode():
        model(prompts(batch), past_key_values=cache)
        position = torch.full((batch, 1), PROMPT, device="cuda")

        def step() -> None:
            logits = compiled(token, past_key_values=cache, position_ids=position).logits
            token.copy_(logits.argmax(-1))
            position.add_(1)

        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replays = (NEW - 8) // (repeats + 1)  # the cache counts them all
        per_token = seconds(lambda: [graph.replay() for _ in range(replays)], repeats) / replays
    torch._dynamo.reset()
    return row_of(name, batch, per_token)


def paths(model: PldrForCausalLM, repeats: int) -> list[dict[str, object]]:
    """Milliseconds of a step by how its products are done: what `ops.decode.FEW` and `SOME` were chosen from."""
    rows, chosen = [], (decode.FEW, decode.SOME)
    for batch in (1, 2, 3, 4, 8, 16, 32, 64, 96, 128, 192, 256):
        row: dict[str, object] = {"batch": batch}
        for name, limits in {"few": (batch, 0), "some": (0, batch), "many": (0, 0)}.items():
            if name == "few" and batch > 4:
                continue
            decode.FEW, decode.SOME = limits
            decoder = Decoder(model, batch, CONTEXT)

            def work(decoder: Decoder = decoder, batch: int = batch) -> None:
                decoder.state.positions[:] = 240
                decoder.run(batch, 32, draw=False)

            row[name] = seconds(work, repeats) / 32 * 1e3
            del decoder
            torch.cuda.empty_cache()
        print(row, flush=True)
        rows.append(row)
    decode.FEW, decode.SOME = chosen
    return rows


def with_rank(model: PldrForCausalLM, rank: int) -> PldrForCausalLM:
    """Keys kept in `rank` dimensions. Speed does not depend on the factors: they are the identity's first columns."""
    head_dim, heads = model.config.head_dim, model.config.num_attention_heads
    columns = torch.eye(head_dim)[:, :rank].expand(heads, -1, -1)
    return factor(model, [(columns, columns)] * model.config.num_hidden_layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--peers", type=int, nargs="*", default=[1, 32, 128], help="batches of the other rows")
    parser.add_argument("--compiled", type=int, nargs="*", default=[1], help="batches of the rows that are compiled")
    parser.add_argument("--rank", type=int, default=16, help="of the factored operator's keys")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    learned32 = PldrForCausalLM(PldrConfig.preset("v51-110M-1")).eval().cuda()
    frozen32 = freeze(copy.deepcopy(learned32), prompts(1, 256))
    learned, frozen = copy.deepcopy(learned32).bfloat16(), copy.deepcopy(frozen32).bfloat16()
    factored = with_rank(copy.deepcopy(frozen32), arguments.rank).bfloat16()
    record: dict[str, object] = {**conditions("cuda"), "copy_bandwidth": copy_bandwidth(), "gate": {}, "rows": []}

    def save() -> None:
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")

    gates, rows = record["gate"], record["rows"]
    assert isinstance(gates, dict)
    assert isinstance(rows, list)
    for name, exact, plain in (("frozen", frozen32, frozen), ("learned", learned32, learned)):
        gates[name] = gate(exact, plain)
        print(name, gates[name], flush=True)
    for batch in arguments.batches:
        for name, model in (("frozen", frozen), ("learned, KV+G", learned), ("factored", factored)):
            rows.append(engine_row(f"engine, {name}", model, batch, arguments.repeats))
            save()
    for name, model in (("frozen", frozen), ("factored", factored)):
        rows.append(engine_row(f"engine, {name}, at context 1024", model, 128, arguments.repeats, CONTEXT - 65, 64))
    for batch in arguments.peers:
        rows.append(generate_row("generate, dynamic cache", frozen, batch, 1))
        save()
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval().cuda().bfloat16()
    for batch in arguments.peers:
        rows.append(generate_row("Llama: generate, dynamic cache", llama, batch, 1))
        save()
    for batch in arguments.compiled:
        rows.append(graph_row("Llama: compiled step in a CUDA graph", llama, batch, arguments.repeats))
        rows.append(graph_row("compiled step in a CUDA graph", frozen, batch, arguments.repeats))
        save()
        rows.append(
            generate_row("Llama: generate, static cache, compiled", llama, batch, 1, cache_implementation="static")
        )
        rows.append(generate_row("generate, static cache, compiled", frozen, batch, 1, cache_implementation="static"))
        save()
    for row in rows:
        if "bytes_per_step" in row:
            row["share_of_bandwidth"] = row["bytes_per_step"] / row["ms_per_token"] * 1e3 / record["copy_bandwidth"]
    record["paths"] = paths(frozen, arguments.repeats)
    save()


if __name__ == "__main__":
    main()
