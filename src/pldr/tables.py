"""What is printed: facts about a model, and what was measured of it, as tables for a terminal or a notebook.

A view turns plain numbers into something that rich prints. Names come from files and may hold anything: they are always
`Text`, never strings with markup in them.
"""

import io
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

from rich import text as rich_text
from rich.console import Console, Group, RenderableType
from rich.table import Table

from pldr.deductive import RANK_TOLERANCES
from pldr.files import printable

if TYPE_CHECKING:
    from pldr.study.statistics import Analysis, Statistics


# Columns of text where there is no terminal to ask.
_WIDTH = 120


class Text(rich_text.Text):
    """Text in which a character that a terminal would obey is shown as an escape."""

    def __init__(self, text: str = "", *args: Any, **kwargs: Any) -> None:
        super().__init__(printable(text), *args, **kwargs)

    def append(self, text: rich_text.Text | str, style: Any = None) -> rich_text.Text:
        return super().append(printable(text) if isinstance(text, str) else text, style)


class Printable:
    """A result that shows as tables where it is printed, in a terminal as in a notebook; subclasses say what to show."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self._printed().export_text()

    def _repr_html_(self) -> str:
        return self._printed().export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _printed(self) -> Console:
        # What the notebook or the terminal around it can do is no matter here.
        console = Console(file=io.StringIO(), width=_WIDTH, record=True, force_terminal=False, force_jupyter=False)
        console.print(self)
        return console


def show(renderable: RenderableType) -> None:
    """Print on standard output. Tables fit the terminal; where there is none, in a file or a pipe, numbers are not cut."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    console.print(renderable, soft_wrap=True)


def _table(left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]] = (), **look: Any) -> Table:
    """A table with columns of words to the left, then columns of numbers, aligned to the right and never broken."""
    table = Table(**look)
    for heading in left:
        table.add_column(Text(heading))
    for heading in right:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    _add(table, rows)
    return table


def _add(table: Table, rows: Iterable[Sequence[str]], style: str | None = None) -> None:
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style=style)


def _prose(text: str, style: str = "dim") -> Text:
    """Sentences, broken between words; all other texts are left to the terminal to break, so that paths can be copied."""
    return Text(text, style=style, no_wrap=False, overflow="fold")


def numbers_view(numbers: Mapping[str, Any]) -> RenderableType:
    """Names and what they are, in two columns."""
    shown = {name: f"{x:,.4f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
             for name, x in numbers.items()}  # fmt: skip
    return _table(["", ""], [], shown.items(), show_header=False, box=None, padding=(0, 2))


# --- a model --------------------------------------------------------------------------------------------------------


def facts_view(facts: dict[str, Any]) -> RenderableType:
    """`model_facts`, and what "certificate" says if there is one, in two columns."""
    rows = [("parameters", f"{facts['parameters']:,}")]
    rows += [(f"  {part.replace('_', ' ')}", f"{count:,}") for part, count in facts["parameters_by_part"].items()]
    if facts["constant_operator_values"]:
        rows.append(("constant G_LM", f"{facts['constant_operator_values']:,} values, not counted as parameters"))
    rows += [
        ("operators", ", ".join(f"{count} × {kind}" for kind, count in facts["operators"].items())),
        ("dtype", facts["dtype"]),
        ("KV-cache", f"{facts['kv_cache_bytes_per_token']:,} bytes per token"),
        ("G-cache", f"{facts['g_cache_bytes_per_sequence']:,} bytes per sequence"),
    ]
    if certificate := facts.get("certificate"):
        report = certificate["report"]
        verdict = "certified" if report["certified"] else "not certified"
        mode = next(mode for mode in ("factored", "quantized", "frozen") if mode in report["modes"])
        difference = report["modes"][mode]["loss_difference"]
        about = f"{verdict} {certificate['date']}, {mode} {difference:+.1e} nats per token"
        rows.append(("certificate", about if facts["certified_weights"] else "of other weights; certify these again"))
    rows += [(name, str(value)) for name, value in facts["config"].items()]
    return _table(["", ""], [], rows, show_header=False, box=None, padding=(0, 2))


