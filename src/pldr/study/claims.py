"""The paper's claims as experiments: each trains what it needs, measures, and finds for or against the claim.

A claim is a function of a `Lab`, which holds the size, the data and the folder, trains runs (several at once, a finished one
only once) and measures trained models. What is found is reported whether it bears the paper out or not.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pldr.cache import make_cache
from pldr.checkpoints.load import usable_device
from pldr.data.rows import source_of
from pldr.data.sources import BadRows, names_of, read_pieces
from pldr.deductive import deductive_outputs, log_determinant
from pldr.evaluation.modes import MODES, OperatorModes, frozen_copy
from pldr.files import require
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import STORIES
from pldr.operator import DeductiveOutputs, freeze, stored_operator
from pldr.plots import plot_curves, plot_invariance
from pldr.recipe import DAG_TENSORS, DataRecipe
from pldr.study.fidelity import fidelity
from pldr.study.lab import (
    COLLAPSED_GAIN,
    INVARIANT_LOSS,
    INVARIANT_VARIATION,
    SIZES,
    Finding,
    Lab,
    Verdict,
    default_data,
    is_healthy,
    mean_loss,
    state_of,
    table,
)
from pldr.study.sdpa import sdpa
from pldr.study.timing import generations

# Log-likelihoods of an ending, some 16 tokens, that differ by no more than this (nats) count as the same.
SAME_LIKELIHOOD = 1e-3
# Means of two variants at least so many standard errors apart count as distinct.
DISTINCT = 3.0


# --- claims about one trained model ---------------------------------------------------------------------------------


@torch.no_grad()
def caching(lab: Lab) -> Finding:
    """Deductive outputs, texts and choices before and after caching, and the time of each kind of cache."""
    model, tokenizer = lab.learned_model("caching")
    rows = lab.passages(tokenizer)
    half = rows.shape[1] // 2
    outputs = _outputs_around_caching(model, rows, half)
    kinds = [(name, quantity) for name in DeductiveOutputs._fields for quantity in ("rms", "log10_determinant")]
    before, after, anew = ([outputs[when][name][quantity] for name, quantity in kinds] for when in outputs)
    same = max(abs(two - one) for one, two in zip(before, after, strict=True))

    modes = OperatorModes(model, rows[:1])
    choices = _choices(modes, rows, half)
    timed = generations(modes, tokenizer, tokenizer.decode(rows[0, : min(64, half)]), min(64, half))
    identical = all(row.generation.token_ids == timed[0].generation.token_ids for row in timed)
    seconds = {row.cache: 1 / row.tokens_per_second for row in timed}
    largest = max(choices["largest"].values())
    confirmed = same < 1e-12 and identical and choices["differ"] == 0 and largest <= SAME_LIKELIHOOD
    return Finding(
        "Caching changes nothing",
        Verdict.CONFIRMED if confirmed else Verdict.NOT_CONFIRMED,
        f"what is cached keeps RMS and determinant to {same:.0e}, the greedy text is "
        + ("the same" if identical else "not the same")
        + f" in all modes, {choices['differ']} of {choices['questions']} choices differ, log-likelihoods by at most "
        f"{largest:.1e}",
        [
            "Root mean square and determinant of each deductive output, averaged over layers, heads and "
            f"{len(rows)} held-out passages: from the first half of each passage; from the cache after the second half was "
            "read with it; and, for comparison, the change if they are worked out anew from the whole passage.",
            table(
                ["tensor", "quantity", "before caching", "after caching", "difference", "anew, whole passage"],
                [
                    [name, quantity.replace("_", " "), f"{one:.15f}", f"{two:.15f}", f"{abs(two - one):.1e}",
                     f"{abs(three - one):.1e}"]
                    for (name, quantity), one, two, three in zip(kinds, before, after, anew, strict=True)
                ],
            ),
            *_choice_section(choices),
            "Inference time, greedy, one sequence.",
            table(
                ["cache", "ms per token", "× no cache"],
                [[cache, f"{1e3 * value:.2f}", f"{seconds['no cache'] / value:.1f}"] for cache, value in seconds.items()],
            ),
        ],
        outputs | {"choices": choices, "seconds_per_token": seconds, "same_text": identical},
        subject=lab.model.name,
    )  # fmt: skip


def _outputs_around_caching(
    model: PldrForCausalLM, rows: torch.Tensor, half: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of the deductive outputs "before", "after" and "anew".

    Of the first half of each passage; of what is in the cache after the second half was read with it; and of the whole
    passage. One passage at a time throughout: a GPU rounds batches of other sizes otherwise.
    """
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
    return {
        when: _statistics(DeductiveOutputs(*(torch.cat(kind, 1) for kind in zip(*outputs, strict=True))))
        for when, outputs in found.items()
    }


