"""Training on two GPUs of one machine, measured: same losses, speed, checkpoints, evaluation.

    python benchmarks/bench_parallel.py [--preset v51-110M-1] [--parts parity checkpoint eval scaling] [--output FILE]

It starts all processes itself: one, or two under torchrun as `torchrun --nproc-per-node 2 -m pldr train` does, and holds no
GPU while they run. Without GPUs they are processes on the CPU, which `--tiny` gives a model and few steps for.

- parity: the loss of two processes is that of one on the same global batch, over 20 steps in float32 without TF32, to 1e-5: of
  operators learned, constant and handed off after 6 steps, with sharding none (DDP), full and hybrid (FSDP2). The bound is that
  of tests/test_distributed.py, and so are the conditions: where the operator is learned, a rate of 1e-5 and AdamW with an
  epsilon of 1, because with its usual one rounding grows into whole steps; where it is constant the usual epsilon, and of a
  preset a rate of 1e-6. A run at half the rate must differ by more than the bound, or the comparison would see nothing.
- checkpoint: a sharded one of two processes goes on in one, and one of one process in two, to the losses of the run
  that was not stopped; `pldr merge` of the sharded one is, bit for bit, the model that was gathered from the run.
- eval: `pldr eval` in two processes has the scores of one, to the last bit: perplexity in every mode and, where the harness is
  installed, a task.
- scaling: tokens per second and peak memory of the Trainer as `pldr train` runs it (bf16, compiled, with its loader and log lines)
  on random tokens, in one process and in two with the same batch each. Efficiency is two processes' speed over twice that
  of one; 0.95 with DDP and 0.92 with FSDP2 is what it should reach.

Every row is printed, and the record written, as soon as it is there. The exit code is 1 if a number is not the same; a speed
below its target is only said.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conditions import conditions, record

from pldr import HELD_OUT, STORIES, PldrConfig, PldrForCausalLM, load_model, load_tokenizer, merge_checkpoint
from pldr.files import read_json, write_json
from pldr.recipe import DataRecipe, DistributedRecipe, ModelRecipe, OptimizationRecipe, Recipe, load_recipe

PARTS = ["parity", "checkpoint", "eval", "scaling"]
BOUND = 1e-5  # of a loss, nats; see tests/test_distributed.py
SHARDINGS = ("none", "full", "hybrid")
TARGETS = {"none": 0.95, "full": 0.92, "hybrid": 0.92}
TINY = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "metric_learner_units": 2,
    "metric_learner_width": 24,
}  # fmt: skip
# Of each operator: fields of the model, those of the optimisation, and the rates of a preset and of the tiny model.
OPERATORS: dict[str, tuple[dict[str, Any], dict[str, Any], float, float]] = {
    "learned": ({}, {"epsilon": 1.0}, 1e-5, 3e-4),
    "constant": ({"operator": "constant", "operator_init": "random"}, {"epsilon": 1e-5}, 1e-6, 1e-3),
    "handed off": ({}, {"epsilon": 1.0, "handoff_step": 6}, 1e-5, 3e-4),
}
# Multicast over NVLink can put GPUs out of service that several machines share, and is not needed.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def main() -> None:
    arguments = parse()
    if arguments.part == "train":
        train_all(arguments.work, arguments.checkpoint)
    elif arguments.part == "scaling":
        for row in scaling_rows(arguments):
            note(arguments, "scaling", row)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            arguments.work = Path(work)
            lead(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v51-110M-1")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, for two processes on a CPU")
    parser.add_argument("--batch", type=int, default=64, help="sequences a process and step, of scaling")
    parser.add_argument("--length", type=int, default=1024, help="tokens of such a sequence")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the first window")
    parser.add_argument("--windows", type=int, default=5, help="times that are taken")
    parser.add_argument("--steps", type=int, default=10, help="of a window")
    both = ["learned", "constant"]
    parser.add_argument("--operators", nargs="+", choices=both, default=both, help="of scaling")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=SHARDINGS, help="of scaling")
    parser.add_argument("--no-compile", action="store_true", help="of scaling")
    parser.add_argument("--no-reshard", action="store_true", help="of scaling: keep sharded weights until the backward")
    parser.add_argument("--data", type=Path, help="benchmarks' published files, of eval; else a few made-up questions")
    parser.add_argument("--work", type=Path, help="folder for runs; some 15 GB with the 110M preset")
    parser.add_argument("--output", type=Path, help="JSON record")
    for name in ("--part", "--checkpoint"):  # of the processes that this one starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the process that starts the others -----------------------------------------------------------------------------


def lead(arguments: argparse.Namespace) -> None:
    """Run the parts in their order, write the record, and exit with 1 if something was not the same."""
    output, arguments.output = arguments.output, arguments.output or arguments.work / "record.json"
    begun = {"benchmark": "parallel", "preset": "tiny" if arguments.tiny else arguments.preset, "bound": BOUND}
    write_json(arguments.output, begun, indent=1)
    parts: dict[Callable[[argparse.Namespace], bool], list[str]] = {
        same_runs: ["parity", "checkpoint"], same_scores: ["eval"], measure_all: ["scaling"],
    }  # fmt: skip
    failed = []
    for run, names in parts.items():
        asked = [name for name in names if name in arguments.parts]
        failed += asked if asked and not run(arguments) else []
    # Last of all, because it asks the GPU for its name.
    result = read_json(arguments.output) | conditions("cuda" if torch.cuda.is_available() else "cpu")
    record(result, output)
    if failed:
        sys.exit(f"not the same, or not run: {', '.join(failed)}")


def start(processes: int, *command: Any, output: Path | None = None, limit: float = 300) -> bool:
    """Run a Python script or module in one process, or in two of torchrun's; its standard output may go to a file.

    Returns:
        Whether it ended well, within `limit` seconds.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    words = [sys.executable, *torchrun, *map(str, command)]
    begun = time.perf_counter()
    with open(output or os.devnull, "w") as stream:
        child = subprocess.Popen(words, env=os.environ | NO_MULTICAST, stdout=stream if output else None)
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            child.terminate()  # which torchrun passes on; it could not pass on a kill
            child.wait()
            code = "none: it took too long"
    say(f"{time.perf_counter() - begun:.0f} s, exit code {code}: {processes} × {' '.join(words[-3:])}")
    return code == 0


