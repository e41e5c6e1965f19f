"""What people look at: facts about a model, pictures of its operator."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def model_facts(model: Any) -> dict[str, Any]:
    """Shape, parameter counts, operator kinds and cache sizes of a model, as plain numbers.

    Args:
        model: a PldrForCausalLM.

    Returns:
        `parameters` in all and by part; `operators`, how many layers have each kind; `kv_cache_bytes_per_token` and
        `g_cache_bytes_per_sequence` in the model's dtype (a constant operator needs no G-cache).
    """
    config = model.config
    parts = {"embedding": 0, "attention": 0, "operator": 0, "feed_forward": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if ".operator." in name:
            part = "operator"
        elif ".self_attn." in name or "post_attention" in name:
            part = "attention"
        elif ".mlp." in name or "post_feedforward" in name:
            part = "feed_forward"
        else:
            part = "head" if name.startswith("lm_head") else "embedding"
        parts[part] += parameter.numel()
    kinds = [type(layer.self_attn.operator).__name__.removesuffix("Operator").lower() for layer in model.model.layers]
    size = torch.empty(0, dtype=model.dtype).element_size()
    state = config.num_hidden_layers * config.num_attention_heads * config.head_dim**2
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
              "max_position_embeddings", "rope_pairing", "operator", "operator_init", "operator_trainable",
              "metric_learner_units", "metric_learner_glus", "metric_learner_width")  # fmt: skip
    learned = config.operator == "learned"
    skipped = "operator_" if learned else "metric_learner_"
    return {
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        # A fixed G_LM is a buffer; a trainable one is among the parameters.
        "constant_operator_values": 0 if learned or config.operator_trainable else state,
        "operators": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_bytes_per_token": 2 * config.num_hidden_layers * config.hidden_size * size,
        "g_cache_bytes_per_sequence": state * size if learned else 0,
        "config": {name: getattr(config, name) for name in fields if not name.startswith(skipped)},
    }


def print_facts(facts: dict[str, Any]) -> None:
    """`model_facts` as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("parameters", f"{facts['parameters']:,}")
    for part, count in facts["parameters_by_part"].items():
        table.add_row(f"  {part.replace('_', ' ')}", f"{count:,}")
    if facts["constant_operator_values"]:
        table.add_row("constant G_LM", f"{facts['constant_operator_values']:,} values, not counted as parameters")
    table.add_row("operators", ", ".join(f"{count} × {kind}" for kind, count in facts["operators"].items()))
    table.add_row("dtype", facts["dtype"])
    table.add_row("KV-cache", f"{facts['kv_cache_bytes_per_token']:,} bytes a token")
    table.add_row("G-cache", f"{facts['g_cache_bytes_per_sequence']:,} bytes a sequence")
    if certificate := facts.get("certificate"):
        report = certificate["report"]
        verdict = "certified" if report["certified"] else "not certified"
        difference = report["modes"]["frozen"]["loss_difference"]
        table.add_row("certificate", f"{verdict} {certificate['date']}, frozen {difference:+.1e} nats a token")
    for name, value in facts["config"].items():
        table.add_row(name, str(value))
    Console().print(table)