def _statistics(outputs: DeductiveOutputs) -> dict[str, dict[str, float]]:
    found = {}
    for name in DeductiveOutputs._fields:
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
def _choices(modes: OperatorModes, rows: torch.Tensor, half: int) -> dict[str, Any]:
    """Log-likelihood of four second halves after each first half, in each mode."""
    end = half + min(16, half)
    scores: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for index, row in enumerate(rows):
        endings = torch.stack([rows[(index + shift) % len(rows), half:end] for shift in range(4)])
        whole = torch.cat((row[:half].expand(4, -1), endings), 1)
        for mode in MODES:
            log_probabilities = modes.logits(mode, whole, half)[:, :-1].double().log_softmax(-1)
            scores[mode].append(log_probabilities.gather(2, endings[..., None]).sum((1, 2)).tolist())
    found = {mode: torch.tensor(values, dtype=torch.float64) for mode, values in scores.items()}
    answers = {mode: values.argmax(1) for mode, values in found.items()}
    different = {mode: int((answer != answers["learned"]).sum()) for mode, answer in answers.items()}
    return {
        "questions": len(rows),
        "right": {mode: int((answer == 0).sum()) for mode, answer in answers.items()},
        "different": different,
        "differ": max(different.values()),
        "largest": {mode: float((values - found["learned"]).abs().max()) for mode, values in found.items()},
    }


def _choice_section(choices: dict[str, Any]) -> list[str]:
    rows = [
        [mode, f"{right} of {choices['questions']}", str(choices["different"][mode]), f"{choices['largest'][mode]:.1e}"]
        for mode, right in choices["right"].items()
    ]
    return [
        "Zero-shot-style choices: which of four second halves belongs to the first half, by log-likelihood.",
        table(["G_LM", "right", "choices that differ", "largest log-likelihood difference"], rows),
    ]


@torch.no_grad()
def transfer(lab: Lab) -> Finding:
    """A learned model's weights with a constant G_LM: its own (v51Gi), and the negative test with others."""
    model, tokenizer = lab.learned_model("transfer")
    rows = lab.passages(tokenizer, lab.size.passages + 1)
    calibration, rows = rows[:1], rows[1:]
    G_LM = stored_operator(frozen_copy(model, calibration))
    generator = torch.Generator().manual_seed(0)
    random = {
        "normal": torch.randn(G_LM.shape, generator=generator).to(G_LM),
        "uniform": torch.rand(G_LM.shape, generator=generator).to(G_LM),
    }
    scale = G_LM.square().mean((-1, -2), keepdim=True).sqrt()
    own = "its own, frozen (v51Gi)"
    variants = {
        own: G_LM,
        "its own, heads in another order": G_LM.roll(1, 1),
        "identity": torch.eye(G_LM.shape[-1]).to(G_LM).expand_as(G_LM),
        **{f"random {kind}": value for kind, value in random.items()},
        **{
            f"random {kind}, scaled to its own RMS": value * scale / value.square().mean().sqrt()
            for kind, value in random.items()
        },
    }
    loss = mean_loss(model, rows)
    gain = mean_loss(model, rows.reshape(-1, 2)) - loss
    losses = {name: mean_loss(frozen_copy(model, G_LM=value), rows) for name, value in variants.items()}
    kept = abs(losses[own] - loss)
    harm = min(value - loss for name, value in losses.items() if name != own)
    confirmed = kept <= INVARIANT_LOSS and harm > 100 * max(kept, INVARIANT_LOSS)
    return Finding(
        "The learned operator replaces its network, and no other does",
        Verdict.CONFIRMED if confirmed else Verdict.NOT_CONFIRMED,
        f"its own operator as a constant moves the loss by {kept:.1e} nats per token, every other one by at least {harm:.2f}",
        [
            f"Held-out loss of the trained weights with each constant, {len(rows)} passages of {rows.shape[1]} tokens. The "
            f"model itself: {loss:.4f}; its context gains it {gain:.2f} nats over one token of context.",
            table(["G_LM", "loss", "against the model"],
                  [[name, f"{value:.4f}", f"{value - loss:+.1e}"] for name, value in losses.items()]),
        ],
        {"loss": loss, "gain": gain, "losses": losses},
        subject=lab.model.name,
    )  # fmt: skip


