"""Where experiments happen: trains the runs of a claim, measures them, writes pages."""

import copy
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from rich.console import RenderableType
from rich.markdown import Markdown
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.load import load_model
from pldr.conditions import commit, device_name, versions
from pldr.data.rows import read_passages, source_of
from pldr.deductive import deductive_outputs, variation
from pldr.evaluation.modes import frozen_copy
from pldr.files import read_json, read_json_lines, write_json, write_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT, STORIES
from pldr.recipe import DataRecipe
from pldr.study.order import order_parameter
from pldr.tables import Printable
from pldr.tokenizer import load_tokenizer

# A run whose operator varies less, and whose frozen form loses less (nats per token), has an invariant operator.
INVARIANT_VARIATION, INVARIANT_LOSS = 1e-3, 1e-4
# A model that gains less from its context than this (nats per token, over one token of context) has no attention left.
COLLAPSED_GAIN = 0.02
# Prompts that the order parameter is taken over.
_ORDER_PROMPTS = 8
_T = TypeVar("_T")
# Validation text is read up to so many rows for each that is measured.
_MOST_ROWS = 64


class Cell(NamedTuple):
    """The settings of one cell of the map of invariance; each is trained with several seeds.

    Attributes:
        rate, warmup, steps: peak rate, steps of warm-up and of the whole run.
        units, glus, width: of the metric learner: R, N and F_A.
        data: percent of the training documents.
    """

    rate: float
    warmup: int
    units: int
    glus: int
    width: int
    steps: int
    data: int = 100


@dataclass(frozen=True)
class Size:
    """How large the experiments of a claim are.

    Attributes:
        recipe: what its runs share, in the terms of a recipe (without output and data).
        seeds: of each variant that is compared.
        cell_seeds: of each cell of the map of invariance, and of each rate that an operator is tried at.
        rates: peak rates that each operator is first tried at, in rising order.
        extensions: how often these go on by a factor of two, where the best one lies at an edge.
        length: tokens of a sequence.
        passages: held out, to measure on.
        generated: tokens that texts are continued by, where outputs are followed.
        cells: of the map of invariance, beside the recipe's own, by what differs from that.
    """

    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    cell_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    extensions: int
    length: int
    passages: int
    generated: int
    cells: tuple[dict[str, Any], ...]

    @property
    def usual(self) -> Cell:
        """The recipe's own cell."""
        optimization, config = self.recipe["optimization"], self.recipe["model"].get("config", {})
        return Cell(
            optimization.get("learning_rate", 1e-3), optimization["warmup_steps"],
            config.get("metric_learner_units", 8), config.get("metric_learner_glus", 2),
            config.get("metric_learner_width", 170), optimization.get("steps", 250_000),
        )  # fmt: skip


def _recipe(model: dict[str, Any], **optimization: Any) -> dict[str, Any]:
    return {"model": model, "optimization": optimization}


