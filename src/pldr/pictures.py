"""Tensors as pictures, without a drawing library: what reports and notebooks show of deductive outputs.

Shapes: L layers, H heads, D head dimension.
"""

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch

GAP = 4  # pixels between heads
_POSITIVE, _NEGATIVE = (222, 92, 32), (38, 124, 222)  # seen on white and on black alike
# A scale is never more than this many times finer around zero than at its ends: about three decades either way.
_MOST_COMPRESSED = 1e3


class Scale(NamedTuple):
    """A scale of values, symmetric around zero: even near zero, logarithmic far from it.

    position(x) = asinh(x / linear) / asinh(bound / linear), from -1 to 1. It shows tensors with a few large values, as
    power laws make them, and is nearly even where there are none.

    Attributes:
        bound: the largest magnitude of the tensor.
        linear: below it the scale is even; the median magnitude.
    """

    bound: float
    linear: float

    def position(self, values: torch.Tensor) -> torch.Tensor:
        """Where on the scale values lie, -1 to 1, float64."""
        return torch.asinh(values.double() / self.linear) / math.asinh(self.bound / self.linear)

    def value(self, position: float) -> float:
        """The value at a position, -1 to 1."""
        return self.linear * math.sinh(position * math.asinh(self.bound / self.linear))

    @classmethod
    def of(cls, tensor: torch.Tensor, example: torch.Tensor) -> "Scale":
        """The scale of a tensor whose values are as those of `example`."""
        bound = float(tensor.abs().max()) or 1.0  # nothing but zeros
        return cls(bound, max(float(example.abs().median()), bound / _MOST_COMPRESSED))


def signed_png(tensors: torch.Tensor, scale: Scale) -> str:
    """The heads [H, D, D] of a layer side by side, base64: hue for the sign, opacity for the place on the scale.

    A palette of 255 colours keeps it small: index 0 is between the heads, 1 to 255 run from -1 to 1.
    """
    heads, dim, _ = tensors.shape
    index = (scale.position(tensors) * 127).round().long() + 128  # [H, D, D], 1 to 255
    padded = torch.nn.functional.pad(index, (0, GAP))  # [H, D, D + gap]
    rows = padded.transpose(0, 1).reshape(dim, heads * (dim + GAP)).to(torch.uint8).numpy()
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


def layers_html(name: str, tensors: torch.Tensor, notes: Iterable[str] = ()) -> str:
    """Heads of layers [L, H, D, D] for a notebook, a row of pictures a layer."""
    scale = Scale.of(tensors, tensors)
    style = "image-rendering: pixelated; display: block; margin: 4px 0"
    size = max(1, 96 // tensors.shape[-1]) * tensors.shape[-2]
    rows = "".join(
        f'<img alt="layer {index}" style="{style}" height="{size}" src="data:image/png;base64,{signed_png(layer, scale)}">'
        for index, layer in enumerate(tensors.float().cpu())
    )
    lines = "".join(f"<pre>{html.escape(note)}</pre>" for note in notes)
    return f"{lines}<p>{html.escape(name)}: a row for each layer, a square for each head, up to ±{scale.bound:.3g}</p>{rows}"