# --- where G_LM becomes invariant -----------------------------------------------------------------------------------


def invariance(lab: Lab) -> Finding:
    """Where G_LM becomes invariant, where not, and where the model itself collapses."""
    usual, runs = _grid(lab)
    lab.train({name: changes for name, (_, changes) in runs.items()})
    rows = []
    for name, (condition, _) in runs.items():
        found = lab.measure(name)
        rows.append(found | {"condition": condition, "state": state_of(found)})
    order = ("invariant", "varies", "collapsed", "diverged")
    counts = {state: sum(row["state"] == state for row in rows) for state in order}
    cells = []
    for row in rows:
        rate, warmup, units, glus, width, seed = row["condition"]
        settings = [f"{rate:g}", str(warmup), str(units), str(glus), str(width), str(seed)]
        measured = [""] * 4 if row["diverged"] else [
            f"{row['loss']:.3f}", f"{row['gain']:.3f}", f"{max(row['variation']):.1e}", f"{row['frozen_difference']:+.1e}"
        ]  # fmt: skip
        cells.append([*settings, *measured, row["state"]])
    plot_invariance(rows, usual, INVARIANT_VARIATION, lab.folder / "invariance.png")
    partly = Verdict.CONDITIONS if counts["invariant"] else Verdict.NOT_CONFIRMED
    return Finding(
        "G_LM becomes invariant",
        Verdict.CONFIRMED if counts["invariant"] == len(rows) else partly,
        f"of {len(rows)} runs {', '.join(f'{count} {state}' for state, count in counts.items() if count)}",
        [
            f"Invariant: G_LM varies over held-out passages by less than {INVARIANT_VARIATION:g} (relative RMSE, largest "
            f"layer) and freezing it moves the loss by less than {INVARIANT_LOSS:g} nats per token. Collapsed: the whole "
            f"context gains less than {COLLAPSED_GAIN} nats per token over one token of context.",
            table(["peak rate", "warm-up", "R", "N", "F_A", "seed", "loss", "gain", "variation", "frozen − learned",
                   "state"], cells),
            "![the map](invariance.png)",
        ],
        {"runs": rows, "counts": counts},
    )  # fmt: skip


