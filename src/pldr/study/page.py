"""A report of the deductive outputs as one HTML file that needs no network and follows the light or dark theme.

Here the numbers get their places, texts and pixels; the words are in report.html.j2, the look in report.css. Figures are
inline SVG in the theme's colours. Tensors are PNG images whose opacity is the magnitude, over the page's own ground, so
that one image serves both themes.

Shapes: L layers, H heads, D head dimension.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pldr import __version__
from pldr.deductive import RANK_TOLERANCES
from pldr.pictures import GAP, Scale, signed_png
from pldr.study.statistics import Analysis, Statistics
from pldr.tables import COLUMNS, layer_rows, number

_WIDEST = 1000  # pixels of a row of heads, where it can be that small
_SPECTRUM_FLOOR = 1e-10
_VARIATION_FLOOR = 1e-8
_HEAD_COLUMNS = ("layer", "head", "RMS", "min", "max", *(f"rank {t:.0e}".replace("e-0", "e-") for t in RANK_TOLERANCES),
                 "sign of det", "log10|det|", "condition", "passages")  # fmt: skip

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report(analysis: Analysis, *, title: str, source: str = "") -> str:
    """The report as HTML.

    Args:
        analysis: see `pldr.study.statistics.analyse_model`.
        title: name of the model.
        source: what the passages are, for people.
    """
    layers = analysis.shape[0]
    sections = {
        "tensors": "The tensors",
        "spectra": "Singular values",
        "rank": "Rank and determinant",
        "values": "Distribution of the values",
    }
    if analysis.passages:
        sections["passages"] = "Invariance over passages"
    if analysis.lengths:
        sections["growth"] = "Change as a passage grows"
    sections["numbers"] = "The numbers"
    colours = [_colour(layer, layers) for layer in range(layers)]
    return _TEMPLATES.get_template("report.html.j2").render(
        title=title,
        source=source,
        version=__version__,
        analysis=analysis,
        sections=sections,
        colours=colours,
        variation_floor=number(_VARIATION_FLOOR, ".0e"),
        layer_columns=("layer", *COLUMNS),
        head_columns=_HEAD_COLUMNS,
        tensors=[_tensor(name, analysis, colours) for name in analysis.tensors],
    )


def _tensor(name: str, analysis: Analysis, colours: Sequence[str]) -> dict[str, Any]:
    """What the sections show of one tensor."""
    statistics = analysis.tensors[name]
    lengths = analysis.lengths[:-1]  # the last one is the reference itself
    return {
        "name": name,
        "pictures": _pictures(statistics),
        "spectra": _spectra(statistics, colours),
        "rank": _ranks(statistics),
        "determinant": _determinants(statistics),
        "distribution": _distribution(name, statistics, colours),
        "variation": _variations(statistics),
        "growth": _growth(name, statistics, lengths, colours) if lengths else None,
        "layer_rows": [(str(layer), *row) for layer, row in enumerate(layer_rows(statistics))],
        "head_rows": _head_rows(statistics),
    }


def _colour(layer: int, layers: int) -> str:
    """From blue for the first layer by way of green to red for the last one, equally light."""
    return f"oklch(var(--l) 0.15 {260 - 230 * layer / max(layers - 1, 1):.0f})"


# --- tables ---------------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """Of a matrix: `depth` is its ground's, in percent; `mark` is raised."""

    text: str
    depth: str
    mark: str = ""


def _matrix(texts: list[list[str]], depths: torch.Tensor, marks: list[list[str]] | None = None) -> list[list[_Cell]]:
    """Cells of layers and heads; `depths` [L, H], from 0 to 1."""
    marks = marks or [[""] * len(row) for row in texts]
    # No deeper than 65%, so that the text stays readable.
    shares = [[f"{65 * share:.0f}" for share in row] for row in depths.clamp(0, 1).tolist()]
    return [list(map(_Cell, *rows)) for rows in zip(texts, shares, marks, strict=True)]


def _ranks(statistics: Statistics) -> list[list[_Cell]]:
    rank = statistics.rank[RANK_TOLERANCES[0]]
    texts = [[f"{value:.0f}" for value in row] for row in rank.tolist()]
    return _matrix(texts, rank / statistics.singular_values.shape[-1])


def _determinants(statistics: Statistics) -> list[list[_Cell]]:
    logs, signs = statistics.log10_determinant.tolist(), statistics.determinant_sign.tolist()
    marks = [list(map(_sign_mark, *rows)) for rows in zip(signs, logs, strict=True)]
    lowest = min([-1.0, *(value for row in logs for value in row if math.isfinite(value))])
    return _matrix(
        [[number(value, ".0f") for value in row] for row in logs], statistics.log10_determinant / lowest, marks
    )


def _sign_mark(sign: float, logarithm: float) -> str:
    """What to put behind the logarithm of a determinant's magnitude; `sign` is a mean over passages."""
    return "" if sign == 1 or logarithm == -math.inf else "−" if sign == -1 else "±"


def _variations(statistics: Statistics) -> list[list[_Cell]]:
    texts = [[number(value, ".0e") for value in row] for row in statistics.variation.tolist()]
    depths = 1 - statistics.variation.clamp(min=_VARIATION_FLOOR).log10() / math.log10(_VARIATION_FLOOR)
    return _matrix(texts, depths)