# --- a certificate --------------------------------------------------------------------------------------------------


def certificate_view(certificate: dict[str, Any]) -> RenderableType:
    """What was measured, with the verdict in words."""
    report = certificate["report"]
    if "factored" in report["modes"]:
        return _factored_view(certificate["model"], report)
    variation = ", ".join(f"{value:.1e}" for value in report["variation"])
    return Group(
        Text.assemble(
            (certificate["model"], "bold"),
            f": {report['passages']} held-out passages, {report['tokens']:,} tokens, loss {report['loss']:.4f} nats per "
            "token with a learned G_LM.",
        ),
        _certificate_table(report),
        _prose(
            f"G_LM varies over passages by {variation} (relative RMSE, layer by layer). Frozen from one calibration "
            f"passage or another, the loss moves by {report['calibration']['spread']:.1e}."
        ),
        _verdict(report),
    )


def _factored_view(model: str, report: dict[str, Any]) -> RenderableType:
    heads = [rank for layer in report["head_ranks"] for rank in layer]
    return Group(
        Text.assemble(
            (model, "bold"),
            f": {report['passages']} held-out passages, {report['tokens']:,} tokens, loss {report['loss']:.4f} nats per "
            f"token with a {report['against']} G_LM.",
        ),
        _table([f"against a {report['against']} G_LM"], ["G_LM factored"], _comparison_rows(report["modes"])),
        _prose(
            f"Keys have {', '.join(map(str, report['ranks']))} dimensions, layer by layer; the heads use "
            f"{min(heads)} to {max(heads)}, on average {sum(heads) / len(heads):.1f}."
        ),
        _verdict(report),
    )


def _certificate_table(report: dict[str, Any]) -> Table:
    modes, causality = report["modes"], report["causality"]
    table = _table(["against a learned G_LM"], [f"G_LM {name}" for name in modes], _comparison_rows(modes))
    table.add_section()
    _add(table, [["logits before the middle, when later tokens change", *causality]], style="bold")
    differences = [f"{change['logit_difference']:.1e}" for change in causality.values()]
    _add(table, [["  largest difference", *differences]])
    _add(table, [["  same greedy tokens", *(f"{change['agreement']:.3%}" for change in causality.values())]])
    return table


