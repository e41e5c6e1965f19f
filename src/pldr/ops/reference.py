"""The model's arithmetic in plain PyTorch: the oracle for every kernel, and the path on CPU.

Shapes: B batch, H heads, T tokens, D head dimension, M model width, V vocabulary. Equations as in arXiv 2502.13502.
"""

import torch
from torch import nn
from torch.nn import functional as F

# Keeps A_LM strictly positive, so that its elementwise power is defined for any real exponent.
METRIC_EPSILON = 1e-9


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str) -> torch.Tensor:
    """Rotate each pair of dimensions of `x` by its position's angle.

    Args:
        x: [B, H, T, D].
        cos, sin: [B or 1, 1, T, D/2], float32.
        pairing: "adjacent" rotates dimensions (2i, 2i+1) (v51), "halves" rotates (i, i + D/2) (v52).

    Returns:
        [B, H, T, D] in the dtype of `x`; the arithmetic is in float32.
    """
    wide = x.float()
    if pairing == "adjacent":
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def density_matrix(query: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """qᵀq over the tokens of each sequence, the input of the metric learner before its LayerNorm.

    Args:
        query: [B, H, T, D].
        padding_mask: [B, T], zero or False at padding, which is left out of the sum; None where nothing is padded.

    Returns:
        [B, H, D, D].
    """
    if padding_mask is not None:
        query = query.masked_fill(~padding_mask.bool()[:, None, :, None], 0.0)
    return query.transpose(-1, -2) @ query


def power_law(
    A: torch.Tensor,
    metric_weight: torch.Tensor,
    metric_bias: torch.Tensor,
    exponent: torch.Tensor,
    energy_weight: torch.Tensor,
    energy_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the metric learner's output to the operator: A_LM = iSwiGLU(W A + b) + ε, A_P = A_LM^p, G_LM = a A_P + b_a.

    The elementwise part runs in float32 whatever the dtype of A: ε is no fp16 number, and a power law in bf16 would
    keep two decimal digits of its base.

    Args:
        A: [B, H, D, D].
        metric_weight, metric_bias, exponent, energy_weight, energy_bias: W, b, p, a, b_a, each [H, D, D].

    Returns:
        A_LM and A_P (float32), G_LM (dtype of the matrix product), each [B, H, D, D].
    """
    z = (metric_weight @ A + metric_bias).float()
    A_LM = z * F.silu(z) + METRIC_EPSILON
    A_P = A_LM.pow(exponent.float())
    G_LM = energy_weight @ A_P.to(energy_weight.dtype) + energy_bias
    return A_LM, A_P, G_LM


def gated_linear_unit(z: torch.Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> torch.Tensor:
    """(silu(z W1 + b1) ∘ (z W2 + b2)) W3 + b3.

    Args:
        z: [..., M].
        gate, up: W1, b1 and W2, b2 as layers, M to F features; linear, or whatever was put in their place.
        down: W3, b3, F to M features.

    Returns:
        [..., M].
    """
    return down(F.silu(gate(z)) * up(z))


# Targets with this value count nothing, as in torch and transformers.
IGNORED_TARGET = -100


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of the cross-entropy of `hidden @ weightᵀ + bias` against `targets`, and of their right guesses.

    Args:
        hidden: [N, M].
        weight: [V, M].
        bias: [V].
        targets: [N] (int64); rows with `IGNORED_TARGET` count nothing.

    Returns:
        The loss, a float32 scalar in nats; and the number of right guesses, see `right_guesses`.
    """
    logits = F.linear(hidden, weight, bias).float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    return loss, right_guesses(logits.detach(), targets)


def right_guesses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many targets have the highest logit of their row (ties count). [N, V], [N] → float32 scalar."""
    counted = targets != IGNORED_TARGET
    of_target = logits.gather(1, targets.where(counted, 0)[:, None])[:, 0]
    return ((of_target >= logits.amax(1)) & counted).sum().float()
