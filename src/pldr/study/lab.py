"""Where experiments happen: trains the runs of a claim, measures them, writes pages."""

import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pldr.checkpoints.load import load_model
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.deductive import deductive_outputs, variation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT, STORIES
from pldr.operator import freeze
from pldr.tokenizer import load_tokenizer

# A model that gains less from its context than this (nats a token, over one token of context) has no attention left.
COLLAPSED_GAIN = 0.02


@dataclass(frozen=True)
class Size:
    """How large the experiments of a claim are.

    Attributes:
        recipe: what its runs share, in the terms of a recipe (without output and data).
        seeds: of each variant.
        length: tokens of a sequence.
        passages: held out, to measure on.
        grid: (peak rate, warm-up, units R, GLUs N, width F_A, seed) of each run of the invariance claim.
    """

    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    length: int
    passages: int
    grid: tuple[tuple[float, int, int, int, int, int], ...]


def _recipe(model: dict[str, Any], **optimization: Any) -> dict[str, Any]:
    return {"model": model, "optimization": optimization}


SIZES = {
    "tiny": Size(
        _recipe(
            {"config": {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
                        "max_position_embeddings": 128, "metric_learner_units": 4, "metric_learner_width": 64}},
            steps=140, batch_size=16, learning_rate=4e-3, warmup_steps=60, precision="fp32",
        ),
        seeds=(1, 2), length=64, passages=32,
        grid=tuple((rate, warmup, units, 2, 64, 1) for rate, warmup, units in
                   ((1e-3, 60, 4), (8e-3, 60, 8), (3e-2, 5, 4))),
    ),
    "small": Size(
        _recipe(
            {"config": {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 3,
                        "max_position_embeddings": 512, "metric_learner_units": 16, "metric_learner_width": 64}},
            steps=1200, batch_size=64, learning_rate=8e-3, warmup_steps=700, precision="bf16", compile=True,
        ),
        seeds=(1, 2, 3), length=256, passages=32,
        grid=(
            *((rate, 700, 16, 2, 64, 1) for rate in (1e-3, 3e-3, 6e-3, 1.6e-2)),
            (8e-3, 50, 16, 2, 64, 1),
            *((8e-3, 700, units, glus, width, 1) for units, glus, width in
              ((2, 2, 64), (8, 2, 64), (16, 1, 64), (16, 2, 170))),
        ),
    ),
    "paper": Size(
        {"model": {"preset": "v51-110M-1"}, "optimization": {"warmup_steps": 2000, "compile": True}},
        seeds=(1, 2, 3), length=1024, passages=32,
        grid=tuple((rate, warmup, 8, 2, 170, 1) for rate in (3e-4, 1e-3, 1.2e-3) for warmup in (2000, 4000, 8000)),
    ),
}  # fmt: skip


