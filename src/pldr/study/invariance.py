"""Where and when G_LM becomes invariant: the map over settings, the singularity followed through training, and the condition.

The condition is stated from a half of the cells and tested on the other, with all their seeds, and with labels that were shuffled.
"""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from pldr.plots import plot_invariance, plot_trajectories
from pldr.study.lab import (
    COLLAPSED_GAIN,
    INVARIANT_LOSS,
    INVARIANT_VARIATION,
    Cell,
    Finding,
    Lab,
    Verdict,
    state_of,
    table,
)
from pldr.study.significance import LEVEL, share_interval

# What is followed through training, with its name for people; of each layer a number.
FOLLOWED = {
    "G_variation": "variation of G_LM", "G_rank": "numerical rank of G_LM", "G_log10_determinant": "log10 |det G_LM|",
    "row_gain": "gain of the row map",
}  # fmt: skip
_SHUFFLES = 999
_NAMES = {
    "rate": "peak rate",
    "warmup": "warm-up",
    "units": "R",
    "glus": "N",
    "width": "F_A",
    "steps": "steps",
    "data": "data, %",
}


def invariance(lab: Lab) -> Finding:
    """Where G_LM becomes invariant, where not, and where the model itself collapses; and what tells beforehand."""
    runs = _runs(lab)
    measured = lab.measured({name: changes for name, (_, _, changes) in runs.items()})
    rows = []
    for name, (cell, seed, _) in runs.items():
        found, log = measured[name], lab.log(name)
        row = found | {"cell": cell._asdict(), "seed": seed, "state": state_of(found), "trajectory": trajectory(log)}
        rows.append(row | {"known": known_before(cell, row["trajectory"])})
    order = ("invariant", "varies", "collapsed", "diverged")
    counts = {state: sum(row["state"] == state for row in rows) for state in order}
    usual = lab.size.usual
    plot_invariance(rows, usual._asdict(), INVARIANT_VARIATION, lab.folder / "invariance.png")
    plot_trajectories(rows, FOLLOWED, lab.folder / "through-training.png")
    words, condition = find_condition(rows)
    partly = Verdict.CONDITIONS if counts["invariant"] else Verdict.NOT_CONFIRMED
    return Finding(
        "G_LM becomes invariant",
        Verdict.CONFIRMED if counts["invariant"] == len(rows) else partly,
        f"of {len(rows)} runs {', '.join(f'{count} {state}' for state, count in counts.items() if count)}; {words}",
        [
            f"Invariant: G_LM varies over held-out passages by less than {INVARIANT_VARIATION:g} (relative RMSE, largest "
            f"layer) and freezing it moves the loss by less than {INVARIANT_LOSS:g} nats per token. Collapsed: the whole "
            f"context gains less than {COLLAPSED_GAIN} nats per token over one token of context. Order: the order parameter of G_LM "
            "(arXiv 2603.23539; largest layer), how far two random continuations of a prompt drive it apart.",
            _map_table(rows),
            "![the map](invariance.png)\n\nOne line a cell, called by what differs from the recipe; one point a seed.",
            _THROUGH,
            "![through training](through-training.png)",
            _CONDITION,
            words[0].upper() + words[1:] + ".",
        ],
        {"runs": rows, "counts": counts, "condition": condition},
    )  # fmt: skip


_THROUGH = (
    "Followed through training, on held-out rows, the layer that is farthest from a constant (for rank and determinant the largest): "
    "how G_LM varies, its numerical rank (singular values over 1e-2 of the largest), the magnitude of its determinant, and the gain of the "
    "row map: by what the metric learner's residual network lets a small random change of a row grow (Frobenius norm of its Jacobian over √D; "
    "1 leaves it as it is). One line a run."
)
_CONDITION = (
    "The condition: of what is known of a run before its second half (its settings; the largest layer's variation, rank and row gain at the "
    "last evaluation of the first half), the one bound on one quantity that best tells invariant runs from those that vary, in every second "
    "cell of the map; runs that collapsed or diverged are left out. It is tested on all seeds of the other cells. The control is the "
    f"same search where the cells' outcomes are shuffled, {_SHUFFLES} times."
)


def _runs(lab: Lab) -> dict[str, tuple[Cell, int, dict[str, Any]]]:
    """By name each run's cell and seed, and what it changes in the recipe."""
    usual = lab.size.usual
    cells = sorted({usual, *(usual._replace(**differs) for differs in lab.size.cells)})
    runs = {}
    for cell, seed in itertools.product(cells, lab.size.cell_seeds):
        differs = {name: value for name, value in cell._asdict().items() if value != getattr(usual, name)}
        kind = "-".join(["learned", *(f"{name}{value}" for name, value in differs.items() if name != "rate")])
        keys = {
            "warmup": "optimization.warmup_steps", "units": "model.config.metric_learner_units",
            "glus": "model.config.metric_learner_glus", "width": "model.config.metric_learner_width", "steps": "optimization.steps",
        }  # fmt: skip
        changes = {keys[name]: value for name, value in differs.items() if name in keys}
        if cell.data != usual.data:
            changes["data.train_interval"] = f"0%:{cell.data}%"
        changes |= {"optimization.learning_rate": cell.rate, "seed": seed}
        runs[lab.run_name(kind, cell.rate, seed)] = (cell, seed, changes)
    return runs