def _head_rows(statistics: Statistics) -> list[list[str]]:
    """A row of texts a head, for `_HEAD_COLUMNS`."""
    layers, heads = statistics.rms.shape
    return [
        [
            str(layer),
            str(head),
            number(statistics.rms[layer, head]),
            number(statistics.minimum[layer, head]),
            number(statistics.maximum[layer, head]),
            *(number(statistics.rank[tolerance][layer, head], ".1f") for tolerance in RANK_TOLERANCES),
            number(statistics.determinant_sign[layer, head]),
            number(statistics.log10_determinant[layer, head], ".1f"),
            number(statistics.condition[layer, head]),
            number(statistics.variation[layer, head]),
        ]
        for layer in range(layers)
        for head in range(heads)
    ]


# --- plots ----------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Plot:
    """A small figure, in pixels; `limits` are values of y to mark with dashed lines."""

    title: str
    x: _Axis
    y: _Axis
    lines: Sequence[_Line]
    size: tuple[int, int] = (508, 230)
    limits: Sequence[float] = ()

    # Between the frame and the edges.
    left: ClassVar[int] = 40
    right: ClassVar[int] = 14
    top: ClassVar[int] = 22
    bottom: ClassVar[int] = 34

    def across(self, value: float) -> float:
        """Where a value of x is."""
        return self.left + self.x.place(value) * (self.size[0] - self.left - self.right)

    def down(self, value: float) -> float:
        """Where a value of y is, within the frame."""
        return self.top + (1 - min(max(self.y.place(value), 0.0), 1.0)) * (self.size[1] - self.top - self.bottom)

    def polylines(self) -> Iterator[tuple[_Line, str]]:
        """Each line's stretches, with their points in SVG's words."""
        for line in self.lines:
            for run in _runs(zip(line.x, line.y, strict=True)):
                points = [(self.across(x), self.down(y)) for x, y in run]
                if len(points) == 1:  # drawn as a short stroke
                    points.append((points[0][0] + 1, points[0][1]))
                yield line, " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _runs(points: Iterable[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """The stretches of points between NaNs."""
    for is_gap, run in itertools.groupby(points, lambda point: math.isnan(point[1])):
        if not is_gap:
            yield list(run)


def _spectra(statistics: Statistics, colours: Sequence[str]) -> list[_Plot]:
    """A panel a layer, a line a head."""
    values = statistics.singular_values.clamp(min=_SPECTRUM_FLOOR)
    layers, _, dim = values.shape
    # At most five panels side by side, and the same number in every line as far as that goes.
    width = min(1020 // math.ceil(layers / math.ceil(layers / 5)) - 4, 330)
    x = _Axis(1, max(dim, 2), [(tick, str(tick)) for tick in sorted({1, max(dim // 2, 1), dim})], "index")
    y = _Axis.log([float(values.min()), 1e-3, 1.0])
    return [
        _Plot(
            f"layer {layer}",
            x,
            y,
            [_Line(range(1, dim + 1), head.tolist(), colour, 1.2, 0.55) for head in heads],
            (width, 190),
            RANK_TOLERANCES,
        )
        for layer, (heads, colour) in enumerate(zip(values, colours, strict=True))
    ]


def _distribution(name: str, statistics: Statistics, colours: Sequence[str]) -> _Plot:
    """Of the values, a line a layer."""
    histogram = statistics.histogram
    count = histogram.shape[1]
    middles = [(2 * index + 1) / count - 1 for index in range(count)]
    x = _Axis(-1, 1, _ticks(statistics.scale), "value")
    y = _Axis.log([max(float(histogram[histogram > 0].min()), 1e-8), 1.0])
    lines = [
        _Line(middles, _within_range(row, y.low), colour)
        for row, colour in zip(histogram.tolist(), colours, strict=True)
    ]
    return _Plot(name, x, y, lines)


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    """Five, from end to end: place and text."""
    return [(place / 2, number(scale.value(place / 2))) for place in range(-2, 3)]


def _within_range(fractions: list[float], floor: float) -> list[float]:
    """Empty bins on the floor between the smallest and the largest value, NaN outside."""
    filled = [index for index, fraction in enumerate(fractions) if fraction]
    return [max(f, floor) if filled[0] <= index <= filled[-1] else math.nan for index, f in enumerate(fractions)]


def _growth(name: str, statistics: Statistics, lengths: Sequence[int], colours: Sequence[str]) -> _Plot:
    """The difference to the whole passage by the first tokens, a line a layer."""
    values = statistics.growth[:-1]
    x = _Axis(1, max(lengths[-1], 2), [(n, str(n)) for n in lengths[::2]], "first tokens", logarithmic=True)
    y = _Axis.log(values[values > 0].tolist() or [0.1, 1.0])
    lines = [
        _Line(lengths, [value or math.nan for value in layer], colour)
        for layer, colour in zip(values.T.tolist(), colours, strict=True)
    ]
    return _Plot(name, x, y, lines)


# --- pictures -------------------------------------------------------------------------------------------------------


def _pictures(statistics: Statistics) -> dict[str, Any]:
    """A PNG a layer, in base64, and how large to show it."""
    _, heads, dim, _ = statistics.example.shape
    stride = dim + GAP
    factor = max(1, min(_WIDEST // (heads * stride), 160 // stride))
    return {
        "images": [signed_png(layer, statistics.scale) for layer in statistics.example],
        "heads": heads,
        "step": stride * factor,
        "height": dim * factor,
        "gap": GAP * factor,
        "ticks": _ticks(statistics.scale),
    }
