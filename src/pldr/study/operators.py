"""Operators compared in training: the ablation, each operator at its own best rate, and the operator that is handed over.

What is compared is chosen on one half of the validation text and reported on the other (`Lab.measure`).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from pldr.evaluation.modes import frozen_copy
from pldr.modeling_pldr import PldrAttention, PldrForCausalLM
from pldr.operator import freeze, stored_operator
from pldr.plots import plot_curves
from pldr.recipe import DAG_TENSORS, load_recipe
from pldr.study.lab import COLLAPSED_GAIN, Finding, Lab, Verdict, is_healthy, mean_loss, state_of, table
from pldr.study.significance import LEVEL, Difference, hedges_g, holm, paired, permutation_p, welch
from pldr.study.timing import seconds_per_step

# Losses within this (nats per token) are equivalent: two percent of perplexity, and a sixth of the 0.125 by which learned and
# identity operators differed in the runs of 2026-11-23, which came before this was set.
MARGIN = 0.02
# The operator that is ordinary attention; and that with as many parameters as the learned one has.
_ORDINARY, _WIDE = "identity", "wider identity"

Changes = dict[str, Any]
Found = dict[str, Any]


# --- each at its own best rate --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A variant at several peak rates, with the seeds of a cell each.

    Attributes:
        runs: by rate, of each seed the loss on the half to choose by; None of a run that diverged or collapsed.
    """

    runs: dict[float, tuple[float | None, ...]]

    @property
    def losses(self) -> dict[float, float | None]:
        """By rate the mean over seeds; None where one of them was lost, since a rate that fails is not to be chosen."""
        return {
            rate: None if None in losses else statistics.fmean(loss for loss in losses if loss is not None)
            for rate, losses in self.runs.items()
        }

    @property
    def best(self) -> float | None:
        """The rate of the lowest mean; None where there is none."""
        whole = {rate: loss for rate, loss in self.losses.items() if loss is not None}
        return min(whole, key=lambda rate: whole[rate]) if whole else None

    @property
    def next_rate(self) -> float | None:
        """The rate beyond the edge that the best one lies at, if it does."""
        lowest, highest = min(self.runs), max(self.runs)
        return {lowest: lowest / 2, highest: highest * 2}.get(self.best or 0.0)


def sweep(lab: Lab, variants: dict[str, Changes]) -> dict[str, Sweep]:
    """Each variant at the size's rates, and beyond them while the best one is the last on its side."""
    seeds = lab.size.cell_seeds
    rates = {kind: list(lab.size.rates) for kind in variants}
    for turn in range(lab.size.extensions + 1):
        measured = lab.measured({
            lab.run_name(kind, rate, seed): _at(changes, rate, seed)
            for kind, changes in variants.items() for rate in rates[kind] for seed in seeds
        })  # fmt: skip
        found = {
            kind: Sweep({
                rate: tuple(_loss_to_choose(measured[lab.run_name(kind, rate, seed)]) for seed in seeds)
                for rate in sorted(own)
            })
            for kind, own in rates.items()
        }  # fmt: skip
        further = {kind: each.next_rate for kind, each in found.items() if each.next_rate is not None}
        if not further or turn == lab.size.extensions:
            break
        for kind, rate in further.items():
            rates[kind].append(rate)
    return found


def _at(changes: Changes, rate: float, seed: int) -> Changes:
    return {"optimization.learning_rate": rate, **changes, "seed": seed}


def _loss_to_choose(found: Found) -> float | None:
    return float(found["loss_to_choose"]) if is_healthy(found) else None


def _train_seeds(lab: Lab, variants: dict[str, Changes], rates: dict[str, float]) -> dict[str, list[Found]]:
    """Every variant that has a rate with every seed; what was measured of each run, by variant."""
    names = {kind: {lab.run_name(kind, rate, seed): seed for seed in lab.size.seeds} for kind, rate in rates.items()}
    measured = lab.measured({
        name: _at(variants[kind], rates[kind], seed) for kind, runs in names.items() for name, seed in runs.items()
    })  # fmt: skip
    return {kind: [measured[name] for name in runs] for kind, runs in names.items()}


# --- the ablation ---------------------------------------------------------------------------------------------------


