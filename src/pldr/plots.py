"""What is drawn: operators, training curves, the pictures of claims."""

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pldr.files import whole_file


def plot_invariance(rows: list[dict[str, Any]], usual: tuple[float, ...], bound: float, path: Path) -> None:
    """Every run's loss over the variation of its G_LM, with a line at the bound of what counts as invariant."""
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
    axis.axvline(bound, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="variation of G_LM over held-out passages", ylabel="held-out loss, nats a token",
             title="labels: what differs from " + ", ".join(f"{n} {v:g}" for n, v in zip(names, usual, strict=True)))  # fmt: skip
    axis.legend()
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_curves(logs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
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


def plot_operators(
    rows: dict[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    layers: Iterable[int] | None = None,
    heads: int = 4,
    title: str = "",
) -> None:
    """Heatmaps of G_LM: one row of pictures for each entry of `rows` and layer, one column a head.

    Args:
        rows: label → [L, H, D, D]; the rows of a layer share one colour scale, symmetric around zero.
        path: PNG file to write.
        layers: which to show, all by default.
        heads: most heads to show.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = next(iter(rows.values())).shape
    shown, heads = list(range(shape[0]) if layers is None else layers), min(heads, shape[1])
    count = len(shown) * len(rows)
    figure, axes = pyplot.subplots(
        count, heads, figsize=(2.0 * heads + 1.6, 2.0 * count + 0.6), squeeze=False, layout="constrained"
    )
    for place, layer in enumerate(shown):
        bound = max(float(value[layer, :heads].abs().max()) for value in rows.values())
        for row, (label, value) in enumerate(rows.items()):
            line = axes[place * len(rows) + row]
            for head in range(heads):
                image = line[head].imshow(
                    value[layer, head].float().cpu(), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest"
                )
                line[head].set_xticks([])
                line[head].set_yticks([])
                if place == row == 0:
                    line[head].set_title(f"head {head}", fontsize=9)
            line[0].set_ylabel(f"layer {layer}\n{label}", fontsize=9)
            figure.colorbar(image, ax=line[-1], fraction=0.05)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a PNG, whole or not at all, and let go of the figure."""
    from matplotlib import pyplot

    try:
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
    finally:
        pyplot.close(figure)


def _read_log(file: Path) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: a line that no training wrote (named).
    """
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            scalars = [line[name] for name in ("step", "loss", "eval_loss", "G_frozen_difference") if name in line]
            numbers = [*scalars, *line.get("G_variation", [])]
            if "step" not in line or not all(isinstance(value, (int, float)) for value in numbers):
                raise ValueError("no step, or a value that is no number")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: line {number}: not a line of a training log ({error})") from None
        lines.append(line)
    if len({len(line["G_variation"]) for line in lines if "G_variation" in line}) > 1:
        raise ValueError(f"{file}: G_variation has different numbers of layers; this is the log of several runs")
    return lines


def plot_run(run: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """The curves of a training run over steps: loss, accuracy, how far G_LM varies, what freezing costs, DAG losses.

    Args:
        run: output folder of `pldr train`, with its ``log.jsonl``.
        path: PNG file to write.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: the log is damaged (line named) or empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file = Path(run) / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {run} is not the output of pldr train")
    lines = _read_log(file)

    def curve(name: str) -> tuple[list[int], list[Any]]:
        points = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in points], [value for _, value in points]

    if not curve("loss")[0] and not curve("eval_loss")[0]:
        raise ValueError(f"{file}: holds no loss to plot")
    probed = bool(curve("G_variation")[0])
    count = 5 if probed else 2
    figure, axes = pyplot.subplots(1, count, figsize=(4.5 * count, 4), squeeze=False, layout="constrained")
    for column, (name, unit) in enumerate((("loss", "nats a token"), ("accuracy", "fraction of tokens"))):
        for key, label in ((name, "training"), (f"eval_{name}", "validation")):
            axes[0, column].plot(*curve(key), label=label)
        axes[0, column].set(title=name, ylabel=unit)
    if probed:
        steps, layers = curve("G_variation")
        for layer, values in enumerate(zip(*layers, strict=True)):
            axes[0, 2].plot(steps, values, marker=".", label=f"layer {layer}")
        axes[0, 2].set(title="variation of G_LM over held-out passages", ylabel="relative RMSE", yscale="log")
        steps, differences = curve("G_frozen_difference")
        axes[0, 3].plot(steps, [abs(value) for value in differences], marker=".", label="|frozen - computed|")
        axes[0, 3].set(title="loss with G_LM frozen", ylabel="nats a token", yscale="log")
        for name in ("A_LM", "A_P", "G_LM"):
            axes[0, 4].plot(*curve(f"dag_{name}"), marker=".", label=name)
        axes[0, 4].set(title="DAG loss", yscale="log")
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)
