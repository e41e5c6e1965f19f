"""What is drawn: operators, training curves, the pictures of claims."""

import colorsys
import functools
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from pldr.files import check_shape, read_json_lines, require, whole_file
from pldr.recipe import DAG_TENSORS

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# A grey that reads on white and on black alike, for all that is no data; pages have either background.
_NEUTRAL = "#808080"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), _NEUTRAL),
    "grid.color": _NEUTRAL, "legend.facecolor": "none", "legend.edgecolor": _NEUTRAL, "legend.labelcolor": _NEUTRAL,
}  # fmt: skip


P = ParamSpec("P")
R = TypeVar("R")


def _drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in this style; matplotlib comes with the extra "train"."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        require("train", "matplotlib")
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple["Figure", Any]:
    """A figure of `size` inches and its axes [rows, columns].

    It is none of pyplot's, so that a notebook's own figures, and the backend that shows them, stay as they are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """As a PNG with no background of its own, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png", transparent=True)


def _finish(axes: Iterable["Axes"], **labels: str) -> None:
    for axis in axes:
        axis.set(**labels)
        axis.legend()
        axis.grid(alpha=0.3)


# --- operators ------------------------------------------------------------------------------------------------------


@_drawn
def plot_operators(
    rows: dict[str, "torch.Tensor"],
    path: str | os.PathLike[str],
    *,
    layers: Iterable[int] | None = None,
    heads: int = 4,
    title: str = "",
) -> None:
    """Heatmaps of G_LM, as a PNG file: one row of pictures for each entry of `rows` and layer, one column a head.

    Args:
        rows: label → [L, H, D, D]; the rows of a layer share one colour scale, symmetric around zero.
        layers: which to show, all by default.
        heads: most heads to show.
    """
    shape = next(iter(rows.values())).shape
    shown, heads = list(range(shape[0]) if layers is None else layers), min(heads, shape[1])
    count = len(shown) * len(rows)
    figure, axes = _figure((2.0 * heads + 1.6, 2.0 * count + 0.6), count, heads)
    for head in range(heads):
        axes[0, head].set_title(f"head {head}", fontsize=9)
    for place, layer in enumerate(shown):
        bound = max(float(value[layer, :heads].abs().max()) for value in rows.values())
        lines = axes[place * len(rows) : (place + 1) * len(rows)]
        for line, (label, value) in zip(lines, rows.items(), strict=True):
            for head, axis in enumerate(line):
                picture = value[layer, head].float().cpu().numpy()
                image = axis.imshow(picture, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(f"layer {layer}\n{label}", fontsize=9)
            figure.colorbar(image, ax=line[-1], fraction=0.05)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


# --- a training run -------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """One picture of a run: what it shows of the log's lines.

    Attributes:
        title, unit: of the picture, and of its vertical axis.
        curves: name in the log → label; what has a value a layer is a curve a layer, in place of the label.
        scale: of the vertical axis; on "log" magnitudes are drawn.
        mark: a value that means something, as a line.
    """

    title: str
    unit: str
    curves: dict[str, str]
    scale: str = "linear"
    mark: float | None = None


_LAYERS = "layer"
_PANELS = (
    _Panel("loss", "nats per token", {"loss": "training", "eval_loss": "validation", "eval_regularised_loss": "validation + DAG loss",
                                      "test_loss": "test", "test_regularised_loss": "test + DAG loss"}),
    _Panel("accuracy", "fraction of tokens", {"accuracy": "training", "eval_accuracy": "validation", "test_accuracy": "test"}),
    _Panel("learning rate", "", {"learning_rate": "learning rate"}),
    _Panel("norm of the gradient", "before it is clipped", {"grad_norm": "norm"}, "log"),
    _Panel("variation of G_LM over held-out passages", "relative RMSE", {"G_variation": _LAYERS}, "log"),
    _Panel("loss with G_LM frozen", "nats per token", {"G_frozen_difference": "|frozen - learned|"}, "log"),
    _Panel("rank of G_LM", "singular values > 1e-2 of the largest", {"G_rank": _LAYERS}),
    _Panel("determinant of G_LM", "log10 |det|", {"G_log10_determinant": _LAYERS}),
    _Panel("growth of a small change of a row: random", "factor, RMS", {"row_gain": _LAYERS}, "log", 1.0),
    _Panel("growth of a small change of a row: the worst", "factor", {"row_norm": _LAYERS}, "log", 1.0),
    _Panel("DAG loss", "", {f"dag_{name}": name for name in DAG_TENSORS}, "log"),
)  # fmt: skip
_COLUMNS = 4


@_drawn
def plot_run(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """What the log of a training run holds, over its steps.

    Loss, with the steps that were skipped, accuracy, learning rate and norm of the gradient; of a learned operator how far G_LM
    varies, what freezing it costs, its rank and determinant, by what the metric learner's network lets a change of a row grow,
    and the DAG loss of each deductive output. What the log has nothing of is left out.

    Args:
        run: output folder of `pldr train`, with its ``log.jsonl``.
        output: PNG file to write; ``curves.png`` in the folder by default.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: it needs the extra "train".
        FileNotFoundError: the folder has no log.
        ValueError: the log is damaged (line named) or empty.
    """
    file, output = Path(run) / "log.jsonl", Path(output or Path(run) / "curves.png")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {run} is not the output of pldr train")
    log = _read_log(file)
    held = {name for line in log for name, value in line.items() if value is not None}
    if not held & {"loss", "eval_loss"}:
        raise ValueError(f"{file}: holds no loss to plot")
    panels = [panel for panel in _PANELS if held & panel.curves.keys()]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure((4.5 * columns, 3.6 * rows), rows, columns)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _plot_panel(axis, panel, log)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for number, step in enumerate(_curve(log, "skipped_loss")[0]):
        axes[0, 0].axvline(
            step, linewidth=0.8, linestyle=":", color="tab:red", label=None if number else "skipped steps"
        )
    _finish(axes.flat[: len(panels)], xlabel="step")
    _save(figure, output)
    return output


def _plot_panel(axis: "Axes", panel: _Panel, log: list[dict[str, Any]]) -> None:
    import numpy as np

    for name, label in panel.curves.items():
        steps, found = _curve(log, name)
        if not steps:
            continue
        values = np.array(found, dtype=float)  # [points] or [points, layers]; null is NaN, and not drawn
        if panel.scale == "log":
            values = abs(values)
        marker = "." if len(steps) < 60 else None
        if label != _LAYERS:
            axis.plot(steps, values, marker=marker, label=label)
            continue
        layers = values.shape[-1]
        every = -(-layers // 8)  # has a label
        for layer in range(layers):
            axis.plot(
                steps, values[:, layer], marker=marker, color=_layer_colour(layer, layers),
                label=None if layer % every else f"layer {layer}",
            )  # fmt: skip
    if panel.mark is not None:
        axis.axhline(panel.mark, linewidth=0.8, color=_NEUTRAL)
    axis.set(title=panel.title, ylabel=panel.unit, yscale=panel.scale)


def _layer_colour(layer: int, layers: int) -> tuple[float, float, float]:
    """From blue over purple to red, all of them readable on white and on black."""
    return colorsys.hls_to_rgb(0.55 + 0.45 * layer / max(1, layers - 1), 0.55, 0.65)


def _curve(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    """Steps and values, of the lines that have one."""
    lines = [line for line in log if line.get(name) is not None]
    return [line["step"] for line in lines], [line[name] for line in lines]


# What is drawn of a line, where it has it; see `pldr.files.check_shape`.
_DRAWN: dict[str, Any] = {
    name: [(float,)] if label == _LAYERS else (float,) for panel in _PANELS for name, label in panel.curves.items()
}


def _read_log(file: Path) -> list[dict[str, Any]]:
    """Raises ValueError: a line that no training wrote (named)."""
    lines = []
    for where, line in read_json_lines(file):
        try:
            check_shape(line, {"step": int})
            check_shape(line, {name: shape for name, shape in _DRAWN.items() if line.get(name) is not None})
        except ValueError as error:
            raise ValueError(f"{where}: not a line of a training log ({error})") from None
        lines.append(line)
    for name in (name for name, shape in _DRAWN.items() if isinstance(shape, list)):
        if len({len(line[name]) for line in lines if line.get(name) is not None}) > 1:
            raise ValueError(f"{file}: {name} has different numbers of layers; this is the log of several runs")
    return lines


# --- claims ---------------------------------------------------------------------------------------------------------


# Colours that those who are colour-blind tell apart, too, and markers.
_STATES = {"invariant": ("#0072B2", "o"), "varies": ("#E69F00", "s"), "collapsed": ("#CC79A7", "X"), "diverged": (_NEUTRAL, "x")}  # fmt: skip


@_drawn
def plot_invariance(rows: list[dict[str, Any]], usual: dict[str, float], bound: float, path: Path) -> None:
    """By cell, in a line of its own, the variation of every run's G_LM and its loss.

    Args:
        rows: of each run "cell" (its settings by name) and "state"; unless "diverged", "loss" and "variation", layer by layer.
        usual: settings by name; cells are called by what differs from them.
        bound: of the variation, for what counts as invariant: a line.
        path: PNG file to write.
    """
    names = [
        ", ".join(f"{name} {value:g}" for name, value in row["cell"].items() if value != usual[name]) or "as it is"
        for row in rows
    ]
    cells = list(dict.fromkeys(["as it is", *names]))
    figure, (axes,) = _figure((11, 1.2 + 0.3 * len(cells)), 1, 2)
    for axis, value in zip(axes, (lambda row: max(row["variation"]), lambda row: row["loss"]), strict=True):
        for state, (colour, marker) in _STATES.items():
            points = [
                (value(row), cells.index(name))
                for row, name in zip(rows, names, strict=True)
                if row["state"] == state and not row["diverged"]
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), color=colour, marker=marker, label=state, alpha=0.8)
        axis.set_ylim(len(cells) - 0.5, -0.5)
        axis.set_yticks(range(len(cells)), cells if axis is axes[0] else [])
    axes[0].axvline(bound, linewidth=0.8, color=_NEUTRAL)
    axes[0].set(xscale="log", xlabel="variation of G_LM over held-out passages")
    axes[1].set(xlabel="held-out loss, nats per token")
    _finish(axes)
    _save(figure, path)


@_drawn
def plot_trajectories(rows: list[dict[str, Any]], quantities: dict[str, str], path: Path) -> None:
    """What is followed through training, a line for each run, in the colour of what became of it.

    Args:
        rows: of each run "state" and "trajectory": "step" and, by quantity, a number or None at each.
        quantities: name → title of its picture.
        path: PNG file to write.
    """
    figure, axes = _figure((4.5 * len(quantities), 4), 1, len(quantities))
    for axis, (name, title) in zip(axes[0], quantities.items(), strict=True):
        labelled = set()
        for row in rows:
            steps, values = row["trajectory"]["step"], row["trajectory"][name]
            points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            if points:
                label = None if row["state"] in labelled else row["state"]
                labelled.add(row["state"])
                axis.plot(
                    *zip(*points, strict=True), color=_STATES[row["state"]][0], label=label, linewidth=0.9, alpha=0.8
                )
        axis.set(title=title, yscale="log" if name in ("G_variation", "row_gain") else "linear")
    _finish(axes[0], xlabel="step")
    _save(figure, path)


@_drawn
def plot_curves(logs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Losses and accuracy over steps: of each variant the mean of its runs, and their range.

    Args:
        logs: by variant the lines of each run's log; a run without any is left out.
        path: PNG file to write.
    """
    figure, axes = _figure((15, 4.5), 1, 3)
    titles = {"loss": "training loss", "eval_loss": "validation loss", "eval_accuracy": "validation accuracy"}
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        for kind, runs in logs.items():
            curves = [dict(zip(*_curve(log, key), strict=True)) for log in runs if log]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            values = [[curve[step] for curve in curves] for step in steps]
            (line,) = axis.plot(steps, [statistics.fmean(row) for row in values], label=kind, linewidth=1.2)
            low, high = ([bound(row) for row in values] for bound in (min, max))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(title)
    _finish(axes[0], xlabel="step")
    _save(figure, path)