def ablation(lab: Lab) -> Finding:
    """Learned against transferred, uniform, normal and identity operators, and DAG-regularised."""
    sweeps = sweep(lab, {"learned": {}})
    best = sweeps["learned"].best
    if best is None:
        raise ValueError(
            "reproduce ablation: at every rate a learned run diverged or collapsed; there is no operator to transfer; try a larger size"
        )
    learned = lab.load(lab.run_name("learned", best, lab.size.seeds[0]))
    assert learned is not None
    variants = _variants(lab, *learned)
    sweeps |= sweep(lab, {kind: changes for kind, changes in variants.items() if kind != "learned"})
    rates = {kind: each.best for kind, each in sweeps.items() if each.best is not None}
    found = _train_seeds(lab, variants, rates)
    compared = compare_runs(found, "learned")
    plot_curves(
        {kind: [lab.log(row["run"]) for row in rows] for kind, rows in found.items()}, lab.folder / "curves.png"
    )
    ordinary, numbers = _against_ordinary(lab, found)
    apart = [kind for kind, row in compared.items() if row["apart"]]
    lost = [kind for kind in variants if kind not in rates]
    parts = {
        "worse than learned": [kind for kind in apart if compared[kind]["difference"] > 0],
        "better than learned": [kind for kind in apart if compared[kind]["difference"] < 0],
        "not told apart from learned": [kind for kind in compared if kind not in apart],
        "diverged or collapsed at every rate": lost,
    }
    reasons = [f"{label}: {', '.join(kinds)}" for label, kinds in parts.items() if kinds]
    return Finding(
        "Operators train differently", _verdict(apart, [*compared, *lost]), "; ".join([*reasons, *ordinary]),
        [
            "Held-out loss of each kind of operator at its own best peak rate, the same recipe otherwise; transferred is the operator of "
            "the first learned run, frozen. Uniform on [0, 1] is what the published random operator is. Identity is ordinary attention; "
            f"the wider one has as many parameters as the learned operator's model, by its feed-forward. {_CHOICE.format(len(lab.size.cell_seeds))}",
            _sweep_table(sweeps),
            "Chosen like that, with every seed, on the other half:",
            _comparison_table(found, compared, "learned"),
            _METHOD,
            "Learned against ordinary attention, corrected by Holm over the three: " + "; ".join(ordinary) + ".",
            _TIME.format(**numbers["seconds_per_step"]) if numbers.get("seconds_per_step") else "",
            "![curves](curves.png)",
        ],
        {"runs": found, "compared": compared, "sweeps": {kind: each.runs for kind, each in sweeps.items()},
         "rates": rates, "against_ordinary": numbers},
    )  # fmt: skip


_CHOICE = (
    "Each was tried at these rates, with seeds: {}; and further by factors of two where the best lay at an edge (as often as the size allows). "
    "Chosen is the lowest mean loss on the first half of the validation text, of the rates at which no run was lost."
)
_METHOD = (
    f"Mean ± standard deviation over seeds, without runs that diverged or collapsed (whose whole context gains less than {COLLAPSED_GAIN} "
    "nats per token over one token of it). Intervals are of 95%, each by itself; g is Hedges'. Tests are Welch's, because the spreads are "
    f"unequal, corrected by Holm for their number: below {LEVEL:g} two operators are told apart. The exact permutation test stands beside it."
)
_TIME = (
    "Seconds a step, alone on the device (median of 5 blocks of 5): {learned:.4f} learned, {identity:.4f} identity. At equal time: the validation loss "
    "in the logs (linear between evaluations) of the dearer one where the cheaper one's run ended. That favours the cheaper one, whose rate "
    "had come down by then."
)


def _variants(lab: Lab, model: PldrForCausalLM, tokenizer: Any) -> dict[str, Changes]:
    """What each kind of operator changes in the recipe; the learned model gives its operator and its size."""
    operators: list[Any] = [cast(PldrAttention, layer.self_attn).operator for layer in model.model.layers]
    config, extra = model.config, sum(parameter.numel() for each in operators for parameter in each.parameters())
    # A unit of the feed-forward's width has a column in two matrices and their biases, and a row of the third.
    assert config.intermediate_size is not None  # filled in by the configuration
    wider = config.intermediate_size + round(extra / (config.num_hidden_layers * (3 * config.hidden_size + 2)))
    transferred = lab.runs / "transferred-operator"
    freeze(model, lab.passages(tokenizer, 4, part="train")).save_pretrained(transferred)
    constant = {
        init: {"model.config.operator": "constant", "model.config.operator_init": init}
        for init in ("uniform", "normal", "identity")
    }
    return {
        "learned": {},
        "DAG-regularised": {f"optimization.dag_{name}": 0.05 for name in DAG_TENSORS},
        "transferred": {"model.G_LM": str(transferred)},
        **constant,
        _WIDE: constant["identity"] | {"model.config.intermediate_size": wider},
    }