def print_certificate(certificate: dict[str, Any]) -> None:
    """A certificate as tables, with the verdict in words."""
    from rich.console import Console
    from rich.table import Table

    console, report = Console(), certificate["report"]
    limits = report["thresholds"]
    modes, change = report["modes"], report["causality"]
    console.print(
        f"[bold]{certificate['model']}[/bold]: {report['passages']} held-out passages, {report['tokens']:,} tokens, loss "
        f"{report['loss']:.4f} nats a token with G_LM computed anew.",
        soft_wrap=True,
    )
    table = Table("against G_LM computed anew", *(f"G_LM {name}" for name in modes))
    rows = [
        ("loss difference, nats a token", lambda m: f"{m['loss_difference']:+.1e}"),
        ("  95% interval", lambda m: "{:+.1e} … {:+.1e}".format(*m["loss_interval"])),
        ("KL divergence, mean, nats", lambda m: f"{m['kl_mean']:.1e}"),
        ("  99th percentile, maximum", lambda m: f"{m['kl_99']:.1e}, {m['kl_max']:.1e}"),
        ("same greedy tokens", lambda m: f"{m['agreement']:.3%}"),
        ("largest logit difference", lambda m: f"{m['logit_difference']:.1e}"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(mode) for mode in modes.values()))
    table.add_section()
    table.add_row("logits before the middle, when later tokens change", "computed anew", "frozen", style="bold")
    table.add_row(
        "  largest difference", *(f"{change[name]['logit_difference']:.1e}" for name in ("computed", "frozen"))
    )
    table.add_row("  same greedy tokens", *(f"{change[name]['agreement']:.3%}" for name in ("computed", "frozen")))
    console.print(table)
    console.print(
        f"G_LM varies over passages by {', '.join(f'{value:.1e}' for value in report['variation'])} (relative RMSE, layer by "
        f"layer). Frozen from one calibration passage or another, the loss moves by {report['calibration']['spread']:.1e}.",
        style="dim",
        soft_wrap=True,
    )
    if report["certified"]:
        verdict = "[green]certified"
    else:
        verdict = f"[yellow]not certified[/yellow] ({'; '.join(report['reasons'])})"
    console.print(
        f"{verdict}: within {limits['loss']:.0e} nats a token, at least {limits['agreement']:.1%} same greedy tokens.",
        soft_wrap=True,
    )


def print_evaluation(report: dict[str, Any]) -> None:
    """Scores by task and operator mode, what the modes change, averages and perplexities, as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, modes = Console(), report["modes"]
    if not console.is_terminal:
        console.width = max(console.width, 120)  # numbers in a file or a pipe are not cut
    source = {
        "learned": "computed from all that is read, the scored tokens too",
        "cached": "computed from the context and kept",
        "frozen": "a constant" if report["operator"] != "learned" else "a constant, frozen from calibration passages",
    }
    console.print(f"[bold]{escape(report['model'])}[/bold], {report['dtype']} on {report['device']}", soft_wrap=True)
    for mode in modes:
        console.print(f"  {mode}: G_LM is {source[mode]}", style="dim", soft_wrap=True)
    if report["tasks"]:
        table = Table("task", "questions", "shots", "metric")
        for name in (*modes, "standard error"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, task in (report["tasks"] | report["groups"]).items():
            first = task["scores"][modes[0]]
            for place, metric in enumerate(metric for metric in first if "_stderr" not in metric):
                about = (
                    [escape(name), f"{task['questions']:,}", str(task["num_fewshot"])]
                    if "questions" in task
                    else [name, "", ""]
                )
                scores = [f"{task['scores'][mode][metric]:.4f}" for mode in modes]
                filtered, *rest = metric.split(", ")
                error = first.get(", ".join([f"{filtered}_stderr", *rest]))
                table.add_row(
                    *(["", "", ""] if place else about), metric, *scores, "" if error is None else f"{error:.4f}"
                )
        if "suite" in report:
            table.add_section()
            for name in report["suite"]["averages"][modes[0]]:
                table.add_row(
                    name, "", "", "", *(f"{report['suite']['averages'][mode][name]:.4f}" for mode in modes), ""
                )
        console.print(table)
    if report["tasks"] and len(modes) > 1:
        table = Table(f"against {modes[0]}", "G_LM", "answers that differ", "largest difference, nats")
        for name, task in report["tasks"].items():
            for place, mode in enumerate(modes[1:]):
                differ = f"{task['differ'][mode]:,} of {task['questions']:,}"
                table.add_row("" if place else escape(name), mode, differ, f"{task['largest'][mode]:.1e}")
        console.print(table)
    if "texts" in report:
        for name, found in report["texts"].items():
            table = Table("G_LM", "tokens", "nats a token", "bits a byte", "word perplexity", title=escape(name))
            for mode, value in found.items():
                words = value["word_perplexity"]
                table.add_row(
                    mode, f"{value['tokens']:,}", f"{value['nats_per_token']:.6f}", f"{value['bits_per_byte']:.6f}",
                    "too large" if words is None else f"{words:,.3f}",
                )  # fmt: skip
            console.print(table)


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

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
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