def note(arguments: argparse.Namespace, part: str, row: dict[str, Any]) -> bool:
    """Print a row, and add it to the record; whether what it says holds."""
    print(f"{part}: " + ", ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)
    found = read_json(arguments.output)
    found.setdefault(part, []).append(row)
    write_json(arguments.output, found, indent=1)
    return bool(row.get("holds", True))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- parity and checkpoints: runs of `pldr train` -------------------------------------------------------------------


def same_runs(arguments: argparse.Namespace) -> bool:
    """Train in one process and in two, go on from each other's checkpoints, and compare."""
    runs = Runs(arguments)
    parity, checkpoint = ("parity" in arguments.parts), ("checkpoint" in arguments.parts)
    pairs = [(name, sharding) for sharding in SHARDINGS for name in OPERATORS] if parity else [("learned", "full")]
    one = {name: runs.write(name, None) for name in dict(pairs)}
    two = {(name, sharding): runs.write(name, sharding) for name, sharding in pairs}
    halves = {name: runs.half(name) for name in ("learned", "constant")} if parity else {}
    good = runs.train(1, [*one.values(), *halves.values()])
    good &= runs.train(2, list(two.values()))
    for name, recipe in halves.items():
        row = {"operator": name, "what": "one process, half the rate: must differ"} | difference(recipe, one[name])
        good &= note(arguments, "parity", row | {"holds": BOUND < row["largest_difference"] < math.inf})
    for (name, sharding), recipe in two.items() if parity else ():
        row = {"operator": name, "what": "one process and two", "sharding": sharding}
        good &= note(arguments, "parity", row | difference(recipe, one[name]))
    if checkpoint:
        learned = two["learned", "full"]
        onward = {"one process, then two": (2, runs.copy(one["learned"], "full")),
                  "two processes, then one": (1, runs.copy(learned, None))}  # fmt: skip
        for what, (processes, recipe) in onward.items():
            good &= runs.train(processes, [recipe], "checkpoint-10")
            good &= note(arguments, "checkpoint", {"what": what} | difference(recipe, one["learned"]))
        good &= note(arguments, "checkpoint", merged(Path(learned.output), arguments.work / "merged"))
    return good


class Runs:
    """Recipes of 20 steps with four sequences each, on the excerpts that ship with pldr."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.tiny = arguments.work, arguments.tiny
        self.model = ModelRecipe(config=TINY) if arguments.tiny else ModelRecipe(arguments.preset)
        tokenizer = load_tokenizer(STORIES)
        if not arguments.tiny:  # a vocabulary of the preset's size
            missing = PldrConfig.preset(arguments.preset).vocab_size - len(tokenizer)
            tokenizer.add_tokens([f"<unused {number}>" for number in range(missing)])
        tokenizer.save_pretrained(self.work / "tokenizer")
        text = [str(HELD_OUT)]
        self.data = DataRecipe(
            text, text, tokenizer=str(self.work / "tokenizer"), sequence_length=128, cache=str(self.work / "cache")
        )

    def write(self, name: str, sharding: str | None) -> Recipe:
        """Of two processes with this sharding, or of one."""
        fields, optimization, *rates = OPERATORS[name]
        batch = 4 if sharding is None else 2
        return Recipe(
            str(self.work / f"{name}-{sharding}".replace(" ", "-")),
            self.data,
            dataclasses.replace(self.model, config=self.model.config | fields),
            OptimizationRecipe(
                steps=20,
                batch_size=batch,
                warmup_steps=2,
                precision="fp32",
                learning_rate=rates[self.tiny],
                **optimization,
            ),
            DistributedRecipe(sharding or "none"),
            log_steps=1,
            save_steps=10 if name == "learned" and sharding in (None, "full") else None,
            report_to=[],
        )

    def half(self, name: str) -> Recipe:
        """A run of one process that learns half as much, which the comparison has to see."""
        recipe = self.write(name, None)
        recipe.optimization.learning_rate /= 2
        return dataclasses.replace(recipe, output=f"{recipe.output}-half", save_steps=None)

    def copy(self, run: Recipe, sharding: str | None) -> Recipe:
        """A run's folder once more, to go on there with another number of processes."""
        recipe = dataclasses.replace(self.write("learned", sharding), output=f"{run.output}-copy")
        shutil.copytree(run.output, recipe.output)
        return recipe

    def train(self, processes: int, recipes: list[Recipe], checkpoint: str = "") -> bool:
        """All recipes in one start of the processes, from a checkpoint where one is named; whether that went well."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        for number, recipe in enumerate(recipes):
            (folder / f"{number:02}.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
        return start(processes, __file__, "--part=train", f"--work={folder}", f"--checkpoint={checkpoint}")


def train_all(folder: Path, checkpoint: str) -> None:
    """What one of the processes does: each run, one after the other."""
    from transformers.utils import logging

    from pldr.training.run import train

    logging.disable_progress_bar()
    assert not torch.backends.cuda.matmul.allow_tf32, "TF32 would round otherwise in each split of the batch"
    for file in sorted(folder.iterdir()):
        recipe = load_recipe(file)
        begun = time.perf_counter()
        train(recipe, resume=Path(recipe.output) / checkpoint if checkpoint else False, progress=False)
        if os.environ.get("RANK", "0") == "0":
            say(f"{time.perf_counter() - begun:.1f} s: {Path(recipe.output).name}")
        release()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def losses(run: Recipe) -> list[float]:
    """Of each step that the run came to."""
    log = Path(run.output) / "log.jsonl"
    lines = [json.loads(line) for line in log.open()] if log.is_file() else []
    return [line["loss"] for line in lines if "loss" in line]


def difference(run: Recipe, reference: Recipe) -> dict[str, Any]:
    """The largest between the losses of two runs."""
    found, expected = losses(run), losses(reference)
    if not len(found) == len(expected) == run.optimization.steps:
        return {"steps": len(found), "largest_difference": math.inf, "holds": False}
    largest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return {"first_loss": expected[0], "last_loss": expected[-1], "largest_difference": largest,
            "holds": largest <= BOUND}  # fmt: skip


def merged(run: Path, folder: Path) -> dict[str, Any]:
    """`pldr merge` of the last checkpoint, against the model that the run ended with."""
    merge_checkpoint(run / "checkpoint-20", folder)
    shards = len(list((run / "checkpoint-20").glob("model-*-of-2.safetensors")))
    found, expected = load_model(folder).state_dict(), load_model(run).state_dict()
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    return {"what": "merged, and gathered from the run", "shards": shards, "tensors": len(expected),
            "holds": same and shards == 2}  # fmt: skip


# --- evaluation -----------------------------------------------------------------------------------------------------


def same_scores(arguments: argparse.Namespace) -> bool:
    """`pldr eval` of the model that ships with pldr, in one process and in two."""
    text = arguments.work / "text.txt"
    texts = [json.loads(line)["text"] for line in HELD_OUT.open(encoding="utf-8")]
    text.write_text("\n".join(texts)[: 6000 if arguments.tiny else None], encoding="utf-8")
    command = ["-m", "pldr", "eval", STORIES, "--perplexity", text, "--compare", "--json", "--batch-size", 8]
    command += ["--device", "cuda"] * torch.cuda.is_available()
    if importlib.util.find_spec("lm_eval") is not None:
        folder = arguments.data or questions(arguments.work / "questions")
        command += ["--tasks", "piqa", "--data-dir", folder, "--limit", 10 if arguments.tiny else 200]
    found, seconds = [], []
    for processes in (1, 2):
        begun = time.perf_counter()
        file = arguments.work / f"scores-{processes}.json"
        if not start(processes, *command, output=file):
            return False
        seconds.append(time.perf_counter() - begun)
        scores = read_json(file)
        scores.pop("seconds", None)
        found.append(scores)
    row = {"seconds_of_one": seconds[0], "seconds_of_two": seconds[1], "perplexity": found[0]["texts"][str(text)],
           "tasks": found[0].get("tasks"), "holds": found[0] == found[1]}  # fmt: skip
    return note(arguments, "eval", row)


def questions(folder: Path) -> Path:
    """Forty made-up ones in the files of PIQA."""
    (folder / "piqa").mkdir(parents=True)
    words = [word for line in HELD_OUT.open(encoding="utf-8") for word in json.loads(line)["text"].split()]
    rows = [{"goal": " ".join(words[n : n + 6 + n % 5]), "sol1": " ".join(words[n + 20 : n + 24]),
             "sol2": " ".join(words[n + 30 : n + 33])} for n in range(0, 2000, 50)]  # fmt: skip
    (folder / "piqa" / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "piqa" / "valid-labels.lst").write_text("".join(f"{n % 2}\n" for n in range(len(rows))))
    return folder


# --- speed ----------------------------------------------------------------------------------------------------------


def measure_all(arguments: argparse.Namespace) -> bool:
    """One process, then two; each measures all that it can in one start."""
    options = [f"--{name}={getattr(arguments, name)}" for name in
               ("preset", "batch", "length", "warmup", "windows", "steps", "output")]  # fmt: skip
    options += ["--operators", *arguments.operators, "--shardings", *arguments.shardings]
    options += ["--tiny"] * arguments.tiny + ["--no-compile"] * arguments.no_compile
    options += ["--no-reshard"] * arguments.no_reshard
    done = [start(count, __file__, "--part=scaling", f"--work={arguments.work}", *options) for count in (1, 2)]
    return all(done)


def scaling_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of this process, one of one or two: yields where the record is kept, in the first."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    alone = {row["operator"]: row for row in read_json(arguments.output).get("scaling", [])}
    state.wait_for_everyone()  # before the first adds to it
    for sharding in arguments.shardings if state.num_processes > 1 else ("none",):
        for operator in arguments.operators:
            row = {"operator": operator, "sharding": sharding, "processes": state.num_processes}
            row |= measure(arguments, operator, sharding)
            if state.num_processes > 1 and operator in alone:
                efficiency = row["tokens_per_second"] / (2 * alone[operator]["tokens_per_second"])
                row |= {"efficiency": efficiency, "target": TARGETS[sharding]}
            if state.is_main_process:
                yield row
            torch._dynamo.reset()
            release()


def measure(arguments: argparse.Namespace, operator: str, sharding: str) -> dict[str, Any]:
    """Tokens per second of all processes together, and the largest peak of memory among them."""
    from transformers import PrinterCallback

    from pldr.data.rows import TokenRows, collate
    from pldr.training.trainer import PldrTrainer, compile_layers, training_arguments

    torch.manual_seed(0)
    steps = arguments.warmup + arguments.windows * arguments.steps
    config = TINY | {"vocab_size": 32000} if arguments.tiny else {}
    fields = config | {"operator": operator}
    model = PldrForCausalLM(PldrConfig(**fields) if arguments.tiny else PldrConfig.preset(arguments.preset, **fields))
    if not arguments.no_compile:
        compile_layers(model)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        data = token_rows(Path(folder), 2 * arguments.batch * steps, arguments.length)
        recipe = Recipe(
            folder, DataRecipe(["-"], sequence_length=arguments.length), log_steps=10, report_to=[],
            optimization=OptimizationRecipe(
                steps=steps, batch_size=arguments.batch, warmup_steps=min(10, steps), learning_rate=1e-4
            ),
            distributed=DistributedRecipe(sharding, reshard=not arguments.no_reshard),
        )  # fmt: skip
        clock = make_clock(arguments.warmup, arguments.steps)
        trainer = PldrTrainer(
            recipe, Path(folder), model=model, args=training_arguments(recipe, Path(folder)),
            train_dataset=TokenRows(data), data_collator=partial(collate, pad_token_id=0, length=None), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.last_losses()["loss"]
        seconds = [(b - a) / arguments.steps for a, b in zip(clock.times, clock.times[1:], strict=False)]
        tokens = arguments.batch * arguments.length * trainer.args.world_size
        row = {"parameters": sum(p.numel() for p in model.parameters()), "batch": arguments.batch,
               "length": arguments.length, "compiled": not arguments.no_compile, "reshard": not arguments.no_reshard, "last_loss": loss,
               "tokens_per_second": tokens / statistics.median(seconds),
               "slowest": tokens / max(seconds), "fastest": tokens / min(seconds)}  # fmt: skip
        if torch.cuda.is_available():
            peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device="cuda")
            row["peak_memory_gib"] = float(trainer.accelerator.gather(peak).max())
        trainer.accelerator.free_memory()
        trainer.accelerator.wait_for_everyone()  # before a folder goes
    return row


def token_rows(folder: Path, count: int, length: int, vocabulary: int = 32000) -> Path:
    """Rows for so many tokens at once, random ones, as the token cache keeps them."""
    np.random.default_rng(0).integers(4, vocabulary, count * (length + 1), np.uint16).tofile(folder / "tokens.bin")
    facts = {"rows": count, "row_length": length + 1, "dtype": "uint16", "short_rows": []}
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def make_clock(warmup: int, steps: int) -> Any:
    """A callback whose `times` are those at which windows of so many steps begin and end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012 (each call makes a class)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step < warmup or (state.global_step - warmup) % steps:
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if not self.times:
                    torch.cuda.reset_peak_memory_stats()
            self.times.append(time.perf_counter())

    return Clock()


if __name__ == "__main__":
    main()