def trajectory(log: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Of a run's log "step", and of each of `FOLLOWED` the largest layer's value at each evaluation; None where all are infinite."""
    lines = list({line["step"]: line for line in log if "row_gain" in line}.values())
    found: dict[str, list[float | None]] = {"step": [line["step"] for line in lines]}
    for name in FOLLOWED:
        found[name] = [max((value for value in line[name] if value is not None), default=None) for line in lines]
    return found


def known_before(cell: Cell, followed: dict[str, list[float | None]]) -> dict[str, float]:
    """What the condition may be about: the settings, and what is followed, at the last evaluation of the first half."""
    known: dict[str, float] = {name: float(value) for name, value in cell._asdict().items()}
    known["warm-up share"] = cell.warmup / cell.steps
    early = [index for index, step in enumerate(followed["step"]) if step is not None and 2 * step <= cell.steps]
    for name in ("G_variation", "G_rank", "row_gain"):
        if early and (value := followed[name][early[-1]]) is not None:
            known[f"{name} at half time"] = value
    return known


# --- the condition --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A bound on one quantity: a run becomes invariant where it is at least, or at most, so much."""

    quantity: str
    bound: float
    at_least: bool

    def holds(self, known: dict[str, float]) -> bool:
        return known[self.quantity] >= self.bound if self.at_least else known[self.quantity] <= self.bound

    def __str__(self) -> str:
        return f"{_NAMES.get(self.quantity, self.quantity)} {'≥' if self.at_least else '≤'} {self.bound:.3g}"


def best_rule(known: list[dict[str, float]], invariant: list[bool]) -> Rule:
    """The rule with the most right answers; of equal ones the first, by the order of quantities, from low bounds to high ones.

    Bounds lie in the middle between values that were seen; of positive ones, their geometric middle.
    """
    rules = []
    for quantity in (name for name in known[0] if all(name in each for each in known)):
        values = sorted({each[quantity] for each in known})
        for low, high in itertools.pairwise(values):
            bound = math.sqrt(low * high) if low > 0 else (low + high) / 2
            rules += [Rule(quantity, bound, at_least) for at_least in (True, False)]
    if not rules:
        return Rule(next(iter(known[0])), -math.inf, at_least=sum(invariant) * 2 >= len(invariant))
    return max(rules, key=lambda rule: _right(rule, known, invariant))


def _right(rule: Rule, known: list[dict[str, float]], invariant: list[bool]) -> int:
    return sum(rule.holds(each) == outcome for each, outcome in zip(known, invariant, strict=True))


def find_condition(rows: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The rule found in every second cell, and its answers on the others: in words, and in numbers.

    Args:
        rows: of each run "cell", "state" and "known" (`known_before`).
    """
    cells: dict[tuple[tuple[str, float], ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["state"] in ("invariant", "varies"):
            cells.setdefault(tuple(row["cell"].items()), []).append(row)
    known = [[row["known"] for row in cell] for cell in cells.values()]
    outcomes = [[row["state"] == "invariant" for row in cell] for cell in cells.values()]
    both = {outcome for part in (outcomes[::2], outcomes[1::2]) for cell in part for outcome in cell}
    if len(cells) < 4 or len({outcome for cell in outcomes[::2] for outcome in cell}) < 2 or len(both) < 2:
        return "no condition can be stated: it takes four cells, and both outcomes in those that it is found in", {}
    rule, right, of = _found_and_tested(known, outcomes)
    draw, shuffled = random.Random(0), []
    for _ in range(_SHUFFLES):
        order = draw.sample(outcomes, len(outcomes))
        dealt = [
            list(itertools.islice(itertools.cycle(cell), len(own))) for cell, own in zip(order, outcomes, strict=True)
        ]
        shuffled.append(_found_and_tested(known, dealt)[1])
    p = (1 + sum(other >= right for other in shuffled)) / (1 + _SHUFFLES)
    low, high = share_interval(right, of)
    usually = max(sum(cell.count(outcome) for cell in outcomes[1::2]) for outcome in (True, False))
    verdict = "predicts" if p < LEVEL else "does not predict"
    words = (
        f"{rule}, stated from {sum(map(len, outcomes[::2]))} runs, {verdict} which of {of} others become invariant: {right} right "
        f"({right / of:.0%}; exact 95% interval {low:.0%} to {high:.0%}; the commoner outcome alone {usually}; shuffled outcomes do as well with p = {p:.2g})"
    )
    return words, {
        "rule": str(rule), "quantity": rule.quantity, "bound": rule.bound, "at_least": rule.at_least, "right": right, "of": of,
        "interval": [low, high], "commoner": usually, "p_shuffled": p,
    }  # fmt: skip


def _found_and_tested(known: list[list[dict[str, float]]], outcomes: list[list[bool]]) -> tuple[Rule, int, int]:
    """The rule of the even cells, and how many of how many runs of the odd ones it is right about."""

    def flat(part: slice) -> tuple[list[dict[str, float]], list[bool]]:
        return list(itertools.chain(*known[part])), list(itertools.chain(*outcomes[part]))

    rule = best_rule(*flat(slice(0, None, 2)))
    others, wanted = flat(slice(1, None, 2))
    usable = [(each, outcome) for each, outcome in zip(others, wanted, strict=True) if rule.quantity in each]
    return rule, sum(rule.holds(each) == outcome for each, outcome in usable), len(wanted)


def _map_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        settings = [f"{row['cell'][name]:g}" for name in _NAMES]
        measured = [""] * 7 if row["diverged"] else [
            f"{row['loss']:.3f}", f"{row['gain']:.3f}", f"{max(row['variation']):.1e}", f"{max(row['order_parameter']):.1e}", f"{row['frozen_difference']:+.1e}",
            *(("" if not (values := row["trajectory"][name]) or values[-1] is None else f"{values[-1]:.2g}") for name in ("G_rank", "row_gain")),
        ]  # fmt: skip
        cells.append([*settings, str(row["seed"]), *measured, row["state"]])
    header = [
        *_NAMES.values(),
        "seed",
        "loss",
        "gain",
        "variation",
        "order",
        "frozen − learned",
        "rank",
        "row gain",
        "state",
    ]
    return table(header, cells)
