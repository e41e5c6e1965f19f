"""The paper's claims as experiments: each trains what it needs, measures, and writes tables, figures and numbers.

A claim is a function of a `Lab`, which holds the size, the data and the folder, trains runs (several at once, a finished one
only once) and measures trained models. What a claim finds is reported whether it bears the paper out or not.
"""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pldr.cache import make_cache
from pldr.checkpoints.load import load_model
from pldr.deductive import deductive_outputs, log_determinant
from pldr.generation import generate_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import DeductiveOutputs, freeze
from pldr.plots import INVARIANT_LOSS, INVARIANT_VARIATION, plot_curves, plot_invariance
from pldr.study.lab import COLLAPSED_GAIN, Lab, mean_loss, table
from pldr.tokenizer import load_tokenizer

# Log-likelihoods of an ending, some 16 tokens, that differ by no more than this (nats) count as the same.
SAME_LIKELIHOOD = 1e-3
NAMES = ("A", "A_LM", "A_P", "G_LM")


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
    plot_invariance(rows, usual, lab.folder / "invariance.png")
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
    plot_curves(
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
    loss = mean_loss(model, rows)
    gain = mean_loss(model, rows.reshape(-1, 2)) - loss
    losses = {
        name: mean_loss(freeze(copy.deepcopy(model), G_LM=value.clone()), rows) for name, value in variants.items()
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
