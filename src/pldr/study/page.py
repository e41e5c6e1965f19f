"""A report of the deductive outputs as one HTML file that needs no network and follows the light or dark theme.

Figures are inline SVG in the theme's colours. Tensors are PNG images whose opacity is the magnitude, over the page's
own ground, so that one image serves both themes.

Shapes: L layers, H heads, D head dimension.
"""

import base64
import math
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from pldr import __version__
from pldr.deductive import RANK_TOLERANCES
from pldr.files import write_text
from pldr.study.statistics import Analysis, Scale, Statistics
from pldr.tables import COLUMNS, layer_rows, number

_NAMES = {"A": "A", "A_LM": "A<sub>LM</sub>", "A_P": "A<sub>P</sub>", "G_LM": "G<sub>LM</sub>"}
_WHAT = {
    "A": "The density matrix qᵀq of the rotated queries, rows normalised, after the residual network. Vertical "
    "stripes mean that all rows are alike, which is rank one: what a trained network makes of any text. Before "
    "training, a bright diagonal is what is left of qᵀq. The heads of a layer share the network, and often look "
    "alike.",
    "A_LM": "The metric tensor, iSwiGLU(W A + b) + 1e-9. It is never below 1e-9, so that only one colour appears; most "
    "entries are faint, and a few stand out.",
    "A_P": "The potential tensor, A<sub>LM</sub> with each entry raised to its learned exponent. It is positive, too. "
    "An exponent near zero gives entries near one: an even ground, with little of the text in it.",
    "G_LM": "The energy-curvature tensor a A<sub>P</sub> + b<sub>a</sub>, the operator that attention applies to the "
    "queries. Horizontal or vertical stripes mean few dimensions that matter: a low rank. The identity, one bright "
    "diagonal, would be ordinary attention.",
}
_POSITIVE, _NEGATIVE = (222, 92, 32), (38, 124, 222)  # seen on white and on black alike
_GAP = 4  # pixels between heads
_WIDEST = 1000  # pixels of a row of heads, where it can be that small
_SPECTRUM_FLOOR = 1e-10
_VARIATION_FLOOR = 1e-8

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --text: #1d1f23; --soft: #62666e; --line: #dddad4;
  --warm: #de5c20; --cool: #267cde; --link: #1c62b5; --l: 0.56; }
