"""The paper's claims as experiments: each trains what it needs, measures, and writes tables, figures and numbers.

A claim is a function of a `Lab`, which holds the size, the data and the folder, trains runs (several at once, a finished one
only once) and measures trained models. What a claim finds is reported whether it bears the paper out or not.
"""

import copy
import dataclasses
import json
import math
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

from pldr.cache import make_cache
from pldr.convert import load_model
from pldr.data import Source, read_passages
from pldr.deductive import deductive_outputs, log_determinant, variation
from pldr.generation import generate_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import DeductiveOutputs, freeze
from pldr.report import save_figure
from pldr.shipped import HELD_OUT, STORIES
from pldr.tokenizer import load_tokenizer

# A run whose operator varies less, and whose frozen form loses less, has an invariant operator.
INVARIANT_VARIATION, INVARIANT_LOSS = 1e-3, 1e-4
# Log-likelihoods of an ending, some 16 tokens, that differ by no more than this (nats) count as the same.
SAME_LIKELIHOOD = 1e-3
# A model that gains less from its context than this (nats a token, over one token of context) has no attention left.
COLLAPSED_GAIN = 0.02
NAMES = ("A", "A_LM", "A_P", "G_LM")


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
        code = "import sys; from pldr.recipe import load_recipe; from pldr.train import train; " \
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
            "gain": _mean_loss(model, rows.reshape(-1, 2)) - loss,
        }
        if model.config.operator == "learned":
            calibration = self.passages(tokenizer, 1, part="train")
            G_LM = torch.cat([deductive_outputs(model, row[None]).G_LM for row in rows], 1)
            frozen = freeze(copy.deepcopy(model), calibration)
            found |= {"variation": variation(G_LM).tolist(), "frozen_difference": _mean_loss(frozen, rows) - loss}
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
        text = text.replace(str(Path(__file__).parent), "pldr")  # where the package lies is nobody's business
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def _mean_loss(model: PldrForCausalLM, rows: torch.Tensor) -> float:
    """Over every target, nats a token."""
    step = max(1, 4096 // rows.shape[1])
    losses = [(float(model(part, labels=part, use_cache=False).loss), len(part)) for part in rows.split(step)]
    return sum(loss * count for loss, count in losses) / len(rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _shown(value: float, spread: float | None) -> str:
    return f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


# --- the claims -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def caching(lab: Lab) -> None:
    """Deductive outputs, outputs and choices before and after caching, and the time of the four modes."""
    model, tokenizer = load_model(lab.model, device=lab.device), load_tokenizer(lab.model)
    if model.config.operator != "learned":
        raise ValueError("reproduce caching: needs a model with a learned operator")
    rows = lab.passages(tokenizer)
    half = rows.shape[1] // 2
    # One passage at a time throughout: a GPU rounds batches of other sizes otherwise. What is in the cache after the second
    # half was read with it, against G_LM worked out before, and anew from all tokens.
    layers: Any = model.model.layers
    found: dict[str, list[DeductiveOutputs]] = {"before": [], "after": [], "anew": []}
    for row in rows:
        found["before"].append(deductive_outputs(model, row[None, :half]))
        found["anew"].append(deductive_outputs(model, row[None]))
        kept = {}
        for kind, g in (("A", False), ("G_LM", True)):
            cache: Any = make_cache(model.config, g=g)
            model(row[None, :half], past_key_values=cache)
            model(row[None, half:], past_key_values=cache)
            kept[kind] = [layer.operator_state for layer in cache.layers]
        from_A = [layer.self_attn.operator.energy_curvature(A) for layer, A in zip(layers, kept["A"], strict=True)]
        cached = DeductiveOutputs(*(torch.stack(kind) for kind in zip(*from_A, strict=True)))
        found["after"].append(cached._replace(G_LM=torch.stack(kept["G_LM"])))
    before, after, anew = (
        _statistics(DeductiveOutputs(*(torch.cat(kind, 1) for kind in zip(*outputs, strict=True))))
        for outputs in found.values()
    )

    lines = []
    for name in NAMES:
        for quantity in ("rms", "log10_determinant"):
            one, two, three = (values[name][quantity] for values in (before, after, anew))
            lines.append([name, quantity.replace("_", " "), f"{one:.15f}", f"{two:.15f}", f"{abs(two - one):.1e}",
                          f"{abs(three - one):.1e}"])  # fmt: skip
    same = max(abs(after[n][q] - before[n][q]) for n in NAMES for q in ("rms", "log10_determinant"))

    frozen = freeze(copy.deepcopy(model), rows[:1])
    choices = _choices(model, frozen, rows, half)
    modes = [("no cache", model, "none"), ("KV", model, "kv"), ("KV + G", model, "kv+g"), ("frozen G", frozen, "kv")]
    prompt = tokenizer.decode(rows[0, : min(64, half)])
    texts, times = [], {}
    for mode, running, cache_kind in modes:
        settings: dict[str, Any] = {"cache": cache_kind, "max_new_tokens": min(64, half), "ignore_end": True}
        generate_text(running, tokenizer, prompt, **settings)
        timed = [generate_text(running, tokenizer, prompt, **settings) for _ in range(3)]
        texts.append(timed[0].token_ids)
        times[mode] = statistics.median(1 / run.tokens_per_second for run in timed)
    identical = all(text == texts[0] for text in texts)
    largest = max(choices["largest"].values())
    confirmed = same < 1e-12 and identical and choices["differ"] == 0 and largest <= SAME_LIKELIHOOD
    lab.write(
        "Caching changes nothing",
        ("Confirmed" if confirmed else "Not confirmed")
        + f" for {lab.model.name}: what is cached keeps RMS and determinant to {same:.0e}, the greedy text is "
        + ("the same" if identical else "not the same")
        + f" in all modes, {choices['differ']} of {choices['questions']} choices differ, log-likelihoods by at most "
        f"{largest:.1e}.",
        [
            "Root mean square and determinant of each deductive output, averaged over layers, heads and "
            f"{len(rows)} held-out passages: from the first half of each passage; from the cache after the second half was "
            "read with it; and, for comparison, the change if they are worked out anew from the whole passage.",
            table(["tensor", "quantity", "before caching", "after caching", "difference", "anew, whole passage"], lines),
            "Zero-shot-style choices: which of four second halves belongs to the first half, by log-likelihood.",
            table(["G_LM", "right", "choices that differ", "largest log-likelihood difference"],
                  [[mode, f"{choices['right'][mode]} of {choices['questions']}", str(choices["different"][mode]),
                    f"{choices['largest'][mode]:.1e}"] for mode in choices["right"]]),
            "Inference time, greedy, one sequence.",
            table(["cache", "ms a token", "× no cache"],
                  [[mode, f"{1e3 * seconds:.2f}", f"{times['no cache'] / seconds:.1f}"] for mode, seconds in times.items()]),
        ],
        {"before": before, "after": after, "anew": anew, "choices": choices, "seconds_per_token": times,
         "same_text": identical},
    )  # fmt: skip


def _statistics(outputs: DeductiveOutputs) -> dict[str, dict[str, float]]:
    found = {}
    for name in NAMES:
        X = getattr(outputs, name).double()
        _, log = log_determinant(X)
        finite = log[torch.isfinite(log)]  # an exactly singular matrix has no logarithm
        found[name] = {
            "rms": float(X.square().mean((-1, -2)).sqrt().mean()),
            "log10_determinant": float(finite.mean()) if len(finite) else -math.inf,
            "singular": int(log.numel() - len(finite)),
        }
    return found


@torch.no_grad()
def _choices(model: PldrForCausalLM, frozen: PldrForCausalLM, rows: torch.Tensor, half: int) -> dict[str, Any]:
    """Log-likelihood of four second halves after each first half, by where G_LM comes from."""
    end = half + min(16, half)
    scores: dict[str, list[list[float]]] = {"computed": [], "cached": [], "frozen": []}
    for index, row in enumerate(rows):
        endings = torch.stack([rows[(index + shift) % len(rows), half:end] for shift in range(4)])
        first = row[:half].expand(4, -1)
        whole = torch.cat((first, endings), 1)
        for mode, running in (("computed", model), ("frozen", frozen)):
            scores[mode].append(_likelihood(running(whole, use_cache=False).logits[:, half - 1 : -1], endings))
        cache = make_cache(model.config)
        head = model(first, past_key_values=cache).logits[:, -1:]
        tail = model(endings, past_key_values=cache).logits[:, :-1]
        scores["cached"].append(_likelihood(torch.cat((head, tail), 1), endings))
    found = {mode: torch.tensor(values, dtype=torch.float64) for mode, values in scores.items()}
    answers = {mode: values.argmax(1) for mode, values in found.items()}
    different = {mode: int((answer != answers["computed"]).sum()) for mode, answer in answers.items()}
    return {
        "questions": len(rows),
        "right": {mode: int((answer == 0).sum()) for mode, answer in answers.items()},
        "different": different,
        "differ": max(different.values()),
        "largest": {mode: float((values - found["computed"]).abs().max()) for mode, values in found.items()},
    }


def _likelihood(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    return logits.double().log_softmax(-1).gather(2, targets[..., None]).sum((1, 2)).tolist()


def invariance(lab: Lab) -> None:
    """Where G_LM becomes invariant, where not, and where the model itself collapses."""
    base = lab.size.recipe
    config = base["model"].get("config", {})
    usual = (base["optimization"].get("learning_rate", 1e-3), base["optimization"]["warmup_steps"],
             config.get("metric_learner_units", 8), config.get("metric_learner_glus", 2),
             config.get("metric_learner_width", 170))  # fmt: skip
    conditions = {(*usual, seed) for seed in lab.size.seeds} | set(lab.size.grid)
    runs = {}
    for rate, warmup, units, glus, width, seed in sorted(conditions):
        same = (rate, warmup, units, glus, width) == usual
        name = f"learned-{seed}" if same else f"rate{rate:g}-warmup{warmup}-R{units}-N{glus}-W{width}-seed{seed}"
        changes: dict[str, Any] = {"seed": seed}
        if not same:  # else the very runs of the other claims
            changes |= {
                "optimization.learning_rate": rate, "optimization.warmup_steps": warmup,
                "model.config.metric_learner_units": units, "model.config.metric_learner_glus": glus,
                "model.config.metric_learner_width": width,
            }  # fmt: skip
        runs[name] = ((rate, warmup, units, glus, width, seed), changes)
    lab.train({name: changes for name, (_, changes) in runs.items()})
    rows = []
    for name, (condition, _) in runs.items():
        found = lab.measure(name)
        rows.append(found | {"condition": condition, "state": _state(found)})
    order = ("invariant", "varies", "collapsed", "diverged")
    counts = {state: sum(row["state"] == state for row in rows) for state in order}
    cells = []
    for row in rows:
        rate, warmup, units, glus, width, seed = row["condition"]
        settings = [f"{rate:g}", str(warmup), str(units), str(glus), str(width), str(seed)]
        if row["diverged"]:
            cells.append([*settings, "", "", "", "", "diverged"])
        else:
            cells.append([*settings, f"{row['loss']:.3f}", f"{row['gain']:.3f}", f"{max(row['variation']):.1e}",
                          f"{row['frozen_difference']:+.1e}", row["state"]])  # fmt: skip
    _plot_invariance(rows, usual, lab.folder / "invariance.png")
    general = counts["invariant"] == len(rows)
    verdict = "Confirmed" if general else "Confirmed under conditions" if counts["invariant"] else "Not confirmed"
    lab.write(
        "G_LM becomes invariant",
        f"{verdict}: of {len(rows)} runs {', '.join(f'{count} {state}' for state, count in counts.items() if count)}.",
        [
            f"Invariant: G_LM varies over held-out passages by less than {INVARIANT_VARIATION:g} (relative RMSE, largest "
            f"layer) and freezing it moves the loss by less than {INVARIANT_LOSS:g} nats a token. Collapsed: the whole "
            f"context gains less than {COLLAPSED_GAIN} nats a token over one token of context.",
            table(["peak rate", "warm-up", "R", "N", "F_A", "seed", "loss", "gain", "variation", "frozen − computed",
                   "state"], cells),
            "![the map](invariance.png)",
        ],
        {"runs": rows, "counts": counts},
    )  # fmt: skip


def _state(found: dict[str, Any]) -> str:
    if found["diverged"]:
        return "diverged"
    if found["gain"] < COLLAPSED_GAIN:
        return "collapsed"
    if "variation" not in found:
        return "constant"
    invariant = max(found["variation"]) < INVARIANT_VARIATION and abs(found["frozen_difference"]) < INVARIANT_LOSS
    return "invariant" if invariant else "varies"


def _plot_invariance(rows: list[dict[str, Any]], usual: tuple[float, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    colours = {"invariant": "tab:green", "varies": "tab:orange", "collapsed": "tab:red"}
    for state, colour in colours.items():
        picked = [row for row in rows if row["state"] == state]
        axis.scatter(
            [max(row["variation"]) for row in picked], [row["loss"] for row in picked], color=colour, label=state
        )
    names = ("rate", "warm-up", "R", "N", "F_A")
    for row in rows:
        if not row["diverged"]:
            *settings, seed = row["condition"]
            other = [
                f"{name} {value:g}" for name, value, base in zip(names, settings, usual, strict=True) if value != base
            ]
            axis.annotate(", ".join(other) or f"seed {seed}", (max(row["variation"]), row["loss"]), fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    axis.axvline(INVARIANT_VARIATION, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="variation of G_LM over held-out passages", ylabel="held-out loss, nats a token",
             title="labels: what differs from " + ", ".join(f"{n} {v:g}" for n, v in zip(names, usual, strict=True)))  # fmt: skip
    axis.legend()
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def ablation(lab: Lab) -> None:
    """Learned against transferred, random and identity operators, and DAG-regularised."""
    seeds = lab.size.seeds
    lab.train({f"learned-{seed}": {"seed": seed} for seed in seeds})
    healthy = [f"learned-{seed}" for seed in seeds if _healthy(lab.measure(f"learned-{seed}"))]
    if not healthy:
        raise ValueError(
            "reproduce ablation: every learned run diverged or collapsed; there is no operator to transfer; try a larger --size"
        )
    source = lab.load(healthy[0])
    assert source is not None
    model, tokenizer = source
    transferred = lab.runs / "transferred-operator"
    freeze(model, lab.passages(tokenizer, 4, part="train")).save_pretrained(transferred)
    variants: dict[str, dict[str, Any]] = {
        "learned": {},
        "DAG-regularised": {f"optimization.dag_{name}": 0.05 for name in ("A_LM", "A_P", "G_LM")},
        "transferred": {"model.G_LM": str(transferred)},
        "random": {"model.config.operator": "constant", "model.config.operator_init": "random"},
        "identity": {"model.config.operator": "constant", "model.config.operator_init": "identity"},
    }
    _compare(
        lab, "Operators train differently", variants, "learned",
        "Held-out loss of each kind of operator, the same recipe otherwise; transferred is the operator of the first "
        "learned run that came through, frozen. Identity is ordinary attention.",
    )  # fmt: skip


def handoff(lab: Lab) -> None:
    """The learned operator handed over as a trainable constant during training, against keeping its network."""
    steps = lab.size.recipe["optimization"].get("steps", 250_000)
    variants: dict[str, dict[str, Any]] = {
        "learned": {},
        "handed off at a half": {"optimization.handoff_step": steps // 2},
        "handed off at a quarter": {"optimization.handoff_step": steps // 4},
    }
    lab.train({f"learned-{seed}": {"seed": seed} for seed in lab.size.seeds})
    _compare(
        lab, "A handed-off operator can replace its network in training", variants, "learned",
        "At the step named, the learned operator becomes a trainable constant and its network is dropped; the optimiser "
        "keeps its state for the rest.",
    )  # fmt: skip


def _compare(lab: Lab, claim: str, variants: dict[str, dict[str, Any]], reference: str, text: str) -> None:
    """Train every variant with every seed; curves with their spread, final numbers, and which differ from the reference."""
    names = {kind: [f"{kind.replace(' ', '-')}-{seed}" for seed in lab.size.seeds] for kind in variants}
    lab.train({
        name: changes | {"seed": seed}
        for kind, changes in variants.items() for name, seed in zip(names[kind], lab.size.seeds, strict=True)
    })  # fmt: skip
    found = {kind: [lab.measure(name) for name in runs] for kind, runs in names.items()}
    report_comparison(lab, claim, found, reference, text)


def report_comparison(lab: Lab, claim: str, found: dict[str, list[dict[str, Any]]], reference: str, text: str) -> None:
    """Write the page of a comparison from what was measured of its runs.

    Runs that diverged or whose attention died are counted, and left out of the means.
    """
    cells: list[list[str]] = []
    summary: dict[str, dict[str, Any]] = {}
    for kind, rows in found.items():
        good = [row for row in rows if _healthy(row)]
        if not good:
            continue
        loss, accuracy = (_mean_and_spread([row[key] for row in good]) for key in ("loss", "accuracy"))
        seconds = statistics.fmean(_seconds(lab.log(row["run"])) for row in good)
        summary[kind] = {"loss": loss, "accuracy": accuracy, "runs": len(good), "seconds": seconds}
    base = [row["loss"] for row in found[reference] if _healthy(row)]
    for kind, rows in found.items():
        states = [_state(row) for row in rows]
        lost = [f"{states.count(state)} {state}" for state in ("collapsed", "diverged") if state in states]
        losses = [row["loss"] for row in rows if _healthy(row)]
        runs = f"{len(losses)} of {len(rows)}" + (f" ({', '.join(lost)})" if lost else "")
        if kind not in summary:
            cells.append([kind, runs, "", "", "", ""])
            continue
        row = summary[kind]
        row["separation"] = None if kind == reference else _separation(losses, base)
        difference = "" if kind == reference or not base else f"{row['loss'][0] - statistics.fmean(base):+.4f}"
        cells.append([kind, runs, _shown(*row["loss"]), _shown(*row["accuracy"]), difference,
                      "" if row["separation"] is None else f"{row['separation']:.1f}"])  # fmt: skip
    _plot_curves(
        {kind: [lab.log(row["run"]) for row in rows] for kind, rows in found.items()}, lab.folder / "curves.png"
    )

    others = {kind: row for kind, row in summary.items() if kind != reference}
    apart = [kind for kind, row in others.items() if row["separation"] is not None and row["separation"] >= 3]
    near = [kind for kind, row in others.items() if row["separation"] is not None and row["separation"] < 3]
    unknown = [kind for kind in found if kind != reference and kind not in apart + near]
    better = [kind for kind in others if base and summary[kind]["loss"][0] < statistics.fmean(base)]
    if claim.startswith("Operators"):
        verdict = "Confirmed" if not near + unknown else "Confirmed under conditions" if apart else "Not confirmed"
    else:
        worse = [kind for kind in apart if kind not in better]
        verdict = "Not confirmed" if len(worse) == len(others) else "Confirmed"
        verdict += " under conditions" if verdict == "Confirmed" and worse + unknown else ""
    parts = [
        f"{label}: {', '.join(kinds)}"
        for label, kinds in ((f"distinct from {reference}", apart), (f"not told apart from {reference}", near),
                             ("too few runs to tell", unknown), (f"lower mean loss than {reference}", better))
        if kinds
    ]  # fmt: skip
    lab.write(
        claim,
        f"{verdict}: {'; '.join(parts) or 'no run came through'}.",
        [
            text,
            table(["operator", "runs", "held-out loss", "accuracy", f"loss against {reference}", "separation"], cells),
            "Mean ± standard deviation over seeds, without runs that diverged or collapsed (whose whole context gains less "
            f"than {COLLAPSED_GAIN} nats a token over one token of it). Separation: difference of the means over their "
            "standard error (Welch); 3 or more counts as distinct, and it takes two runs on each side.",
            "![curves](curves.png)",
        ],
        {"runs": found, "summary": summary},
    )


def _healthy(found: dict[str, Any]) -> bool:
    return _state(found) not in ("diverged", "collapsed")


def _separation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Welch's t of two samples, in absolute value; None where a sample has fewer than two."""
    if min(len(one), len(other)) < 2:
        return None
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    difference = abs(statistics.fmean(one) - statistics.fmean(other))
    return math.inf if error == 0 and difference else difference / error if error else 0.0


def _seconds(log: list[dict[str, Any]]) -> float:
    return sum(line["train_runtime"] for line in log if "train_runtime" in line)


def _plot_curves(logs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for kind, runs in logs.items():
        for axis, key in zip(axes, ("loss", "eval_loss", "eval_accuracy"), strict=True):
            curves = [{line["step"]: line[key] for line in log if key in line} for log in runs if log]  # none: diverged
            steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            values = [[curve[step] for curve in curves] for step in steps]
            means = [statistics.fmean(row) for row in values]
            (line,) = axis.plot(steps, means, label=kind, linewidth=1.2)
            low, high = ([bound(row) for row in values] for bound in (min, max))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("training loss", "validation loss", "validation accuracy"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


@torch.no_grad()
def transfer(lab: Lab) -> None:
    """A learned model's weights with a constant G_LM: its own (v51Gi), and the negative test with others."""
    model, tokenizer = load_model(lab.model, device=lab.device), load_tokenizer(lab.model)
    if model.config.operator != "learned":
        raise ValueError("reproduce transfer: needs a model with a learned operator")
    rows = lab.passages(tokenizer, lab.size.passages + 1)
    calibration, rows = rows[:1], rows[1:]
    own = freeze(copy.deepcopy(model), calibration)
    G_LM = torch.stack([layer.self_attn.operator.G_LM for layer in own.model.layers])
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(G_LM.shape, generator=generator).to(G_LM)
    scale = G_LM.square().mean((-1, -2), keepdim=True).sqrt()
    identity = torch.eye(G_LM.shape[-1]).to(G_LM).expand_as(G_LM)
    variants = {
        "its own, frozen (v51Gi)": G_LM,
        "its own, heads in another order": G_LM.roll(1, 1),
        "identity": identity,
        "random normal": random,
        "random normal, scaled to its own RMS": random * scale,
    }
    loss = _mean_loss(model, rows)
    gain = _mean_loss(model, rows.reshape(-1, 2)) - loss
    losses = {
        name: _mean_loss(freeze(copy.deepcopy(model), G_LM=value.clone()), rows) for name, value in variants.items()
    }
    kept = abs(losses["its own, frozen (v51Gi)"] - loss)
    harm = min(value - loss for name, value in losses.items() if not name.startswith("its own, frozen"))
    confirmed = kept <= INVARIANT_LOSS and harm > 100 * max(kept, INVARIANT_LOSS)
    lab.write(
        "The learned operator replaces its network, and no other does",
        f"{'Confirmed' if confirmed else 'Not confirmed'} for {lab.model.name}: its own operator as a constant moves the loss "
        f"by {kept:.1e} nats a token, every other one by at least {harm:.2f}.",
        [
            f"Held-out loss of the trained weights with each constant, {len(rows)} passages of {rows.shape[1]} tokens. The "
            f"model itself: {loss:.4f}; its context gains it {gain:.2f} nats over one token of context.",
            table(["G_LM", "loss", "against the model"],
                  [[name, f"{value:.4f}", f"{value - loss:+.1e}"] for name, value in losses.items()]),
        ],
        {"loss": loss, "gain": gain, "losses": losses},
    )  # fmt: skip


CLAIMS: dict[str, Callable[[Lab], None]] = {
    "caching": caching,
    "invariance": invariance,
    "ablation": ablation,
    "transfer": transfer,
    "handoff": handoff,
}
# Claims about one trained model, which they do not train.
OF_A_MODEL = ("caching", "transfer")


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


def reproduce(claim: str, lab: Lab) -> Path:
    """Run one claim.

    Returns:
        The page with its verdict.

    Raises:
        ValueError: an unknown claim, or data or a model that can not work.
        RuntimeError: a run failed.
    """
    if claim not in CLAIMS:
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}")
    CLAIMS[claim](lab)
    return lab.folder / "README.md"