def compare_runs(found: dict[str, list[Found]], reference: str) -> dict[str, dict[str, Any]]:
    """Each variant's healthy runs against the reference's: the difference of mean losses, its interval, tests, effect size.

    Returns:
        By variant, but the reference: "difference" (more is worse), "interval", "p", "p_holm", "p_permutation", "g"; and
        "apart", whether the corrected test tells them apart. Nothing but "apart" where a side has fewer than two runs.
    """
    losses = {kind: [row["loss"] for row in rows if is_healthy(row)] for kind, rows in found.items()}
    base: list[float] = losses[reference]
    compared: dict[str, dict[str, Any]] = {}
    for kind, own in losses.items():
        if kind != reference:
            difference = welch(base, own)
            compared[kind] = {} if difference is None else difference.to_json() | {
                "p_permutation": permutation_p(base, own), "g": hedges_g(base, own)
            }  # fmt: skip
    for kind, p in holm({kind: row["p"] for kind, row in compared.items() if row}).items():
        compared[kind]["p_holm"] = p
    for row in compared.values():
        row["apart"] = row.get("p_holm", 1.0) < LEVEL
    return compared


def _verdict(apart: Sequence[str], of: Sequence[str]) -> Verdict:
    """Whether all of them differ, some do, or none."""
    if len(apart) == len(of):
        return Verdict.CONFIRMED
    return Verdict.CONDITIONS if apart else Verdict.NOT_CONFIRMED


def _against_ordinary(lab: Lab, found: dict[str, list[Found]]) -> tuple[list[str], dict[str, Any]]:
    """Learned less ordinary attention: at equal tokens, equal time and equal parameters, in words and numbers."""
    losses = {kind: [row["loss"] for row in rows if is_healthy(row)] for kind, rows in found.items()}
    learned = losses["learned"]
    cases: dict[str, Difference | None] = {
        "at equal tokens": welch(losses.get(_ORDINARY, []), learned),
        "at equal parameters": welch(losses.get(_WIDE, []), learned),
    }
    numbers: dict[str, Any] = {}
    if losses.get(_ORDINARY):
        steps = lab.size.usual.steps
        seconds = _times(lab, {kind: found[kind] for kind in ("learned", _ORDINARY)})
        end = {kind: steps * min(1.0, min(seconds.values()) / value) for kind, value in seconds.items()}
        at_time = {
            kind: [loss_at(lab.log(row["run"]), end[kind]) for row in found[kind] if is_healthy(row)] for kind in end
        }
        cases["at equal time"] = welch(at_time[_ORDINARY], at_time["learned"])
        more = steps * seconds["learned"] / seconds[_ORDINARY]
        numbers = {"seconds_per_step": seconds, "steps_at_equal_time": end, "losses_at_equal_time": at_time,
                   "steps_of_identity_in_the_time_of_learned": more}  # fmt: skip
    corrected = holm({case: d.p for case, d in cases.items() if d is not None})
    words = [
        f"{case} learned is {'worse' if difference.value > 0 else 'better'} than ordinary attention ({_shown_difference(difference)})"
        if difference is not None and corrected[case] < LEVEL
        else f"{case} learned is not told apart from ordinary attention"
        + ("" if difference is None else f" ({_shown_difference(difference)})")
        for case, difference in cases.items()
    ]
    if numbers:
        words.append(f"identity would have done {more:,.0f} steps in the time of {steps:,} learned ones")
    tested = {case: d.to_json() | {"p_holm": corrected[case]} for case, d in cases.items() if d is not None}
    return words, numbers | {"cases": tested}


def _shown_difference(difference: Difference) -> str:
    low, high = difference.interval()
    return f"{difference.value:+.4f} nats, 95% interval {low:+.4f} to {high:+.4f}"