@media (prefers-color-scheme: dark) { :root { --ground: #131417; --card: #1a1c20; --text: #e7e6e3; --soft: #a0a4ab;
  --line: #34373d; --link: #7db4f5; --l: 0.74; } }
sub, sup { line-height: 0; font-size: 0.72em; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 17px; margin: 28px 0 4px; }
p { max-width: 76ch; margin: 6px 0 12px; }
nav { margin: 18px 0 0; } nav a { margin-right: 18px; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 3px; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
figure { margin: 14px 0 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; }
figure > figcaption { max-width: 76ch; }
.row { display: flex; align-items: center; width: max-content; }
.row > .name { width: 56px; flex: none; font-size: 12px; color: var(--soft); }
.row img { display: block; image-rendering: pixelated; }
.heads { display: flex; } .heads span { font-size: 12px; color: var(--soft); text-align: center; }
.scale { margin: 12px 0 2px 56px; width: 420px; font-size: 12px; color: var(--soft); }
.scale .bar { height: 10px; border-radius: 2px; border: 1px solid var(--line); }
.scale .ticks { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 8px 4px; }
.tables { display: flex; flex-wrap: wrap; gap: 20px 40px; }
svg { display: block; } svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .title { font-size: 12px; fill: var(--text); font-weight: 600; }
svg .frame { fill: none; stroke: var(--line); } svg .grid { stroke: var(--line); stroke-width: 1; opacity: 0.7; }
svg .limit { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
svg polyline { fill: none; stroke-linejoin: round; }
.key { font-size: 12px; color: var(--soft); margin: 8px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }
.key i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; vertical-align: middle;
  margin-right: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); } th, td { padding: 3px 10px; text-align: right; white-space: nowrap; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--line); }
table.cells { font-size: 12px; }
table.cells th, table.cells td { padding: 3px 6px; min-width: 44px; text-align: center; }
table.cells tbody tr + tr td, table.cells tbody tr + tr th { border-top: 0; } table.cells td { border-radius: 3px; }
table caption { text-align: left; font-weight: 600; padding: 0 0 4px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
"""


def write_report(analysis: Analysis, path: str | os.PathLike[str], *, title: str, source: str = "") -> None:
    """Write the report, whole or not at all.

    Args:
        analysis: see `pldr.analysis.analyse_model`.
        path: HTML file to write.
        title: name of the model.
        source: what the passages are, for people.

    Raises:
        OSError: the file can not be written.
    """
    write_text(path, report(analysis, title=title, source=source))


def report(analysis: Analysis, *, title: str, source: str = "") -> str:
    """The report as HTML; arguments as for `write_report`."""
    layers, heads, dim = analysis.shape
    facts = [f"{layers} layers", f"{heads} heads", f"head dimension {dim}"]
    if analysis.passages:
        facts.append(f"{analysis.passages} passages of {analysis.length} tokens")
    if source:
        facts.append(escape(source))
    sections = [
        ("tensors", "The tensors", _tensors(analysis)),
        ("spectra", "Singular values", _spectra(analysis)),
        ("rank", "Rank and determinant", _rank_and_determinant(analysis)),
        ("values", "Distribution of the values", _distributions(analysis)),
    ]
    if analysis.passages:
        sections.append(("passages", "Invariance over passages", _invariance(analysis)))
    if analysis.lengths:
        sections.append(("growth", "Change as a passage grows", _growth(analysis)))
    sections.append(("numbers", "The numbers", _tables(analysis)))
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(f'<h2 id="{key}">{heading}</h2>{content}' for key, heading, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Deductive outputs of {escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Deductive outputs of {escape(title)}</h1>
<p class="soft">{", ".join(facts)}</p>
<p>A PLDR-LLM computes four tensors in each attention layer, A → A<sub>LM</sub> → A<sub>P</sub> → G<sub>LM</sub>, each
D × D for a head. The last one is the operator of attention: softmax((q G<sub>LM</sub>) kᵀ / √D) v. This page shows what
they look like, how close to singular they are, and whether they depend on the text.</p>
<nav>{links}</nav>
{body}
<p class="soft" style="margin-top:56px">Written by pldr {escape(__version__)}.</p>
</main>
</body>
</html>
"""


# --- sections -------------------------------------------------------------------------------------------------------


def _tensors(analysis: Analysis) -> str:
    whose = " of the first passage" if analysis.passages and len(analysis.tensors) > 1 else ""
    text = (
        f"<p>Each square is the tensor{whose} of one head, row by row, and each line of squares a layer. Orange is "
        "positive, blue negative, the page's own ground zero. All squares of a tensor share one colour scale, which "
        "is symmetric around zero; it is even near zero and logarithmic for large values, so that few outliers do "
        "not hide the rest.</p>"
    )
    for name, statistics in analysis.tensors.items():
        text += f"<h3>{_NAMES[name]}</h3><p>{_WHAT[name]}</p><figure>{_heatmaps(name, statistics)}</figure>"
    return text


def _heatmaps(name: str, statistics: Statistics) -> str:
    layers, heads, dim, _ = statistics.example.shape
    stride = dim + _GAP
    factor = max(1, min(_WIDEST // (heads * stride), 160 // stride))
    width = f"width:{stride * factor}px"
    text = '<div class="row"><span class="name">head</span><div class="heads">'
    text += "".join(f'<span style="{width}">{head}</span>' for head in range(heads)) + "</div></div>"
    for layer in range(layers):
        image = _signed_png(statistics.example[layer], statistics.scale)
        text += (
            f'<div class="row" style="margin-bottom:{_GAP * factor}px"><span class="name">layer {layer}</span>'
            f'<img src="data:image/png;base64,{image}" width="{heads * stride * factor}" height="{dim * factor}" '
            f'alt="{name} of the heads of layer {layer}"></div>'
        )
    return text + _scale_bar(statistics.scale)


def _scale_bar(scale: Scale) -> str:
    ticks = "".join(f"<span>{number(scale.value(place / 2))}</span>" for place in range(-2, 3))
    return (
        '<div class="scale"><div class="bar" '
        'style="background:linear-gradient(90deg,var(--cool),transparent,var(--warm))"></div>'
        f'<div class="ticks">{ticks}</div></div>'
    )


def _spectra(analysis: Analysis) -> str:
    text = (
        "<p>Singular values of each head in falling order, relative to the largest, on a logarithmic scale; one thin "
        "line a head (the mean over passages), one panel a layer. How many lie above the dashed lines, at 1e-2 and "
        "1e-3, is the numerical rank. A line that falls at once belongs to a head whose tensor is nearly rank one; "
        "the identity would be a level line. Below about 1e-7 lies the rounding of single precision.</p>"
    )
    # At most five panels side by side, and the same number in every line as far as that goes.
    layers = analysis.shape[0]
    width = min(1020 // math.ceil(layers / math.ceil(layers / 5)) - 4, 330)
    for name, statistics in analysis.tensors.items():
        values = statistics.singular_values.clamp(min=_SPECTRUM_FLOOR)
        dim = values.shape[-1]
        x = _Axis(1, max(dim, 2), [(tick, str(tick)) for tick in sorted({1, max(dim // 2, 1), dim})], "index")
        y = _Axis.log([float(values.min()), 1e-3, 1.0])
        panels = []
        for layer, heads in enumerate(values):
            colour = _colour(layer, len(values))
            lines = [_Line(range(1, dim + 1), head.tolist(), colour, 1.2, 0.55) for head in heads]
            panels.append(_plot(lines, x, y, f"layer {layer}", limits=RANK_TOLERANCES, size=(width, 190)))
        text += f"<h3>{_NAMES[name]}</h3><figure><div class=plots>{''.join(panels)}</div></figure>"
    return text


def _rank_and_determinant(analysis: Analysis) -> str:
    dim = analysis.shape[2]
    text = (
        f"<p>Numerical rank is how many of the {dim} singular values exceed 1e-2 of the largest; a deep colour is "
        "full rank. Under it, log10 of the determinant's magnitude: 0 for the identity, hundreds below zero for a "
        "tensor that is all but singular. A raised − marks a negative determinant, a raised ± one whose sign differs "
        "over the passages.</p>"
    )
    for name, statistics in analysis.tensors.items():
        rank = statistics.rank[RANK_TOLERANCES[0]]
        logs, signs = statistics.log10_determinant, statistics.determinant_sign
        rank_texts = [[f"{value:.0f}" for value in row] for row in rank.tolist()]
        log_texts = [
            [number(value, ".0f") + _sign_mark(sign, value) for value, sign in zip(row, row_signs, strict=True)]
            for row, row_signs in zip(logs.tolist(), signs.tolist(), strict=True)
        ]
        finite = logs[torch.isfinite(logs)].tolist()
        ranks = _matrix("numerical rank at 1e-2", rank_texts, rank / dim)
        determinants = _matrix("log10 |det|", log_texts, logs / min([-1.0, *finite]), colour="--warm")
        text += f"<h3>{_NAMES[name]}</h3><figure><div class=tables>{ranks}{determinants}</div></figure>"
    return text


def _sign_mark(sign: float, logarithm: float) -> str:
    """What to put behind the logarithm of a determinant's magnitude; `sign` is a mean over passages."""
    return "" if sign == 1 or logarithm == -math.inf else f"<sup>{'−' if sign == -1 else '±'}</sup>"


def _distributions(analysis: Analysis) -> str:
    text = (
        "<p>How often each value occurs, over all passages and heads, one line a layer. The horizontal axis is the "
        "colour scale of the pictures above; the vertical one, the fraction of the values in a bin, is logarithmic. "
        "Long wings mean a few entries much larger than the rest; spikes, values that many entries share, as where "
        "all rows are alike. Lines on top of each other mean layers that do the same.</p>"
    )
    panels = []
    for name, statistics in analysis.tensors.items():
        count = statistics.histogram.shape[1]
        middles = [(2 * index + 1) / count - 1 for index in range(count)]
        ticks = [(place / 2, number(statistics.scale.value(place / 2))) for place in range(-2, 3)]
        seen = statistics.histogram[statistics.histogram > 0]
        x, y = _Axis(-1, 1, ticks, "value"), _Axis.log([max(float(seen.min()), 1e-8), 1.0])
        lines = [
            _Line(middles, _within_range(row.tolist(), y.low), _colour(layer, len(statistics.rms)))
            for layer, row in enumerate(statistics.histogram)
        ]
        panels.append(_plot(lines, x, y, name, size=(508, 230)))
    return f"{text}<figure><div class=plots>{''.join(panels)}</div>{_key(analysis)}</figure>"


def _within_range(fractions: list[float], floor: float) -> list[float]:
    """Empty bins on the floor between the smallest and the largest value, NaN outside."""
    filled = [index for index, fraction in enumerate(fractions) if fraction]
    return [max(f, floor) if filled[0] <= index <= filled[-1] else math.nan for index, f in enumerate(fractions)]


def _invariance(analysis: Analysis) -> str:
    if len(analysis.tensors) == 1:
        return (
            "<p>This model's G<sub>LM</sub> is a constant: it is the same for every passage and every length, and "
            "the tensors that lead to it are not computed.</p>"
        )
    if analysis.passages < 2:
        return "<p>One passage tells nothing of what changes between passages.</p>"
    text = (
        "<p>RMS of the difference to the mean over passages, relative to the RMS of that mean; colours are "
        f"logarithmic, from {number(_VARIATION_FLOOR, '.0e')} (faint) to 1 (deep). A trained PLDR-LLM's "
        "G<sub>LM</sub> hardly depends on the text: faint cells, and fainter from A to G<sub>LM</sub>. Where they "
        "are faint, the tensor can be kept as a constant; an untrained model, or one that has not settled, shows "
        "deep colours.</p><figure>"
    )
    decades = -math.log10(_VARIATION_FLOOR)
    matrices = []
    for name, statistics in analysis.tensors.items():
        texts = [[number(value, ".0e") for value in row] for row in statistics.variation.tolist()]
        depths = 1 + statistics.variation.clamp(min=_VARIATION_FLOOR).log10() / decades
        matrices.append(_matrix(_NAMES[name], texts, depths, colour="--warm"))
    return f"{text}<div class=tables>{''.join(matrices)}</div></figure>"


def _growth(analysis: Analysis) -> str:
    text = (
        f"<p>The tensors computed from the first n tokens of a passage, compared with those of all {analysis.length}: "
        f"relative RMSE over {analysis.growth_passages} passages, both axes logarithmic, one line a layer. A level "
        "line close to the bottom says that a few tokens already give the operator of the whole passage; a slow fall "
        "says that the tensor averages over the text, and a G-cache filled from a short prompt differs from one of a "
        "long prompt by as much.</p>"
    )
    lengths = analysis.lengths[:-1]  # the last one is the reference itself
    if not lengths:
        return text + "<p>Passages of one token have nothing to grow from.</p>"
    x = _Axis(1, max(lengths[-1], 2), [(n, str(n)) for n in lengths[::2]], "first tokens", logarithmic=True)
    panels = []
    for name, statistics in analysis.tensors.items():
        values = statistics.growth[:-1]
        seen = values[values > 0].tolist() or [0.1, 1.0]
        lines = [
            _Line(lengths, [value or math.nan for value in layer.tolist()], _colour(index, values.shape[1]))
            for index, layer in enumerate(values.T)
        ]
        panels.append(_plot(lines, x, _Axis.log(seen), name, size=(508, 230)))
    return f"{text}<figure><div class=plots>{''.join(panels)}</div>{_key(analysis)}</figure>"


def _tables(analysis: Analysis) -> str:
    text = (
        "<p>Means over heads and passages; the condition number is a median, and min and max are those of all heads. "
        "“heads” is the relative distance between the heads of a layer (1.4 for unrelated ones), “passages” the "
        "relative variation over passages of a layer as a whole.</p>"
    )
    for name, statistics in analysis.tensors.items():
        rows = [(str(layer), *row) for layer, row in enumerate(layer_rows(statistics))]
        text += f"<h3>{_NAMES[name]}</h3><figure>{_table(('layer', *COLUMNS), rows)}</figure>"
        text += f"<details><summary>each head</summary><figure>{_head_table(statistics)}</figure></details>"
    return text


def _head_table(statistics: Statistics) -> str:
    headings = ("layer", "head", "RMS", "min", "max", *(f"rank {t:.0e}".replace("e-0", "e-") for t in RANK_TOLERANCES),
                "sign of det", "log10|det|", "condition", "passages")  # fmt: skip
    rows = []
    for layer, heads in enumerate(statistics.rms.tolist()):
        for head in range(len(heads)):
            at = (layer, head)
            ranks = [number(statistics.rank[tolerance][at], ".1f") for tolerance in RANK_TOLERANCES]
            rows.append((
                str(layer), str(head), number(statistics.rms[at]), number(statistics.minimum[at]),
                number(statistics.maximum[at]), *ranks, number(statistics.determinant_sign[at]),
                number(statistics.log10_determinant[at], ".1f"), number(statistics.condition[at]),
                number(statistics.variation[at]),
            ))  # fmt: skip
    return _table(headings, rows)


# --- parts ----------------------------------------------------------------------------------------------------------


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _matrix(caption: str, texts: list[list[str]], depths: torch.Tensor, colour: str = "--cool") -> str:
    """A table of layers and heads: each cell has a text and a ground whose depth, [L, H], is from 0 to 1."""
    body = ""
    for layer, (row, shares) in enumerate(zip(texts, depths.clamp(0, 1).tolist(), strict=True)):
        body += f"<tr><th>layer {layer}</th>"
        for cell, share in zip(row, shares, strict=True):
            # No deeper than 65%, so that the text stays readable.
            ground = f"color-mix(in srgb,var({colour}) {65 * share:.0f}%,transparent)"
            body += f'<td style="background:{ground}">{cell}</td>'
        body += "</tr>"
    top = "".join(f"<th>{head}</th>" for head in range(len(texts[0])))
    return (
        f"<table class=cells><caption>{caption}</caption><thead><tr><th>head</th>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _colour(layer: int, layers: int) -> str:
    """From blue for the first layer by way of green to red for the last one, equally light."""
    return f"oklch(var(--l) 0.15 {260 - 230 * layer / max(layers - 1, 1):.0f})"


def _key(analysis: Analysis) -> str:
    layers = analysis.shape[0]
    items = (f'<span><i style="background:{_colour(i, layers)}"></i>layer {i}</span>' for i in range(layers))
    return f'<div class="key">{"".join(items)}</div>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    logarithmic: bool = False

    @classmethod
    def log(cls, values: Sequence[float]) -> "_Axis":
        """Whole decades around some values, about six of them labelled."""
        low = math.floor(math.log10(min(values)) + 1e-9)
        high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
        step = max(1, math.ceil((high - low) / 6))
        ticks = [(10.0**power, f"1e{power}" if abs(power) > 1 else f"{10.0**power:g}")
                 for power in range(high, low - 1, -step)]  # fmt: skip
        return cls(10.0**low, 10.0**high, ticks, logarithmic=True)

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Line:
    """Points to be joined; a NaN interrupts the line."""

    x: Iterable[float]
    y: Iterable[float]
    colour: str
    width: float = 1.6
    opacity: float = 0.95


def _plot(
    lines: Iterable[_Line],
    x: _Axis,
    y: _Axis,
    title: str,
    *,
    size: tuple[int, int],
    limits: Sequence[float] = (),
) -> str:
    """A small SVG figure; `limits` are values of y to mark with dashed lines."""
    width, height = size
    left, right, top, bottom = 40, 14, 22, 34

    def across(value: float) -> float:
        return left + x.place(value) * (width - left - right)

    def down(value: float) -> float:
        return top + (1 - min(max(y.place(value), 0.0), 1.0)) * (height - top - bottom)

    name = escape(title)
    parts = [
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">',
        f'<text class="title" x="{left}" y="14">{name}</text>',
    ]
    for value, label in y.ticks:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{down(value):.1f}" y2="{down(value):.1f}"/>'
        )
        parts.append(f'<text x="{left - 5}" y="{down(value) + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x.ticks:
        parts.append(f'<text x="{across(value):.1f}" y="{height - 20}" text-anchor="middle">{label}</text>')
    for value in limits:
        parts.append(
            f'<line class="limit" x1="{left}" x2="{width - right}" y1="{down(value):.1f}" y2="{down(value):.1f}"/>'
        )
    frame = f'width="{width - left - right}" height="{height - top - bottom}"'
    parts.append(f'<rect class="frame" x="{left}" y="{top}" {frame}/>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">{x.label}</text>')
    for line in lines:
        style = f"stroke:{line.colour};stroke-width:{line.width};opacity:{line.opacity}"
        for run in _runs(zip(line.x, line.y, strict=True)):
            # A point alone is drawn as a short stroke.
            points = [(across(a), down(b)) for a, b in run]
            points += [(points[0][0] + 1, points[0][1])] if len(points) == 1 else []
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{joined}" style="{style}"/>')
    return "".join(parts) + "</svg>"


def _runs(points: Iterable[tuple[float, float]]) -> Iterable[list[tuple[float, float]]]:
    """The stretches of points between NaNs."""
    run: list[tuple[float, float]] = []
    for point in points:
        if not math.isnan(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _signed_png(tensors: torch.Tensor, scale: Scale) -> str:
    """The heads [H, D, D] of a layer side by side, base64: hue for the sign, opacity for the place on the scale.

    A palette of 255 colours keeps it small: index 0 is between the heads, 1 to 255 run from -1 to 1.
    """
    heads, dim, _ = tensors.shape
    index = (scale.position(tensors) * 127).round().long() + 128  # [H, D, D], 1 to 255
    padded = torch.nn.functional.pad(index, (0, _GAP))  # [H, D, D + gap]
    rows = padded.transpose(0, 1).reshape(dim, heads * (dim + _GAP)).to(torch.uint8).numpy()
    colours, opacities = bytes((0, 0, 0)), bytes((0,))
    for step in range(-127, 128):
        colours += bytes(_POSITIVE if step > 0 else _NEGATIVE)
        opacities += bytes((round(255 * abs(step) / 127),))
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8, 3, 0, 0, 0)  # 8 bits a pixel, palette
    lines = b"".join(b"\0" + row.tobytes() for row in rows)  # each line unfiltered
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours),
        (b"tRNS", opacities),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return base64.b64encode(png).decode("ascii")