def _grid(lab: Lab) -> tuple[tuple[float, ...], dict[str, tuple[tuple[float, ...], dict[str, Any]]]]:
    """The size's own setting, and by name each run's setting and seed, and what it changes in the recipe."""
    base = lab.size.recipe
    config = base["model"].get("config", {})
    usual = (base["optimization"].get("learning_rate", 1e-3), base["optimization"]["warmup_steps"],
             config.get("metric_learner_units", 8), config.get("metric_learner_glus", 2),
             config.get("metric_learner_width", 170))  # fmt: skip
    conditions = {(*usual, seed) for seed in lab.size.seeds} | set(lab.size.grid)
    runs: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {}
    for condition in sorted(conditions):
        rate, warmup, units, glus, width, seed = condition
        if condition[:-1] == usual:  # the very runs of the other claims
            runs[f"learned-{seed}"] = (condition, {"seed": seed})
            continue
        runs[f"rate{rate:g}-warmup{warmup}-R{units}-N{glus}-W{width}-seed{seed}"] = (condition, {
            "seed": seed, "optimization.learning_rate": rate, "optimization.warmup_steps": warmup,
            "model.config.metric_learner_units": units, "model.config.metric_learner_glus": glus,
            "model.config.metric_learner_width": width,
        })  # fmt: skip
    return usual, runs


# --- operators compared in training ---------------------------------------------------------------------------------


def ablation(lab: Lab) -> Finding:
    """Learned against transferred, uniform, normal and identity operators, and DAG-regularised."""
    seeds = lab.size.seeds
    lab.train({f"learned-{seed}": {"seed": seed} for seed in seeds})
    healthy = [f"learned-{seed}" for seed in seeds if is_healthy(lab.measure(f"learned-{seed}"))]
    if not healthy:
        raise ValueError(
            "reproduce ablation: every learned run diverged or collapsed; there is no operator to transfer; try a larger size"
        )
    source = lab.load(healthy[0])
    assert source is not None
    model, tokenizer = source
    transferred = lab.runs / "transferred-operator"
    freeze(model, lab.passages(tokenizer, 4, part="train")).save_pretrained(transferred)
    variants: dict[str, dict[str, Any]] = {
        "learned": {},
        "DAG-regularised": {f"optimization.dag_{name}": 0.05 for name in DAG_TENSORS},
        "transferred": {"model.G_LM": str(transferred)},
        **{
            init: {"model.config.operator": "constant", "model.config.operator_init": init}
            for init in ("uniform", "normal", "identity")
        },
    }
    return compare_runs(
        lab, "Operators train differently", _measure_variants(lab, variants), "learned",
        "Held-out loss of each kind of operator, the same recipe otherwise; transferred is the operator of the first "
        "learned run that came through, frozen. Uniform on [0, 1] is what the published random operator is. Identity is "
        "ordinary attention.", judge=must_differ,
    )  # fmt: skip


