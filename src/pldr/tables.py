"""What people look at: facts about a model, pictures of its operator."""

import io
import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType

from pldr.deductive import RANK_TOLERANCES

if TYPE_CHECKING:
    from pldr.study.statistics import Analysis, Statistics


# Columns of text where there is no terminal to ask.
_WIDTH = 120


class Printable:
    """A result that shows as tables where it is printed, in a terminal as in a notebook; subclasses say what to show."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


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


# What `layer_rows` shows: r is the numerical rank, log the decimal logarithm, cond the condition number.
COLUMNS = ("RMS", "min", "max", "r(1e-2)", "r(1e-3)", "log|det|", "cond", "heads", "passages")


def layer_rows(statistics: "Statistics") -> list[list[str]]:
    """A row of texts a layer, for `COLUMNS`: means over heads, but the extremes of all and the median condition."""
    ranks = [statistics.rank[tolerance].mean(1) for tolerance in RANK_TOLERANCES]
    return [
        [
            number(statistics.rms[layer].mean()),
            number(statistics.minimum[layer].min()),
            number(statistics.maximum[layer].max()),
            *(f"{float(rank[layer]):.1f}" for rank in ranks),
            number(statistics.log10_determinant[layer].mean(), ".1f"),
            number(statistics.condition[layer].median()),
            number(statistics.head_distance[layer]),
            number(statistics.layer_variation[layer]),
        ]
        for layer in range(len(statistics.rms))
    ]


def number(value: Any, form: str | None = None) -> str:
    """A short text for a number, 4.5e-6 rather than 4.5e-06; "-" where there is none.

    Args:
        value: what `float` takes.
        form: a format; by default two digits, with an exponent where they would be far from the point.
    """
    value = float(value)
    if math.isnan(value):
        return "-"
    if form is None:
        near = value == 0 or 0.01 <= abs(value) < 1000
        form = ".1e" if not near else ".2g" if abs(value) < 10 else ".0f"
    mantissa, exponent, power = format(value, form).partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa


def print_analysis(analysis: "Analysis") -> None:
    """One table for each tensor in the terminal, a row a layer."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, statistics in analysis.tensors.items():
        table = Table(title=name, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for heading in ("layer", *COLUMNS):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer, row in enumerate(layer_rows(statistics)):
            table.add_row(str(layer), *row)
        console.print(table)
        console.print()
    if analysis.lengths:
        console.print("[bold]growth[/bold]: relative RMSE to all tokens, from the first ones alone; mean over layers")
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("tokens", justify="right")
        for name in analysis.tensors:
            table.add_column(name, justify="right")
        for index, length in enumerate(analysis.lengths):
            table.add_row(str(length), *(number(s.growth[index].mean()) for s in analysis.tensors.values()))
        console.print(table)
        console.print()
    console.print(
        "Means over heads (condition: median; min, max: of all). heads: distance between the heads of a layer; "
        "passages: variation over passages, RMS of the difference to the mean / RMS of the mean.",
        style="dim",
    )


def print_demo(result: dict[str, Any]) -> None:
    """The demo's tables and what to try next."""
    from rich.console import Console

    console = Console()
    console.print(
        "\n[bold]stories-10m[/bold], the model that comes with the package, on books it was not trained on:\n"
    )
    _print_measured(console, result["stories"])
    if "trained" in result:
        training = result["trained"]["training"]
        console.print(
            f"\n[bold]A new model[/bold], trained for {training['steps']} steps ({training['tokens']:,} tokens) in "
            f"{training['seconds']:.0f} s: loss {training['train_loss']:.2f}, held out {training['validation_loss']:.2f} "
            "nats a token:\n",
            soft_wrap=True,
        )
        _print_measured(console, result["trained"])
    folder = result["folder"]
    # As it was called, where the command is not on the path (the Makefile keeps it in .venv).
    pldr = "pldr" if shutil.which("pldr") else sys.argv[0]
    console.print(
        f"\nPicture of G_LM: {folder}/stories-G_LM.png   numbers: {folder}/demo.json   total: {result['seconds']:.0f} s\n\n"
        "Try next:\n"
        f'  {pldr} generate "Once upon a time there was" --stream --temperature 0.8\n'
        f'  {pldr} generate {folder}/stories-frozen "Once upon a time there was" --json\n'
        f"  {pldr} info {folder}/stories-frozen\n"
        + (
            ""
            if "trained" in result
            else f"  {pldr} demo --train      the same of a model that is trained here, in minutes\n"
        ),
        highlight=False,
        soft_wrap=True,
    )


def _print_measured(console: Any, measured: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    loss, rows = measured["losses"], measured["generation"]
    # One table of two parts with five columns each: the four modes, then how far G_LM depends on the text.
    table = Table("cache", "held-out loss", "difference", "tokens/s", "greedy text")
    for column in table.columns[1:4]:
        column.justify = "right"
    sources = {"no cache": "full", "KV": "cached", "KV+G": "cached", "frozen G": "frozen"}
    for row in rows:
        key = sources[row["mode"]]
        speed_up = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        table.add_row(
            row["mode"], f"{loss[key]:.6f}", f"{loss[key] - loss['full']:+.0e}" if key != "full" else "",
            f"{row['tokens_per_second']:,.0f}  {speed_up:.1f}×", "the same" if row["same_text"] else "differs",
        )  # fmt: skip
    table.add_section()
    table.add_row("G_LM of", "variation", "before", "log10 |det|", "numerical rank", style="bold")
    for layer in measured["operator"]:
        table.add_row(
            f"layer {layer['layer']}", f"{layer['variation']:.1e}", f"{layer['untrained_variation']:.1e}",
            f"{layer['log10_determinant']:.1f}", f"{layer['rank']:.1f} of {measured['head_dim']}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "Loss in nats a token, after the first half of each held-out passage. No cache: G_LM from all tokens, later ones "
        "too; KV, KV+G: from the first half; frozen: a constant from one passage. Variation: of G_LM over held-out passages, "
        "relative RMSE, after and before training.",
        style="dim",
    )
    worst = max(abs(loss[key] - loss["full"]) for key in ("cached", "frozen"))
    if worst <= 1e-5 and all(row["same_text"] for row in rows):
        verdict = "[green]G_LM does not depend on the text: cached or constant, it changes neither loss nor output."
    else:
        verdict = (
            f"[yellow]This model's G_LM still depends on the text: caching or freezing moves the loss by up to {worst:.1e} "
            "nats. Whether training gets there depends on learning rate and warm-up (README, “Is G constant?”)."
        )
    console.print(verdict)
    console.print(f"\n[bold]{escape(measured['prompt'])}[/bold]{escape(rows[-1]['text'])}\n", highlight=False)
