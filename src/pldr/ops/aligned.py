"""Gated linear units whose inner width is no multiple of what matrix units like, on CUDA.

The published widths (2389 of the feed-forward block, 170 of the metric learner) leave every row of the inner
activations misaligned, and such matrix products run at a fraction of the rate. The weights, which are small, are padded
with zeros at each call; the padded columns are silu(0) · 0 = 0 and meet zero weights, so that the result is the same
sum. The two inner products become one.

`gated_linear_unit` is the entry: the padded form where it is faster and the same, else `reference.gated_linear_unit`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pldr.ops import reference

# Elements: 128 bytes of bf16, a whole line of the matrix units' shared-memory tiles.
ALIGNMENT = 64
# Below so many rows the padding costs more than it brings (decoding).
MIN_ROWS = 512


def gated_linear_unit(z: torch.Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> torch.Tensor:
    """Like `reference.gated_linear_unit`, which see."""
    is_large = z.is_cuda and z.numel() >= MIN_ROWS * z.shape[-1]
    if is_large and all(map(is_plain, (gate, up, down))) and gate.out_features % 8:  # type: ignore[operator]
        return padded_gated_linear_unit(z, gate, up, down)  # type: ignore[arg-type]
    return reference.gated_linear_unit(z, gate, up, down)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but x Wᵀ + b with its parameters, so that these may stand for it.

    An adapter, a quantised or a parametrised layer is of another class, or holds another kind of weight; a hook, or a
    `forward` that was put in place of the class's, would not be run.
    """
    return (
        type(layer) is nn.Linear
        and all(type(p) is nn.Parameter and p.is_floating_point() for p in (layer.weight, layer.bias))
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in vars(layer)
    )


def padded_gated_linear_unit(z: torch.Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    """Like `reference.gated_linear_unit`, with an inner width that is a multiple of `ALIGNMENT`; layers are plain."""
    missing = -gate.out_features % ALIGNMENT
    weight = torch.cat([F.pad(layer.weight, (0, 0, 0, missing)) for layer in (gate, up)])
    bias = torch.cat([F.pad(layer.bias, (0, missing)) for layer in (gate, up)])
    gated, linear = F.linear(z, weight, bias).chunk(2, dim=-1)
    return F.linear(F.silu(gated) * linear, F.pad(down.weight, (0, missing)), down.bias)
