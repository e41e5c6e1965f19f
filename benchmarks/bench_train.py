"""Training speed and memory on a GPU: learned, constant and identity operators, beside a Llama of the same size.

    python benchmarks/bench_train.py [--preset v51-110M-1] [--batches 64 32] [--length 1024] [--only NAME …] [--output FILE]

A step is bf16 autocast, forward, backward, gradients clipped by value, AdamW (fused). Before a model is timed, its compiled
loss is compared with the eager one in float32. The rows:

- learned, constant, identity: the preset with such an operator, layers compiled, forward and backward as one CUDA graph (identity:
  not trained);
- llama: transformers' with the preset's width, layers and heads, a feed-forward width that is a multiple of 64, compiled layer by
  layer, attention with `is_causal` and no mask, and our loss without whole logits; llama-liger: with Liger's kernels in place of compilation, where
  that package is installed;
- trainer: the learned operator through what `pldr train` runs: the Trainer with its callbacks and log lines, and the data
  loader over memory-mapped rows (of random tokens);
- plain: the learned operator without the kernels of `pldr.ops` for training, compiled as well;
- stories: the model that ships with pldr at its recipe's batch; small: that of `pldr reproduce --size small`, through the Trainer.

Utilisation is the arithmetic of the matrix products (6 FLOPs a weight and token, attention and metric learner counted; nothing
that is computed twice) over the time, as a share of a measured matrix rate. With `--curves` the losses of 200 steps are
compared, see `curves`.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conditions import conditions, record
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from pldr import STORIES, PldrConfig, PldrForCausalLM
from pldr.files import write_json
from pldr.ops import aligned
from pldr.ops.cross_entropy import linear_cross_entropy
from pldr.training.graph import GraphedStep
from pldr.training.trainer import compile_layers

ROWS = [
    "learned",
    "trainer",
    "constant",
    "identity",
    "plain",
    "llama",
    "llama-liger",
    "stories",
    "small",
]
SMALL = ["stories", "small"]
# Steps timed at once: like training, the host runs ahead of the device and is waited for only now and then.
BLOCK = 10
# Tokens per second of the published implementation, measured before on an H100.
PUBLISHED = {"eager, 32 sequences": 101_000, "compiled": 243_000}
# Parts of a step, by the names of their kernels; the first that fits counts.
PARTS = {
    "attention": r"cudnn|flash|fmha", "metric learner": r"_learner|CatArray", "q G_LM and qᵀq": r"_operator_product|_operator_backward",
    "rotation": r"_rotate", "gated unit": r"_silu_product", "loss": r"_softmax_gradient", "layer norms": r"_norm|layer_norm",
    "matrix products": r"nvjet|gemm|cutlass|splitK|cublas", "optimiser, clipping": r"multi_tensor_apply",
}  # fmt: skip

Loss = Callable[[torch.Tensor], torch.Tensor]


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


def flops_per_token(config: Any, length: int) -> float:
    """Of forward and backward: 6 for every weight of a matrix product, plus causal attention and the metric learner."""
    M, F, L, H = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads
    D = M // H
    weights = L * (4 * M * M + 3 * M * F) + M * config.vocab_size
    operator = 0.0
    if isinstance(config, PldrConfig):
        operator = L * H * D * D  # q G
    if getattr(config, "operator", "") == "learned":
        R, N, W = config.metric_learner_units, config.metric_learner_glus, config.metric_learner_width
        operator += L * H * (D * D + (D * R * N * 3 * D * W + 2 * D**3) / length)  # qᵀq; the rest once a sequence
    return 6 * (weights + L * 2 * M * length / 2 + operator)


# --- models ---------------------------------------------------------------------------------------------------------


def make_pldr(config: PldrConfig) -> tuple[PldrForCausalLM, Loss]:
    model = PldrForCausalLM(config).cuda().train()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss

    return model, loss


def make_llama(config: PldrConfig, *, liger: bool = False) -> tuple[LlamaForCausalLM, Loss]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    assert config.intermediate_size is not None
    width = -(-config.intermediate_size // 64) * 64
    shape = {name: getattr(config, name) for name in names} | {"intermediate_size": width}
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).cuda().train()
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
        return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    no_bias = torch.zeros(config.vocab_size, device="cuda")

    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        return linear_cross_entropy(hidden, model.lm_head.weight, no_bias, targets)[0] / targets.numel()

    return model, loss


def compile_model(model: Any) -> None:
    if isinstance(model, PldrForCausalLM):
        compile_layers(model)
    else:
        for layer in model.model.layers:
            layer.compile()


# --- one step -------------------------------------------------------------------------------------------------------


class Step:
    """Forward, backward, clipping and optimiser, as a function of token ids that gives the loss."""

    def __init__(self, model: torch.nn.Module, loss: Loss, rate: float = 1e-4, *, graph: bool = False) -> None:
        self.loss, self.parameters = loss, [p for p in model.parameters() if p.requires_grad]
        self.gradients: Any = GraphedStep(self.compute, self.parameters) if graph else self.compute
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
        )

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        (loss,) = self.gradients({"ids": ids})
        torch.nn.utils.clip_grad_value_(self.parameters, 1.0)
        self.optimizer.step()
        return loss

    def compute(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.loss(inputs["ids"])
        loss.backward()
        return (loss.detach(),)


def measure(
    make: Callable[[], tuple[Any, Loss]],
    shape: tuple[int, int],
    steps: int,
    *,
    compiled: bool = True,
    graph: bool = False,
    warmup: int = 6,
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, loss_of = make()
    ids = torch.randint(4, model.config.vocab_size, shape, device="cuda")
    with torch.no_grad():  # before anything is compiled, in parts that fit
        parts = ids.split(4)
        reference = sum(loss_of(part).item() * len(part) for part in parts) / len(ids) if shape[0] % 4 == 0 else None
    if compiled:
        compile_model(model)
    step = Step(model, loss_of, graph=graph)
    first = step(ids).item()
    torch.cuda.reset_peak_memory_stats()
    if reference is not None:
        assert abs(first - reference) < 2e-2 * reference, f"loss in bf16 {first}, eager in float32 {reference}"
    for _ in range(warmup):
        step(ids)
    torch.cuda.synchronize()
    times = []
    for _ in range(steps // BLOCK):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(BLOCK):
            step(ids)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / BLOCK)
    seconds = statistics.median(times)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "batch": shape[0], "length": shape[1],
        "seconds_per_step": seconds, "fastest": min(times), "slowest": max(times),
        "tokens_per_second": shape[0] * shape[1] / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss_bf16": first, "loss_eager_fp32": reference,
        "flops_per_token": flops_per_token(model.config, shape[1]), "milliseconds_by_part": parts_of(partial(step, ids)),
    }  # fmt: skip


def parts_of(step: Callable[[], Any], count: int = 3) -> dict[str, float]:
    """Milliseconds of a step by part, by the profiler, which slows the whole down a little."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, event.name)), "other")
        found[part] += event.self_device_time_total / 1e3 / count
    found["kernels"] = len(events) / count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_trainer(
    config: PldrConfig, shape: tuple[int, int], steps: int, *, graph: bool, warmup: int = 20
) -> dict[str, Any]:
    from bench_parallel import make_clock, token_rows
    from transformers import PrinterCallback

    from pldr.data.rows import TokenRows, collate
    from pldr.recipe import DataRecipe, OptimizationRecipe, Recipe
    from pldr.training.trainer import PldrTrainer, training_arguments

    torch.manual_seed(0)
    clock = make_clock(warmup, BLOCK)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows = TokenRows(token_rows(folder, shape[0] * (warmup + steps), shape[1], config.vocab_size))
        optimization = OptimizationRecipe(
            steps=warmup + steps, batch_size=shape[0], warmup_steps=10, learning_rate=1e-4,
            cuda_graph="auto" if graph else "never",
        )  # fmt: skip
        data = DataRecipe(["-"], sequence_length=shape[1])
        recipe = Recipe(work, data, log_steps=10, report_to=[], optimization=optimization)
        model = PldrForCausalLM(config)
        compile_layers(model)
        trainer = PldrTrainer(
            recipe, folder, model=model, args=training_arguments(recipe, folder), train_dataset=rows,
            data_collator=partial(collate, pad_token_id=0, length=None), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    times = [(b - a) / BLOCK for a, b in zip(clock.times, clock.times[1:], strict=False)]
    seconds = statistics.median(times)
    return {
        "parameters": model.num_parameters(), "batch": shape[0], "length": shape[1], "seconds_per_step": seconds,
        "fastest": min(times), "slowest": max(times), "tokens_per_second": shape[0] * shape[1] / seconds,
        "flops_per_token": flops_per_token(config, shape[1]),
    }  # fmt: skip


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The operations of `pldr.ops` for training, but for the loss, in plain PyTorch."""
    from pldr.ops import bilinear, metric_learner, norm, projections

    with contextlib.ExitStack() as stack:
        for module in (aligned, bilinear, metric_learner, norm, projections):
            stack.enter_context(mock.patch.object(module, "training_dtype", no_dtype))
        yield


def no_dtype(x: torch.Tensor) -> None:
    """In place of `training_dtype`: a function, which a compiler can read."""


# --- loss curves ----------------------------------------------------------------------------------------------------


def curves(config: PldrConfig, steps: int = 200) -> dict[str, Any]:
    """Losses of so many steps on the excerpts that ship with pldr: with the kernels, without, and without from weights that were
    moved by 1e-7 of their size. Those with the kernels have to be as near to those without as the third.
    """
    from pldr import HELD_OUT, load_tokenizer

    tokenizer = load_tokenizer(STORIES)
    text = " ".join(json.loads(line)["text"] for line in HELD_OUT.open(encoding="utf-8"))
    ids = torch.tensor(tokenizer(text)["input_ids"], device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.randint(0, len(ids) - 257, (steps, 16), device="cuda", generator=generator)
    batches = ids[starts[..., None] + torch.arange(256, device="cuda")]

    def run(perturbed: bool = False) -> torch.Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, loss = make_pldr(config)
        if perturbed:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 1e-7 * torch.randn_like(p))
        compile_layers(model)
        step = Step(model, loss, rate=3e-4)
        return torch.stack([step(batch) for batch in batches])

    fused = run()
    with without_kernels():
        plain, perturbed = run(), run(perturbed=True)
    far, spread = (fused - plain).abs(), (perturbed - plain).abs()
    return {"steps": steps, "first": plain[0].item(), "last": plain[-1].item(),
            "mean_difference": far.mean().item(), "mean_of_perturbed": spread.mean().item(),
            "largest_difference": far.max().item(), "largest_of_perturbed": spread.max().item()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v51-110M-1")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--no-graph", action="store_true", help="our models without CUDA graphs")
    parser.add_argument("--curves", action="store_true", help="compare the losses of 200 steps, too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    presets = {name: PldrConfig.preset(arguments.preset, **fields) for name, fields in {
        "learned": {}, "constant": {"operator": "constant", "operator_init": "uniform"},
        "identity": {"operator": "constant", "operator_init": "identity", "operator_trainable": False},
    }.items()}  # fmt: skip
    rate = matrix_rate()
    result: dict[str, Any] = {
        "benchmark": "train",
        "preset": arguments.preset,
        "precision": "bf16 autocast",
        "rows": [],
    }
    for batch in arguments.batches:
        for name in arguments.only:
            config, shape = presets.get(name, presets["learned"]), (batch, arguments.length)
            if name == "llama-liger" and importlib.util.find_spec("liger_kernel") is None:
                continue
            if name in ("trainer", "plain", *SMALL) and batch != arguments.batches[0]:
                continue
            if name in SMALL:
                config, shape = small_config(name), (64, 256)
            row = {"name": name} | measure_row(name, config, shape, arguments.steps, graph=not arguments.no_graph)
            row |= {"utilisation": row["flops_per_token"] * row["tokens_per_second"] / rate}
            result["rows"].append(row)
            print_row(row)
            if arguments.output is not None:  # what is measured is there if the rest is not
                write_json(arguments.output, result, indent=1)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
    for row in result["rows"]:
        llama = [r for r in result["rows"] if r["name"] == "llama" and r["batch"] == row["batch"]]
        if llama and row["name"] not in SMALL:
            row["ratio_to_llama"] = row["tokens_per_second"] / llama[0]["tokens_per_second"]
    by_name = {row["name"]: row for row in result["rows"] if row["batch"] == arguments.batches[0]}
    if {"learned", "trainer"} <= by_name.keys():
        by_name["trainer"]["ratio_to_bare_step"] = (
            by_name["trainer"]["tokens_per_second"] / by_name["learned"]["tokens_per_second"]
        )
    if arguments.curves:
        result["curves"] = curves(presets["learned"])
    result |= {"published_tokens_per_second": PUBLISHED, "matrix_flops_per_second": rate} | conditions("cuda")
    record(result, arguments.output)


def small_config(name: str) -> PldrConfig:
    from pldr.study.lab import SIZES

    if name == "stories":
        return PldrConfig.from_pretrained(STORIES)
    return PldrConfig(**SIZES["small"].recipe["model"]["config"], vocab_size=6144)


def measure_row(name: str, config: PldrConfig, shape: tuple[int, int], steps: int, *, graph: bool) -> dict[str, Any]:
    if name in ("trainer", "small"):
        return measure_trainer(config, shape, steps, graph=graph)
    if name.startswith("llama"):
        liger = name == "llama-liger"
        with mock.patch.dict(vars(modeling_llama)):  # Liger exchanges its classes for every Llama to come
            return measure(partial(make_llama, config, liger=liger), shape, steps, compiled=not liger)
    with without_kernels() if name == "plain" else contextlib.nullcontext():
        return measure(partial(make_pldr, config), shape, steps, graph=graph)


def print_row(row: dict[str, Any]) -> None:
    memory = f"{row['peak_memory_gib']:5.1f} GiB, " if "peak_memory_gib" in row else ""  # not of the Trainer's graphs
    print(f"{row['name']:>11} {row['batch']:>3} × {row['length']}: {row['tokens_per_second']:10,.0f} tokens/s, "
          f"{1e3 * row['seconds_per_step']:7.2f} ms, {memory}utilisation {row['utilisation']:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
