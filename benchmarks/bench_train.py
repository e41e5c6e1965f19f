"""Training speed and memory of one step on a GPU: learned operator, constant operator, and a Llama of the same size.

    python benchmarks/bench_train.py [--preset v51-110M-1] [--batch 64] [--length 1024] [--steps 40] [--output FILE]

bf16 autocast, AdamW (fused), gradients clipped by value, torch.compile. Before timing, the compiled loss is compared with
the eager one in fp32. The floor is the time of the matrix products alone (6 FLOPs a weight and token, attention and
metric learner counted) at a measured matrix rate.

"trainer" is the learned operator through what `pldr train` runs: the Trainer with its callbacks and log lines, and the
data loader over memory-mapped rows (of random tokens).
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conditions import conditions, record
from transformers import LlamaConfig, LlamaForCausalLM

from pldr import PldrConfig, PldrForCausalLM

# Steps timed at once: like training, the host runs ahead of the device and is waited for only now and then.
BLOCK = 5
# Tokens per second of the published implementation, measured before on such a GPU.
PUBLISHED = {"eager, 32 sequences": 101_000, "compiled": 243_000}


def matrix_rate() -> float:
    """FLOP/s of an 8192³ bf16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def flops_per_token(config, learned: bool, length: int) -> float:
    """Of forward and backward: 6 for every weight of a matrix product, plus causal attention and the metric learner."""
    M, F, D, H, L = (config.hidden_size, config.intermediate_size, 64, config.num_attention_heads,
                     config.num_hidden_layers)  # fmt: skip
    weights = L * (4 * M * M + 3 * M * F) + M * config.vocab_size
    attention = L * 2 * M * length / 2
    operator = 0.0
    if isinstance(config, PldrConfig):
        operator = L * H * D * D  # q G
    if learned:
        R, N, W = config.metric_learner_units, config.metric_learner_glus, config.metric_learner_width
        operator += L * H * (D * D + (D * R * N * 3 * D * W + 2 * D**3) / length)  # qᵀq; the rest once a sequence
    return 6 * (weights + attention + operator)


def measure(make, batch, steps, warmup=6):
    torch.manual_seed(0)
    model = make().cuda().train()
    ids = torch.randint(4, 32000, (batch[0], batch[1]), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        eager = model(input_ids=ids[:2], labels=ids[:2], use_cache=False).loss.item()
    with torch.no_grad():
        whole = sum(model(input_ids=part, labels=part, use_cache=False).loss.item() for part in ids.split(4))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )
    if isinstance(model, PldrForCausalLM):
        for layer in model.model.layers:  # as in training: one graph for all layers
            layer.compile()
        compiled = model
    else:
        compiled = torch.compile(model)
    parameters = list(model.parameters())

    extra = {"return_logits": False} if isinstance(model, PldrForCausalLM) else {}

    def loss_of(inputs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return compiled(input_ids=inputs, labels=inputs, use_cache=False, **extra).loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_value_(parameters, 1.0)
        optimizer.step()
        return loss

    with torch.no_grad():
        first = loss_of(ids).item()
    reference = whole / (batch[0] / 4)
    assert abs(first - reference) < 2e-2 * reference, f"compiled bf16 loss {first}, eager fp32 {reference} ({eager})"
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps // BLOCK):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(BLOCK):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / BLOCK)
    seconds = statistics.median(times)
    return {
        "parameters": model.num_parameters(),
        "seconds_per_step": seconds,
        "spread": max(times) - min(times),
        "tokens_per_second": batch[0] * batch[1] / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss_compiled_bf16": first,
        "loss_eager_fp32": reference,
        "flops_per_token": flops_per_token(model.config, getattr(model.config, "operator", "") == "learned", batch[1]),
    }


def measure_trainer(preset, batch, steps, warmup=20):
    from transformers import PrinterCallback, TrainerCallback

    from pldr.data.rows import TokenRows, collate
    from pldr.recipe import DataRecipe, OptimizationRecipe, Recipe
    from pldr.training.trainer import PldrTrainer, training_arguments

    torch.manual_seed(0)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= warmup and (state.global_step - warmup) % steps == 0:
                torch.cuda.synchronize()
                if not times:
                    torch.cuda.reset_peak_memory_stats()
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        count = batch[0] * (warmup + steps)
        np.random.default_rng(0).integers(4, 32000, count * (batch[1] + 1), np.uint16).tofile(folder / "tokens.bin")
        facts = {"rows": count, "row_length": batch[1] + 1, "dtype": "uint16", "short_rows": []}
        (folder / "facts.json").write_text(json.dumps(facts))
        recipe = Recipe(
            str(folder), DataRecipe(["-"]), log_steps=10, report_to=[],
            optimization=OptimizationRecipe(steps=warmup + steps, batch_size=batch[0], warmup_steps=10, learning_rate=1e-4),
        )  # fmt: skip
        model = PldrForCausalLM(PldrConfig.preset(preset))
        for layer in model.model.layers:
            layer.compile()
        trainer = PldrTrainer(
            recipe, folder, model=model, args=training_arguments(recipe, folder), train_dataset=TokenRows(folder),
            data_collator=partial(collate, pad_token_id=0, length=None), callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = (times[1] - times[0]) / steps
    return {
        "parameters": model.num_parameters(),
        "seconds_per_step": seconds,
        "tokens_per_second": batch[0] * batch[1] / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "flops_per_token": flops_per_token(model.config, True, batch[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="v51-110M-1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=["learned", "trainer", "constant", "llama"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    config = PldrConfig.preset(arguments.preset)
    same_shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size",
                  "num_hidden_layers", "num_attention_heads", "max_position_embeddings")}  # fmt: skip
    makers = {
        "learned": lambda: PldrForCausalLM(config),
        "constant": lambda: PldrForCausalLM(PldrConfig.preset(arguments.preset, operator="constant")),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**same_shape, attn_implementation="sdpa")),
    }
    rate = matrix_rate()
    rows = {}
    for name in arguments.only:
        batch = (arguments.batch, arguments.length)
        if name == "trainer":
            rows[name] = measure_trainer(arguments.preset, batch, arguments.steps)
        else:
            rows[name] = measure(makers[name], batch, arguments.steps)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    for row in rows.values():
        row["floor_seconds_per_step"] = row["flops_per_token"] * arguments.batch * arguments.length / rate
        if "llama" in rows:
            row["ratio_to_llama"] = row["tokens_per_second"] / rows["llama"]["tokens_per_second"]
    if {"learned", "trainer"} <= rows.keys():
        rows["trainer"]["ratio_to_bare_step"] = (
            rows["trainer"]["tokens_per_second"] / rows["learned"]["tokens_per_second"]
        )
    result = {
        "benchmark": "train", "preset": arguments.preset, "batch": arguments.batch, "length": arguments.length,
        "precision": "bf16 autocast", "rows": rows, "published_tokens_per_second": PUBLISHED,
        "matrix_flops_per_second": rate,
    } | conditions("cuda")  # fmt: skip
    print(f"{'':>9} {'tokens/s':>10} {'ms/step':>8} {'floor ms':>9} {'GiB':>6} {'× llama':>8}")
    for name, row in rows.items():
        print(f"{name:>9} {row['tokens_per_second']:10,.0f} {1e3 * row['seconds_per_step']:8.1f} "
              f"{1e3 * row['floor_seconds_per_step']:9.1f} {row.get('peak_memory_gib', float('nan')):6.1f} "
              f"{row.get('ratio_to_llama', float('nan')):8.2f}")  # fmt: skip
    record(result, arguments.output)


if __name__ == "__main__":
    main()