def _comparison_rows(modes: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    cells = [
        ("loss difference, nats per token", lambda m: f"{m['loss_difference']:+.1e}"),
        ("  95% interval", lambda m: "{:+.1e} … {:+.1e}".format(*m["loss_interval"])),
        ("KL divergence, mean, nats", lambda m: f"{m['kl_mean']:.1e}"),
        ("  99th percentile, maximum", lambda m: f"{m['kl_99']:.1e}, {m['kl_max']:.1e}"),
        ("same greedy tokens", lambda m: f"{m['agreement']:.3%}"),
        ("largest logit difference", lambda m: f"{m['logit_difference']:.1e}"),
    ]
    yield from ([label, *map(cell, modes.values())] for label, cell in cells)


def quantization_view(result: dict[str, Any]) -> RenderableType:
    """What `Quantization.to_json` says."""
    report = result["certificate"]["report"]
    layers = ", ".join(f"{count} layers of {kind}" for kind, count in result["layers"].items())
    return Group(
        Text.assemble(
            (result["folder"], "bold"),
            f": {layers}, {result['bytes'] / 1e6:.1f} MB of weights (before: {result['bytes_before'] / 1e6:.1f} MB); "
            f"{report['passages']} held-out passages, {report['tokens']:,} tokens, loss {report['loss']:.4f} nats per token before.",
        ),
        _table(["against the model before"], [report["weights"]], _comparison_rows(report["modes"])),
        _verdict(report),
    )


def compression_view(result: dict[str, Any]) -> RenderableType:
    """`Compression.to_json`: the certificate, what is cached, and both ways to factor side by side."""
    fits, weighting = result["fits"], result["weighting"]
    names = {"moments": "weighted", "none": "plain"}
    table = _table(["at the same ranks"], [f"{names[name]} factors" for name in fits])
    rows = [("loss difference, nats per token", lambda fit: f"{fit['loss_difference']:+.1e}"),
            ("same greedy tokens", lambda fit: f"{fit['agreement']:.3%}")]  # fmt: skip
    _add(table, ([label, *map(cell, fits.values())] for label, cell in rows))
    table.add_section()
    _add(table, [["relative error of scores, rank", *[""] * len(fits)]], style="bold")
    for layer, rank in enumerate(result["ranks"]):
        errors = (f"{fit['score_error'][layer]:.1e}" for fit in fits.values())
        _add(table, [[f"  layer {layer}, {rank} of {result['head_dim']}", *errors]])
    share = result["kv_bytes"] / result["kv_bytes_before"]
    cached = f"KV-cache: {result['kv_bytes']:,} bytes per token, {share:.2f} of {result['kv_bytes_before']:,}"
    return Group(certificate_view(result["certificate"]), table, Text(f"{cached} ({names[weighting]} factors)."))


def _verdict(report: dict[str, Any]) -> RenderableType:
    limits = report["thresholds"]
    words = (
        [("certified", "green")]
        if report["certified"]
        else [("not certified", "yellow"), (f" ({'; '.join(report['reasons'])})", "")]
    )
    bounds = f": within {limits['loss']:.0e} nats per token, at least {limits['agreement']:.1%} same greedy tokens."
    return Text.assemble(*words, bounds)


# --- an evaluation --------------------------------------------------------------------------------------------------


def evaluation_view(report: dict[str, Any]) -> RenderableType:
    """Scores by task and operator mode, what the modes change, averages and perplexities."""
    modes = report["modes"]
    source = {
        "learned": "computed from all that is read, the scored tokens too",
        "cached": "computed from the context and kept",
        "sequential": "computed anew from what stands before each token",
        "frozen": "a constant" if report["operator"] != "learned" else "a constant, frozen from calibration passages",
    }
    parts: list[RenderableType] = [
        Text.assemble((report["model"], "bold"), f", {report['dtype']} on {report['device']}"),
        *(Text(f"  {mode}: G_LM is {source[mode]}", style="dim") for mode in modes),
    ]
    if report.get("resumed"):
        parts.append(Text(f"  {report['resumed']:,} answers are of an earlier run", style="dim"))
    if report["tasks"]:
        parts.append(_score_table(report))
    if report["tasks"] and len(modes) > 1:
        rows = (row for name, task in report["tasks"].items() for row in _difference_rows(name, task, modes[1:]))
        parts.append(
            _table(
                [f"against {modes[0]}", "G_LM"],
                ["answers that differ", "share, at most (95%)", "largest difference, nats"],
                rows,
            )
        )
    parts += [_perplexity_table(name, found) for name, found in report.get("texts", {}).items()]
    parts += [_prose(f"warning: {warning}", "yellow") for warning in report["warnings"]]
    return Group(*parts)


def _score_table(report: dict[str, Any]) -> Table:
    modes = report["modes"]
    table = _table(["task", "questions", "shots", "metric"], [*modes, "standard error"])
    for name, task in (report["tasks"] | report["groups"]).items():
        _add(table, _score_rows(name, task, modes))
    if "suite" in report:
        averages = report["suite"]["averages"]
        table.add_section()
        for name in averages[modes[0]]:
            _add(table, [[name, "", "", "", *(f"{averages[mode][name]:.4f}" for mode in modes), ""]])
    return table


def _score_rows(name: str, task: dict[str, Any], modes: list[str]) -> Iterator[list[str]]:
    """A row a metric; the first one names the task. The standard error is that of the first mode."""
    about = [name, f"{task['questions']:,}", str(task["num_fewshot"])] if "questions" in task else [name, "", ""]
    first = task["scores"][modes[0]]
    for metric in (metric for metric in first if "_stderr" not in metric):
        kind, *filters = metric.split(", ")
        error = first.get(", ".join([f"{kind}_stderr", *filters]))
        scores = (f"{task['scores'][mode][metric]:.4f}" for mode in modes)
        yield [*about, metric, *scores, "" if error is None else f"{error:.4f}"]
        about = ["", "", ""]


def _difference_rows(name: str, task: dict[str, Any], modes: list[str]) -> Iterator[list[str]]:
    for place, mode in enumerate(modes):
        differ = f"{task['differ'][mode]:,} of {task['questions']:,}"
        yield ["" if place else name, mode, differ, f"{task['share_bound'][mode]:.2%}", f"{task['largest'][mode]:.1e}"]


def _perplexity_table(name: str, found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for mode, value in found.items():
        words = value["word_perplexity"]
        bits = f"{value['bits_per_byte']:.6f}"
        rows.append([mode, f"{value['tokens']:,}", f"{value['nats_per_token']:.6f}", bits,
                     "too large" if words is None else f"{words:,.3f}"])  # fmt: skip
    headings = ["tokens", "nats per token", "bits per byte", "word perplexity"]
    return _table(["G_LM"], headings, rows, title=Text(name, style="table.title"), title_justify="left")


# --- deductive outputs ----------------------------------------------------------------------------------------------

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


def number(value: SupportsFloat, form: str | None = None) -> str:
    """A short text for a number, 4.5e-6 rather than 4.5e-06; "-" where there is none.

    Args:
        value: a number, or a tensor that holds one.
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


def analysis_view(analysis: "Analysis") -> RenderableType:
    """One table for each tensor, a row a layer, and how the tensors change as a passage grows."""
    look = {"box": None, "padding": (0, 1, 0, 0)}
    parts: list[RenderableType] = []
    if analysis.source:
        parts.append(Text(f"{analysis.passages} passages of {analysis.length} tokens: {analysis.source}\n"))
    for name, statistics in analysis.tensors.items():
        rows = ([str(layer), *row] for layer, row in enumerate(layer_rows(statistics)))
        title = Text(name, style="bold")
        parts += [_table([], ["layer", *COLUMNS], rows, title=title, title_justify="left", **look), ""]
    if analysis.lengths:
        tensors = analysis.tensors
        rows = (
            [str(length), *(number(statistics.growth[index].mean()) for statistics in tensors.values())]
            for index, length in enumerate(analysis.lengths)
        )
        what = ": relative RMSE to all tokens, from the first ones alone; mean over layers"
        parts += [Text.assemble(("growth", "bold"), what), _table([], ["tokens", *tensors], rows, **look), ""]
    if analysis.order_parameter:
        order = analysis.order_parameter
        rows = ([str(layer), *map(number, values)] for layer, values in enumerate(zip(*order.values(), strict=True)))
        what = ": distance between the outputs of two continuations of each passage's first half"
        parts += [Text.assemble(("order parameter", "bold"), what), _table([], ["layer", *order], rows, **look), ""]
    parts.append(
        _prose(
            "Means over heads (condition: median; min, max: of all). heads: distance between the heads of a layer; "
            "passages: variation over passages, RMS of the difference to the mean / RMS of the mean."
        )
    )
    return Group(*parts)


# --- the demo -------------------------------------------------------------------------------------------------------


def demo_view(result: dict[str, Any]) -> RenderableType:
    """The demo's tables and what to try next."""
    parts: list[RenderableType] = [
        Text.assemble(("\nstories-10m", "bold"), ", the model that ships with pldr, on books it was not trained on:\n"),
        *_measured(result["stories"]),
    ]
    if "trained" in result:
        training = result["trained"]["training"]
        about = (
            f", trained for {training['steps']} steps ({training['tokens']:,} tokens) in {training['seconds']:.0f} s: loss "
            f"{training['train_loss']:.2f}, held out {training['validation_loss']:.2f} nats per token:\n"
        )
        parts += [Text.assemble(("\nA new model", "bold"), about), *_measured(result["trained"])]
    return Group(*parts, _next_commands(result))


def _next_commands(result: dict[str, Any]) -> Text:
    folder = result["folder"]
    # As it was called, where the command is not on the path (the Makefile keeps it in .venv).
    pldr = "pldr" if shutil.which("pldr") else sys.argv[0]
    lines = [
        f"\nPicture of G_LM: {folder}/stories-G_LM.png   numbers: {folder}/demo.json   total: {result['seconds']:.0f} s",
        "\nTry next:",
        f'  {pldr} generate "Once upon a time there was" --stream --temperature 0.8',
        f'  {pldr} generate {folder}/stories-frozen "Once upon a time there was" --json',
        f"  {pldr} info {folder}/stories-frozen",
    ]
    if "trained" not in result:
        lines.append(f"  {pldr} demo --train      the same of a model that is trained here, in minutes")
    return Text("\n".join(lines) + "\n")


def _measured(measured: dict[str, Any]) -> Iterator[RenderableType]:
    """One model's table of two parts with five columns each: the four modes, then how far G_LM depends on the text."""
    loss, generation = measured["losses"], measured["generation"]
    table = _table(["cache"], ["held-out loss", "difference", "tokens/s", "greedy text"])
    for row in generation:
        mode = row["mode"]
        speed, speed_up = row["tokens_per_second"], row["tokens_per_second"] / generation[0]["tokens_per_second"]
        difference = "" if mode == "learned" else f"{loss[mode] - loss['learned']:+.0e}"
        same = "the same" if row["same_text"] else "differs"
        _add(table, [[row["cache"], f"{loss[mode]:.6f}", difference, f"{speed:,.0f}  {speed_up:.1f}×", same]])
    table.add_section()
    _add(table, [["G_LM of", "variation", "before", "log10 |det|", "numerical rank"]], style="bold")
    for layer in measured["operator"]:
        variations = [f"{layer[name]:.1e}" for name in ("variation", "untrained_variation")]
        rank = f"{layer['rank']:.1f} of {measured['head_dim']}"
        _add(table, [[f"layer {layer['layer']}", *variations, f"{layer['log10_determinant']:.1f}", rank]])
    yield table
    yield _prose(
        "Loss in nats per token, after the first half of each held-out passage. No cache: G_LM from all tokens, later ones "
        "too; KV, KV+G: from the first half; frozen: a constant from one passage. Variation: of G_LM over held-out passages, "
        "relative RMSE, after and before training."
    )
    kept = measured["compression"]
    share = kept["kv_bytes_compressed"] / kept["kv_bytes_whole"]
    yield _prose(
        "The engine (pldr generate) decodes the frozen model; with fewer dimensions, its cached keys have "
        f"{', '.join(map(str, kept['ranks']))} of {measured['head_dim']} by layer, its cache {share:.0%} of the bytes."
    )
    of_modes = [row for row in generation if row["mode"] != "compressed"]
    yield _dependence(max(abs(loss[row["mode"]] - loss["learned"]) for row in of_modes), of_modes)
    yield Text.assemble((f"\n{measured['prompt']}", "bold"), f"{of_modes[-1]['text']}\n")


def _dependence(worst: float, generation: list[dict[str, Any]]) -> Text:
    """The demo's verdict; `worst`: the largest difference of a loss, in nats per token."""
    if worst <= 1e-5 and all(row["same_text"] for row in generation):
        verdict = "G_LM does not depend on the text: cached or constant, it changes neither loss nor output."
        return _prose(verdict, "green")
    verdict = (
        f"This model's G_LM still depends on the text: caching or freezing moves the loss by up to {worst:.1e} nats. "
        "Whether training gets there depends on learning rate and warm-up (README, “Is G constant?”)."
    )
    return _prose(verdict, "yellow")