def _times(lab: Lab, found: dict[str, list[Found]]) -> dict[str, float]:
    """Seconds a step of the first healthy run of each, trained where runs are."""
    device, models = "cuda" if torch.cuda.is_available() else "cpu", {}
    names = {kind: next(row["run"] for row in rows if is_healthy(row)) for kind, rows in found.items()}
    for kind, name in names.items():
        loaded = lab.load(name)
        assert loaded is not None
        models[kind] = loaded[0].to(device)
    recipe = load_recipe(lab.runs / f"{names['learned']}.yaml")
    return seconds_per_step(models, recipe.optimization, lab.size.length)


def loss_at(log: list[dict[str, Any]], step: float) -> float:
    """The validation loss at a step, on straight lines between evaluations; before the first one, its own."""
    curve = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    before = max((point for point in curve if point[0] <= step), default=curve[0])
    after = min((point for point in curve if point[0] >= step), default=curve[-1])
    if after[0] <= before[0]:
        return float(before[1])
    share = (step - before[0]) / (after[0] - before[0])
    return float(before[1] + share * (after[1] - before[1]))


# --- handed over ----------------------------------------------------------------------------------------------------


def handoff(lab: Lab) -> Finding:
    """The learned operator as a constant: handed over during training, and after it; against keeping its network."""
    best = sweep(lab, {"learned": {}})["learned"].best
    if best is None:
        raise ValueError("reproduce handoff: at every rate a learned run diverged or collapsed; try a larger size")
    steps = lab.size.usual.steps
    variants: dict[str, Changes] = {
        "learned": {},
        "handed off at a quarter": {"optimization.handoff_step": steps // 4},
        "handed off at a half": {"optimization.handoff_step": steps // 2},
    }
    found = _train_seeds(lab, variants, dict.fromkeys(variants, best))
    plot_curves(
        {kind: [lab.log(row["run"]) for row in rows] for kind, rows in found.items()}, lab.folder / "curves.png"
    )
    losses = {
        kind: {seed: row["loss"] for seed, row in zip(lab.size.seeds, rows, strict=True) if is_healthy(row)}
        for kind, rows in found.items()
    }
    controls = ("random uniform", "random normal")
    losses |= _after_training(lab, best, losses["learned"], controls)
    judged = {kind: judge(losses["learned"], own) for kind, own in losses.items() if kind != "learned"}
    handed = [kind for kind in judged if kind not in controls]
    passed = [kind for kind in controls if judged[kind]["not worse"] is not False]
    held = [kind for kind in handed if judged[kind]["not worse"] and not passed]
    reasons = [f"{kind}: {_judged_words(row)}" for kind, row in judged.items() if kind in handed]
    if passed:
        reasons.append(f"the check is void, because it does not refuse: {', '.join(passed)}")
    cells = [
        [kind, str(len(own)), _mean(list(own.values())), *_judged_cells(judged.get(kind))]
        for kind, own in losses.items()
    ]
    return Finding(
        "A handed-off operator can replace its network in training", _verdict(held, handed), "; ".join(reasons),
        [
            "At the step named the learned operator becomes a trainable constant and its network is dropped; the optimiser keeps its "
            "state for the rest. At the end: the trained model with its operator frozen, without any further step. The controls are the "
            f"trained models with a random operator in its place. All at the learned operator's best rate, {best:g}.",
            table(["operator", "runs", "held-out loss", "against learned (90% interval)", "p not worse", "p equivalent", "judged"], cells),
            f"Pairs of runs of the same seed, which are one run up to the hand-off. The margin, {MARGIN:g} nats per token, was set before: two "
            "percent of perplexity. Equivalent: both one-sided tests (TOST) reject a difference of the margin or more. Not worse: the upper one "
            f"does. p below {LEVEL:g}, without correction, because all of them must hold for the verdict. A control must be worse by more than "
            "the margin at the same level.",
            "![curves](curves.png)",
        ],
        {"rate": best, "margin": MARGIN, "runs": found, "losses": losses, "judged": judged},
    )  # fmt: skip


@torch.no_grad()
def _after_training(
    lab: Lab, rate: float, learned: dict[int, float], controls: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Losses of the learned runs, by seed, with their operator frozen, and with a random one of its shape."""
    found: dict[str, dict[int, float]] = {kind: {} for kind in ("handed off at the end", *controls)}
    for seed, loss in learned.items():
        name = lab.run_name("learned", rate, seed)
        found["handed off at the end"][seed] = loss + lab.measure(name)["frozen_difference"]
        loaded = lab.load(name)
        assert loaded is not None
        model, tokenizer = loaded
        rows = lab.halves(tokenizer)[1]
        like = stored_operator(frozen_copy(model, rows[:1]))
        generator = torch.Generator().manual_seed(seed)
        for kind, draw in zip(controls, (torch.rand, torch.randn), strict=True):
            found[kind][seed] = mean_loss(frozen_copy(model, G_LM=draw(like.shape, generator=generator)), rows)
    return found


def judge(reference: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Losses by seed against the reference's of the same seeds: equivalent, not worse, worse (by the margin), or unknown.

    Returns:
        "difference", "interval" (90%), "p_not_worse", "p_equivalent", "p_worse"; "not worse": true, false where it is worse by more
        than the margin, None where neither is known; and "equivalent".
    """
    seeds = [seed for seed in reference if seed in other]
    difference = paired([reference[seed] for seed in seeds], [other[seed] for seed in seeds])
    if difference is None:
        return {"not worse": None, "equivalent": None, "pairs": len(seeds)}
    not_worse, equivalent = difference.p_below(MARGIN), difference.p_equivalent(MARGIN)
    worse = 1 - not_worse
    known = True if not_worse < LEVEL else False if worse < LEVEL else None
    return {
        "difference": difference.value, "interval": list(difference.interval(2 * LEVEL)), "p_not_worse": not_worse,
        "p_equivalent": equivalent, "p_worse": worse, "not worse": known, "equivalent": equivalent < LEVEL, "pairs": len(seeds),
    }  # fmt: skip


def _judged_words(row: dict[str, Any]) -> str:
    if row["not worse"] is None:
        if "difference" not in row:
            return "too few runs to tell"
        return f"undecided ({row['difference']:+.1e} nats, 90% interval {row['interval'][0]:+.1e} to {row['interval'][1]:+.1e})"
    if not row["not worse"]:
        return f"worse by more than {MARGIN:g} nats ({row['difference']:+.1e})"
    return ("equivalent" if row["equivalent"] else "not worse") + f" ({row['difference']:+.1e} nats)"


def _judged_cells(row: dict[str, Any] | None) -> list[str]:
    if row is None or "difference" not in row:
        return ["", "", "", "" if row is None else _judged_words(row)]
    low, high = row["interval"]
    ps = [f"{row[name]:.2g}" for name in ("p_not_worse", "p_equivalent")]
    return [f"{row['difference']:+.1e} ({low:+.1e} to {high:+.1e})", *ps, _judged_words(row).split(" (")[0]]


# --- tables ---------------------------------------------------------------------------------------------------------


def _sweep_table(sweeps: dict[str, Sweep]) -> str:
    rates = sorted({rate for each in sweeps.values() for rate in each.runs})
    rows = []
    for kind, each in sweeps.items():
        cells = [
            "" if rate not in each.runs else f"{each.runs[rate].count(None)} lost" if (loss := each.losses[rate]) is None else f"{loss:.4f}"
            for rate in rates
        ]  # fmt: skip
        best = "none" if each.best is None else f"{each.best:g}" + (" (at the edge)" if each.next_rate else "")
        rows.append([kind, *cells, best])
    return table(["operator", *(f"{rate:g}" for rate in rates), "best rate"], rows)


def _comparison_table(found: dict[str, list[Found]], compared: dict[str, dict[str, Any]], reference: str) -> str:
    rows = []
    for kind, runs in found.items():
        states = [state_of(row) for row in runs]
        good = [row for row in runs if is_healthy(row)]
        lost = [f"{states.count(state)} {state}" for state in ("collapsed", "diverged") if state in states]
        count = f"{len(good)} of {len(runs)}" + (f" ({', '.join(lost)})" if lost else "")
        means = [_mean([row[key] for row in good]) for key in ("loss", "accuracy")] if good else ["", ""]
        row, cells = compared.get(kind, {}), [""] * 4
        if "difference" in row:
            low, high = row["interval"]
            cells = [f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})", "" if row["g"] is None else f"{row['g']:+.1f}",
                     f"{row['p_holm']:.2g}", f"{row['p_permutation']:.2g}"]  # fmt: skip
        rows.append([kind, count, *means, *cells])
    header = ["operator", "runs", "held-out loss", "accuracy", f"loss against {reference} (95% interval)", "g", "p (Welch, Holm)",
              "p (permutation)"]  # fmt: skip
    return table(header, rows)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