SIZES = {
    "tiny": Size(
        _recipe(
            {"config": {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
                        "max_position_embeddings": 128, "metric_learner_units": 4, "metric_learner_width": 64}},
            steps=140, batch_size=16, learning_rate=4e-3, warmup_steps=60, precision="fp32",
        ),
        seeds=(1, 2), cell_seeds=(1, 2), rates=(4e-3, 8e-3), extensions=0, length=64, passages=32, generated=32,
        cells=({"rate": 8e-3}, {"rate": 3e-2, "warmup": 5}, {"units": 8}),
    ),
    "small": Size(
        _recipe(
            {"config": {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 3,
                        "max_position_embeddings": 512, "metric_learner_units": 16, "metric_learner_width": 64}},
            steps=1200, batch_size=64, learning_rate=8e-3, warmup_steps=700, precision="bf16", compile=True,
        ),
        seeds=(1, 2, 3, 4, 5), cell_seeds=(1, 2, 3), rates=(1e-3, 2e-3, 4e-3, 8e-3), extensions=2,
        length=256, passages=32, generated=256,
        cells=(
            *({"rate": rate} for rate in (1e-3, 2e-3, 4e-3, 1.6e-2)), *({"warmup": warmup} for warmup in (50, 300)),
            *({"units": units} for units in (2, 8)), {"glus": 1}, {"width": 170},
            {"steps": 600, "warmup": 350}, {"steps": 2400, "warmup": 1400}, {"data": 10},
        ),
    ),
    "paper": Size(
        {"model": {"preset": "v51-110M-1"}, "optimization": {"warmup_steps": 2000, "compile": True}},
        seeds=(1, 2, 3, 4, 5), cell_seeds=(1, 2, 3), rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3), extensions=1,
        length=1024, passages=32, generated=256,
        cells=tuple({"rate": rate, "warmup": warmup} for rate in (3e-4, 1e-3, 1.2e-3) for warmup in (2000, 4000, 8000)
                    if (rate, warmup) != (1e-3, 2000)),
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
        model: of claims that need no training; by default the one that ships with pldr.
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
    _halves: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)
    _trained: bool = field(default=False, init=False, repr=False)
    _measuring: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    # --- training ---

    @staticmethod
    def run_name(kind: str, rate: float, seed: int) -> str:
        """Of a kind of operator at a peak rate; claims share runs by it."""
        return f"{kind.replace(' ', '-')}-rate{rate:g}-seed{seed}"

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
            ChildProcessError: a run failed for another reason than a loss that is not finite.
        """
        self._each(runs, lambda name: None)

    def measured(self, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The same, and what `measure` finds of each run, while others still train."""
        return self._each(runs, self.measure)

    def _each(self, runs: dict[str, dict[str, Any]], then: Callable[[str], _T]) -> dict[str, _T]:
        self._trained = True
        waiting = {name for name, changes in runs.items() if not self._done(name, changes)}
        self.say(f"{len(runs)} runs, {len(runs) - len(waiting)} done before")

        def one(name: str) -> _T:
            if name in waiting:
                self._train_one(name, runs[name])
            return then(name)

        with ThreadPoolExecutor(self.parallel) as pool:
            return dict(zip(runs, pool.map(one, runs), strict=True))

    def _done(self, name: str, changes: dict[str, Any]) -> bool:
        """Whether this very run, and not another of the same name, has ended."""
        file = self.runs / f"{name}.yaml"
        if not file.is_file():
            return False
        wanted, trained = self.recipe(name, changes), yaml.safe_load(file.read_text(encoding="utf-8"))
        if trained | {"output": wanted["output"]} != wanted:  # the same folder may be spelled otherwise
            return False
        return (self.runs / name / "config.json").is_file() or self.diverged(name) is not None

    def diverged(self, name: str) -> str | None:
        """What a run said when its numbers were no longer finite, if it did."""
        file = self.runs / f"{name}.diverged.json"
        return read_json(file)["message"] if file.is_file() else None

    def _train_one(self, name: str, changes: dict[str, Any]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        recipe, diverged = self.runs / f"{name}.yaml", self.runs / f"{name}.diverged.json"
        for stale in (diverged, self._measurement_file(name)):
            stale.unlink(missing_ok=True)
        write_text(recipe, yaml.safe_dump(self.recipe(name, changes), sort_keys=False))
        start = time.perf_counter()
        command = [sys.executable, "-m", "pldr.study.run", str(recipe), str(diverged)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ChildProcessError(f"{name}: {last}")
        self.say(f"{name}: {time.perf_counter() - start:.0f} s{' (diverged)' if self.diverged(name) else ''}")

    def _environment(self) -> dict[str, str]:
        """Of a run: what this process has; where several run at once, a share of the cores, and of the GPUs the next one."""
        if self.parallel == 1:
            return dict(os.environ)
        share = str(max(1, (os.cpu_count() or 1) // self.parallel))
        environment = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | os.environ
        if (gpus := torch.cuda.device_count()) > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[next(self._numbers) % gpus]
        return environment

    # --- measuring ---

    def learned_model(self, claim: str) -> tuple[PldrForCausalLM, PreTrainedTokenizerFast]:
        """The model that a claim is about, with its tokenizer. Raises ValueError: its operator is a constant."""
        model = load_model(self.model, device=self.device)
        if model.config.operator != "learned":
            raise ValueError(f"reproduce {claim}: needs a model with a learned operator")
        return model, load_tokenizer(self.model)

    def passages(
        self, tokenizer: PreTrainedTokenizerFast, count: int | None = None, *, part: str = "validation"
    ) -> torch.Tensor:
        data, count = DataRecipe(**self.data), count or self.size.passages
        rows = read_passages(source_of(data, part), tokenizer, self.size.length, count, streaming=data.streaming)
        return rows.to(self.device)

    def halves(self, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
        """`passages` rows of each half of the validation text, evenly spread: one to choose by, the other to report on.

        They are read once for all runs, which share a tokenizer.
        """
        data, count = DataRecipe(**self.data), self.size.passages
        what = f"{self.data} {self.size.length} {count}"
        if what in self._halves:
            return self._halves[what]
        rows = read_passages(
            source_of(data, "validation"), tokenizer, self.size.length, _MOST_ROWS * count, streaming=data.streaming
        )
        if len(rows) < 2:
            raise ValueError("reproduce: the validation text must fill at least two rows, one for each of its halves")
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        one, other = (half[:: max(1, len(half) // count)][:count].to(self.device) for half in (first, second))
        self._halves[what] = one, other
        return one, other

    def load(self, name: str) -> tuple[PldrForCausalLM, PreTrainedTokenizerFast] | None:
        """A trained run's model and tokenizer; None if it diverged."""
        run = self.runs / name
        if not (run / "config.json").is_file():
            return None
        return load_model(run, device=self.device), load_tokenizer(run)

    def log(self, name: str) -> list[dict[str, Any]]:
        file = self.runs / name / "log.jsonl"
        return [line for _, line in read_json_lines(file)] if file.is_file() else []

    def measure(self, name: str) -> dict[str, Any]:
        """Loss and accuracy of a run, what its context gains it and, of a learned operator, by layer how it varies and its order
        parameter (`pldr.study.order`), and what freezing it does to the loss.

        "loss_to_choose" is the loss on the first half of the validation text, by which settings are chosen; all else is of the
        second. What was measured is kept beside the run.
        """
        file, how = self._measurement_file(name), {"size": [self.size.length, self.size.passages], "data": self.data}
        if file.is_file() and (kept := read_json(file))["how"] == how:
            found: dict[str, Any] = kept["found"]
            return found
        with self._measuring:  # one at a time: loading a model swaps parts of torch for all threads
            loaded = self.load(name)
            if loaded is None:
                return {"run": name, "diverged": True}
            found = {"run": name, "diverged": False, **self._numbers_of(*loaded)}
        write_json(file, {"how": how, "found": found})
        return found

    def _measurement_file(self, name: str) -> Path:
        return self.runs / f"{name}.measured.json"

    @torch.no_grad()
    def _numbers_of(self, model: PldrForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        to_choose, rows = self.halves(tokenizer)
        outputs = [model(row[None, :-1], shift_labels=row[None, 1:], use_cache=False) for row in rows]
        loss = statistics.fmean(float(output.loss) for output in outputs)
        found: dict[str, Any] = {
            "loss": loss,
            "loss_to_choose": mean_loss(model, to_choose),
            "accuracy": statistics.fmean(float(output.accuracy) for output in outputs),
            "gain": mean_loss(model, rows.reshape(-1, 2)) - loss,
        }
        if model.config.operator == "learned":
            calibration = self.passages(tokenizer, 1, part="train")
            G_LM = torch.cat([deductive_outputs(model, row[None]).G_LM for row in rows], 1)
            frozen = frozen_copy(model, calibration)
            half = self.size.length // 2
            found |= {
                "variation": variation(G_LM).tolist(),
                "order_parameter": order_parameter(model, rows[:_ORDER_PROMPTS, :half], half)["G_LM"].tolist(),
                "frozen_difference": mean_loss(frozen, rows) - loss,
            }
        return found

    # --- results ---

    def write(self, finding: "Finding") -> None:
        """The page, README.md, and its numbers, results.json."""
        device = device_name(self.device)
        if self._trained and torch.cuda.is_available() and self.device == "cpu":
            device += f", trained on {device_name('cuda')}"
        about: dict[str, Any] = {
            "command": self.command, "device": device, "versions": versions(), "commit": commit(),
            "date": time.strftime("%Y-%m-%d"), "size": dataclasses.asdict(self.size), "data": self.data,
        }  # fmt: skip
        used = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        if about["commit"]:
            used += f", commit {about['commit']}"
        made_with = f"`{about['command']}` · {device} · {used} · {about['date']}"
        page = "\n\n".join([f"# {finding.claim}", f"**{finding.sentence}**", *finding.sections, made_with])
        write_text(self.folder / "README.md", page + "\n")
        write_json(self.folder / "results.json", _without_places(about | finding.to_json()), indent=1)


def _without_places(value: Any) -> Any:
    """Paths as texts, with no word of where the package lies, which is nobody's business."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(item) for item in value]
    if isinstance(value, (str, Path)):
        return str(value).replace(str(Path(__file__).parents[1]), "pldr")
    return value


class Verdict(StrEnum):
    """What an experiment says about a claim."""

    CONFIRMED = "confirmed"
    CONDITIONS = "confirmed under conditions"
    NOT_CONFIRMED = "not confirmed"


@dataclass(frozen=True)
class Finding(Printable):
    """What came out of a claim's experiment.

    Attributes:
        claim: in words.
        verdict: on it.
        reason: for the verdict, in numbers and words.
        sections: of its page, Markdown.
        numbers: all that was measured.
        subject: the model that it is about, if it is about one.
        page: where it was written.
    """

    claim: str
    verdict: Verdict
    reason: str
    sections: list[str]
    numbers: dict[str, Any]
    subject: str = ""
    page: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What is in the page's results.json about the claim."""
        return {"claim": self.claim, "verdict": self.sentence, "outcome": self.verdict, "numbers": self.numbers}

    @property
    def sentence(self) -> str:
        about = f" for {self.subject}" if self.subject else ""
        return f"{self.verdict.capitalize()}{about}: {self.reason}."

    def __rich__(self) -> RenderableType:
        return Markdown("\n\n".join([f"# {self.claim}", f"**{self.sentence}**", *self.sections]))


def state_of(found: dict[str, Any]) -> str:
    """What became of a run, from what `Lab.measure` found: diverged, collapsed, constant, invariant, or varies."""
    if found["diverged"]:
        return "diverged"
    if found["gain"] < COLLAPSED_GAIN:
        return "collapsed"
    if "variation" not in found:
        return "constant"
    invariant = max(found["variation"]) < INVARIANT_VARIATION and abs(found["frozen_difference"]) < INVARIANT_LOSS
    return "invariant" if invariant else "varies"


def is_healthy(found: dict[str, Any]) -> bool:
    return state_of(found) not in ("diverged", "collapsed")


@torch.no_grad()
def mean_loss(model: PldrForCausalLM, rows: torch.Tensor) -> float:
    """Over every token of rows [B, T] but the first, nats per token; the last is a target alone."""
    step = max(1, 4096 // rows.shape[1])
    losses = [
        float(model(part[:, :-1], shift_labels=part[:, 1:], use_cache=False).loss) * len(part)
        for part in rows.split(step)
    ]
    return sum(losses) / len(rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def default_data(size: str, *, held_out: bool = False) -> dict[str, Any]:
    """What a size trains on unless told otherwise: Python's language reference, or the published data.

    Args:
        size: a key of `SIZES`.
        held_out: of the claims about the model that ships with pldr: the excerpts that it was not trained on.
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