def handoff(lab: Lab) -> Finding:
    """The learned operator handed over as a trainable constant during training, against keeping its network."""
    steps = lab.size.recipe["optimization"].get("steps", 250_000)
    variants: dict[str, dict[str, Any]] = {
        "learned": {},
        "handed off at a half": {"optimization.handoff_step": steps // 2},
        "handed off at a quarter": {"optimization.handoff_step": steps // 4},
    }
    return compare_runs(
        lab, "A handed-off operator can replace its network in training", _measure_variants(lab, variants), "learned",
        "At the step named, the learned operator becomes a trainable constant and its network is dropped; the optimiser "
        "keeps its state for the rest.", judge=must_be_no_worse,
    )  # fmt: skip


def _measure_variants(lab: Lab, variants: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Train every variant with every seed; what was measured of each run, by variant."""
    names = {kind: [f"{kind.replace(' ', '-')}-{seed}" for seed in lab.size.seeds] for kind in variants}
    lab.train({
        name: changes | {"seed": seed}
        for kind, changes in variants.items() for name, seed in zip(names[kind], lab.size.seeds, strict=True)
    })  # fmt: skip
    return {kind: [lab.measure(name) for name in runs] for kind, runs in names.items()}


@dataclass(frozen=True)
class Groups:
    """Variants by how they compare with the reference; one may be `better` beside its other group.

    Attributes:
        apart: means that are distinct.
        near: means that are not.
        unknown: too few runs to tell.
        better: lower mean loss.
    """

    apart: list[str]
    near: list[str]
    unknown: list[str]
    better: list[str]


def must_differ(groups: Groups) -> Verdict:
    if not groups.near + groups.unknown:
        return Verdict.CONFIRMED
    return Verdict.CONDITIONS if groups.apart else Verdict.NOT_CONFIRMED


def must_be_no_worse(groups: Groups) -> Verdict:
    worse = [kind for kind in groups.apart if kind not in groups.better]
    if len(worse) == len(groups.apart + groups.near):
        return Verdict.NOT_CONFIRMED
    return Verdict.CONDITIONS if worse + groups.unknown else Verdict.CONFIRMED


def compare_runs(
    lab: Lab,
    claim: str,
    found: dict[str, list[dict[str, Any]]],
    reference: str,
    text: str,
    *,
    judge: Callable[[Groups], Verdict],
) -> Finding:
    """Compare variants by what was measured of their runs: curves with their spread, final numbers, which differ.

    Runs that diverged or whose attention died are counted, and left out of the means.

    Args:
        found: by variant, of each run what `Lab.measure` found.
        reference: the variant that the others are compared with.
        text: what the page says first.
        judge: the verdict, from how the variants group.
    """
    summary = {kind: _summary(lab, rows) for kind, rows in found.items() if any(map(is_healthy, rows))}
    base = [row["loss"] for row in found[reference] if is_healthy(row)]
    for kind, row in summary.items():
        losses = [run["loss"] for run in found[kind] if is_healthy(run)]
        row["separation"] = None if kind == reference else _separation(losses, base)
    plot_curves(
        {kind: [lab.log(row["run"]) for row in rows] for kind, rows in found.items()}, lab.folder / "curves.png"
    )
    others = {kind: row for kind, row in summary.items() if kind != reference}
    told = {kind: row["separation"] >= DISTINCT for kind, row in others.items() if row["separation"] is not None}
    groups = Groups(
        apart=[kind for kind, distinct in told.items() if distinct],
        near=[kind for kind, distinct in told.items() if not distinct],
        unknown=[kind for kind in found if kind != reference and kind not in told],
        better=[kind for kind, row in others.items() if base and row["loss"][0] < statistics.fmean(base)],
    )
    parts = {f"distinct from {reference}": groups.apart, f"not told apart from {reference}": groups.near,
             "too few runs to tell": groups.unknown, f"lower mean loss than {reference}": groups.better}  # fmt: skip
    reasons = [f"{label}: {', '.join(kinds)}" for label, kinds in parts.items() if kinds]
    cells = [_comparison_row(kind, rows, summary.get(kind), base, reference) for kind, rows in found.items()]
    return Finding(
        claim,
        judge(groups),
        "; ".join(reasons) or "no run came through",
        [
            text,
            table(["operator", "runs", "held-out loss", "accuracy", f"loss against {reference}", "separation"], cells),
            "Mean ± standard deviation over seeds, without runs that diverged or collapsed (whose whole context gains less "
            f"than {COLLAPSED_GAIN} nats per token over one token of it). Separation: difference of the means over their "
            f"standard error (Welch); {DISTINCT:g} or more counts as distinct, and it takes two runs on each side.",
            "![curves](curves.png)",
        ],
        {"runs": found, "summary": summary},
    )


def _summary(lab: Lab, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a variant's healthy runs: mean and spread of loss and accuracy, their number, mean seconds."""
    good = [row for row in rows if is_healthy(row)]
    loss, accuracy = (_mean_and_spread([row[key] for row in good]) for key in ("loss", "accuracy"))
    seconds = [sum(line.get("train_runtime", 0) for line in lab.log(row["run"])) for row in good]
    return {"loss": loss, "accuracy": accuracy, "runs": len(good), "seconds": statistics.fmean(seconds)}


def _comparison_row(
    kind: str, rows: list[dict[str, Any]], summary: dict[str, Any] | None, base: list[float], reference: str
) -> list[str]:
    states = [state_of(row) for row in rows]
    lost = [f"{states.count(state)} {state}" for state in ("collapsed", "diverged") if state in states]
    runs = f"{sum(map(is_healthy, rows))} of {len(rows)}" + (f" ({', '.join(lost)})" if lost else "")
    if summary is None:
        return [kind, runs, "", "", "", ""]
    difference = "" if kind == reference or not base else f"{summary['loss'][0] - statistics.fmean(base):+.4f}"
    separation = "" if summary["separation"] is None else f"{summary['separation']:.1f}"
    return [kind, runs, _shown(*summary["loss"]), _shown(*summary["accuracy"]), difference, separation]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _shown(value: float, spread: float | None) -> str:
    return f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _separation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Welch's t of two samples, in absolute value; None where a sample has fewer than two."""
    if min(len(one), len(other)) < 2:
        return None
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    difference = abs(statistics.fmean(one) - statistics.fmean(other))
    return math.inf if error == 0 and difference else difference / error if error else 0.0


# --- all of them ----------------------------------------------------------------------------------------------------

CLAIMS: dict[str, Callable[[Lab], Finding]] = {
    "caching": caching,
    "fidelity": fidelity,
    "sdpa": sdpa,
    "invariance": invariance,
    "ablation": ablation,
    "transfer": transfer,
    "handoff": handoff,
}
# Claims about one trained model, which they do not train.
OF_A_MODEL = ("caching", "fidelity", "sdpa", "transfer")


def run_claim(claim: str, lab: Lab) -> Finding:
    """Run one claim, and write its page.

    Raises:
        ValueError: an unknown claim, or data or a model that can not work.
        ChildProcessError: a run failed.
    """
    if claim not in CLAIMS:
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}")
    finding = CLAIMS[claim](lab)
    lab.write(finding)
    return replace(finding, page=lab.folder / "README.md")


def reproduce(
    claim: str,
    *,
    size: str = "tiny",
    output: str | os.PathLike[str] = "reproduced",
    train: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    validation: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    parallel: int = 1,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    command: str = "",
) -> list[Finding]:
    """Reproduce a claim of the paper, as `pldr reproduce` does: train what it needs, measure, write tables and pictures.

    Args:
        claim: one of `CLAIMS`, or "all".
        size: one of `pldr.study.lab.SIZES`: tiny (minutes on a CPU), small (minutes on a GPU) or paper.
        output: folder for pages, pictures, numbers and trained runs; finished runs in it are kept.
        train, validation: training and held-out text, both or neither.
        tokenizer: of the runs.
        model: for caching, fidelity, sdpa and transfer, in place of the one that ships with pldr.
        parallel: runs at once.
        device: where models are measured.
        say: takes a line about what happens.
        command: what the pages say they were made with.

    Returns:
        A finding for each claim.

    Raises:
        ValueError, ChildProcessError: see `run_claim`; an option outside its range.
        ModuleNotFoundError: it needs the extra "train".
    """
    require("train", "accelerate", "matplotlib")
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}, got {size!r}")
    if claim not in (*CLAIMS, "all"):
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}, all")
    if (train is None) != (validation is None):
        raise ValueError("train, validation: give both or neither")
    if parallel < 1:
        raise ValueError(f"parallel: must be at least 1, got {parallel}")
    usable_device(device)
    output, findings = Path(output), []
    for name in CLAIMS if claim == "all" else [claim]:
        data = default_data(size, held_out=name in OF_A_MODEL and model is None)
        if train is not None and validation is not None:
            data = {"train": names_of(train), "validation": names_of(validation), "tokenizer": data["tokenizer"]}
            for part in ("train", "validation"):  # a first look, before runs begin that can not work
                next(read_pieces(source_of(DataRecipe(**data), part), BadRows(), streaming=True), None)
        if tokenizer is not None:
            data["tokenizer"] = str(tokenizer)
        lab = Lab(
            SIZES[size], output / name, output / "runs", data, parallel, Path(model or STORIES), device, say, command
        )
        findings.append(run_claim(name, lab))
    return findings
