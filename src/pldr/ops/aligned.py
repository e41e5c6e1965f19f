"""Gated linear units whose inner width is no multiple of what matrix units like, on CUDA.

The published widths (2389 of the feed-forward block, 170 of the metric learner) leave every row of the inner activations
misaligned, and such matrix products run at a fraction of the rate. The weights, which are small, are padded with zeros at
each call; the padded columns are silu(0) · 0 = 0 and meet zero weights, so that the result is the same sum. The two
inner products become one.
"""

import torch
from torch.nn import functional as F

# Elements: 128 bytes of bf16, a whole line of the matrix units' shared-memory tiles.
ALIGNMENT = 64
# Below so many rows the padding costs more than it brings (decoding).
MIN_ROWS = 512


def worthwhile(z: torch.Tensor, inner_width: int) -> bool:
    return z.is_cuda and inner_width % 8 != 0 and z.numel() >= MIN_ROWS * z.shape[-1]


def gated_linear_unit(
    z: torch.Tensor,
    gate: tuple[torch.Tensor, torch.Tensor],
    up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """(silu(z W1 + b1) ∘ (z W2 + b2)) W3 + b3, each of `gate`, `up`, `down` a (weight [out, in], bias [out]) pair."""
    missing = -gate[0].shape[0] % ALIGNMENT
    weight = torch.cat([F.pad(part, (0, 0, 0, missing)) for part in (gate[0], up[0])])
    bias = torch.cat([F.pad(part, (0, missing)) for part in (gate[1], up[1])])
    gated, linear = F.linear(z, weight, bias).chunk(2, dim=-1)
    return F.linear(F.silu(gated) * linear, F.pad(down[0], (0, missing)), down[1])