@dataclass
class Lab:
    """Where the experiments of a claim happen.

    Attributes:
        size: see `SIZES`.
        folder: where the page, its numbers and its pictures go.
        runs: where trained runs go; claims share them.
        data: keys of a recipe's data section, with `train`, `validation` and `tokenizer`.
        parallel: runs at once.
        model: of claims that need no training; by default the one that comes along.
        device: where models are measured.
        say: takes a line about what happens.
        command: what the page says it was made with.
    """

    size: Size
    folder: Path
    runs: Path
    data: dict[str, Any]
    parallel: int = 1
    model: Path = STORIES
    device: str = "cpu"
    say: Callable[[str], None] = lambda line: None
    command: str = ""

    # --- training ---

    def recipe(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """A run's recipe: the size's, with changes of dotted keys."""
        recipe: dict[str, Any] = copy.deepcopy(self.size.recipe)
        steps = recipe["optimization"].get("steps", 250_000)
        recipe |= {
            "output": str(self.runs / name),
            "data": dict(self.data, sequence_length=self.size.length, validation_rows=4 * self.size.passages),
            "log_steps": max(steps // 40, 1),
            "eval_steps": max(steps // 8, 1),
            "report_to": [],
        }
        for key, value in changes.items():
            *parents, last = key.split(".")
            section = recipe
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return recipe

    def train(self, runs: dict[str, dict[str, Any]]) -> None:
        """Train the runs that are not there yet, `parallel` at once, each in a process of its own.

        Raises:
            RuntimeError: a run failed for another reason than a loss that is not finite.
        """
        waiting = {name: changes for name, changes in runs.items() if not self._done(name, changes)}
        self.say(f"{len(runs)} runs, {len(runs) - len(waiting)} done before")
        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(lambda run: self._train_one(*run), waiting.items()))

    def _done(self, name: str, changes: dict[str, Any]) -> bool:
        """Whether this very run, and not another of the same name, has ended."""
        run, file = self.runs / name, self.runs / f"{name}.yaml"
        if not file.is_file() or yaml.safe_load(file.read_text(encoding="utf-8")) != self.recipe(name, changes):
            return False
        return (run / "config.json").is_file() or (self.runs / f"{name}.diverged").is_file()

    def _train_one(self, name: str, changes: dict[str, Any]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        file = self.runs / f"{name}.yaml"
        (self.runs / f"{name}.diverged").unlink(missing_ok=True)
        file.write_text(yaml.safe_dump(self.recipe(name, changes), sort_keys=False), encoding="utf-8")
        start = time.perf_counter()
        code = "import sys; from pldr.recipe import load_recipe; from pldr.training.run import train; " \
               "train(load_recipe(sys.argv[1]), overwrite=True, progress=False)"  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "FloatingPointError" not in last:
                raise RuntimeError(f"{name}: {last}")
            (self.runs / f"{name}.diverged").write_text(last + "\n", encoding="utf-8")
        self.say(f"{name}: {time.perf_counter() - start:.0f} s{' (diverged)' if done.returncode else ''}")

    # --- measuring ---

    def passages(self, tokenizer: Any, count: int | None = None, *, part: str = "validation") -> torch.Tensor:
        data = self.data
        source = Source(data[part], data.get("text_column", "text"), data.get(f"{part}_split", part),
                        data.get(f"{part}_interval", ""))  # fmt: skip
        count = count or self.size.passages
        return read_passages(source, tokenizer, self.size.length, count, streaming=data.get("streaming", False)).to(
            self.device
        )

    def load(self, name: str) -> tuple[PldrForCausalLM, Any] | None:
        """A trained run's model and tokenizer; None if it diverged."""
        run = self.runs / name
        if not (run / "config.json").is_file():
            return None
        return load_model(run, device=self.device), load_tokenizer(run)

    def log(self, name: str) -> list[dict[str, Any]]:
        file = self.runs / name / "log.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    @torch.no_grad()
    def measure(self, name: str) -> dict[str, Any]:
        """Held-out loss and accuracy of a run, what its context gains it and, of a learned operator, its invariance."""
        loaded = self.load(name)
        if loaded is None:
            return {"run": name, "diverged": True}
        model, tokenizer = loaded
        rows = self.passages(tokenizer)
        outputs = [model(row[None], labels=row[None], use_cache=False) for row in rows]
        loss = statistics.fmean(float(output.loss) for output in outputs)
        found = {
            "run": name,
            "diverged": False,
            "loss": loss,
            "accuracy": statistics.fmean(float(output.accuracy) for output in outputs),
            "gain": mean_loss(model, rows.reshape(-1, 2)) - loss,
        }
        if model.config.operator == "learned":
            calibration = self.passages(tokenizer, 1, part="train")
            G_LM = torch.cat([deductive_outputs(model, row[None]).G_LM for row in rows], 1)
            frozen = freeze(copy.deepcopy(model), calibration)
            found |= {"variation": variation(G_LM).tolist(), "frozen_difference": mean_loss(frozen, rows) - loss}
        return found

    # --- results ---

    def write(self, claim: str, verdict: str, sections: Iterable[str], numbers: dict[str, Any]) -> None:
        """The page, README.md, and its numbers, results.json."""
        import transformers

        import pldr

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about: dict[str, Any] = {
            "claim": claim, "verdict": verdict, "command": self.command, "device": device,
            "versions": {"pldr": pldr.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "date": time.strftime("%Y-%m-%d"), "size": dataclasses.asdict(self.size), "data": self.data,
        }  # fmt: skip
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        page = "\n\n".join(
            [
                f"# {claim}",
                f"**{verdict}**",
                *sections,
                f"`{about['command']}` · {device} · {versions} · {about['date']}",
            ]
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "README.md").write_text(page + "\n", encoding="utf-8")
        text = json.dumps(about | {"numbers": numbers}, indent=1, default=str)
        text = text.replace(str(Path(__file__).parents[1]), "pldr")  # where the package lies is nobody's business
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def mean_loss(model: PldrForCausalLM, rows: torch.Tensor) -> float:
    """Over every target, nats a token."""
    step = max(1, 4096 // rows.shape[1])
    losses = [(float(model(part, labels=part, use_cache=False).loss), len(part)) for part in rows.split(step)]
    return sum(loss * count for loss, count in losses) / len(rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def default_data(size: str, *, held_out: bool = False) -> dict[str, Any]:
    """What a size trains on unless told otherwise: Python's language reference, or the published data.

    Args:
        size: a key of `SIZES`.
        held_out: of the claims about the model that comes along: the excerpts that it was not trained on.
    """
    if held_out:
        return {"train": [str(HELD_OUT)], "validation": [str(HELD_OUT)], "tokenizer": str(STORIES)}
    if size == "paper":
        return {
            "train": ["hub:tiiuae/falcon-refinedweb"], "train_interval": "0:16000000", "text_column": "content",
            "validation": ["hub:tiiuae/falcon-refinedweb"], "validation_split": "train",
            "validation_interval": "16000000:16000200", "streaming": True, "tokenizer": "PLDR-LLM-v51-110M-1",
        }  # fmt: skip
    return {"train": ["pydoc-topics:train"], "validation": ["pydoc-topics:validation"], "tokenizer": str(STORIES)}
