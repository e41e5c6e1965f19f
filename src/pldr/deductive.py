"""The deductive outputs of a PLDR-LLM, their statistics, and the DAG loss.

Shapes: L layers, B passages, H heads, D head dimension.
"""

import math
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from pldr.modeling_pldr import PldrAttention, PldrForCausalLM
from pldr.operator import DeductiveOutputs, LearnedOperator
from pldr.ops.metric_learner import residual_network

# Shares of the largest singular value below which another counts as zero, where a numerical rank is shown.
RANK_TOLERANCES = (1e-2, 1e-3)


@torch.no_grad()
def deductive_outputs(
    model: PldrForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> DeductiveOutputs:
    """A, A_LM, A_P and G_LM of every layer, for each sequence, in evaluation mode.

    Args:
        model: with any operator.
        input_ids: [B, T].
        attention_mask: [B, T], zero at padding.

    Returns:
        A, A_LM, A_P, G_LM, each [L, B, H, D, D]. With a constant operator the first three are None and G_LM is
        [L, 1, H, D, D].
    """
    was_training = model.training
    model.eval()
    try:
        layers = model.model(
            input_ids, attention_mask=attention_mask, use_cache=False, output_deductive_outputs=True
        ).deductive_outputs
    finally:
        model.train(was_training)
    A, A_LM, A_P, G_LM = (None if kind[0] is None else torch.stack(kind) for kind in zip(*layers, strict=True))
    assert G_LM is not None
    return DeductiveOutputs(A, A_LM, A_P, G_LM)


def dag_loss(X: torch.Tensor) -> torch.Tensor:
    """|log(trace(expm(X ∘ X)) / D)|, averaged over every leading dimension: zero exactly where X is acyclic.

    Args:
        X: [..., D, D], for example A_LM of one layer, [B, H, D, D], or of all, [L, B, H, D, D].

    Returns:
        A scalar, differentiable, in the dtype of X, at least float32. float32 resolves the loss to about 1e-7 and holds
        entries of X up to about 9 (the exponential overflows beyond); pass X in float64 for more of both.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    return (_TraceOfExponential.apply(X.square()) / X.shape[-1]).log().abs().mean()


class _TraceOfExponential(torch.autograd.Function):
    """tr(exp(M)) of each matrix. Its gradient is exp(M)ᵀ, which is at hand; autograd's own takes an exponential of twice the size."""

    @staticmethod
    def forward(ctx: Any, M: torch.Tensor) -> torch.Tensor:
        exponential = torch.linalg.matrix_exp(M)
        ctx.save_for_backward(exponential)
        return exponential.diagonal(dim1=-2, dim2=-1).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (exponential,) = ctx.saved_tensors
        return gradient[..., None, None] * exponential.mT


def variation(X: torch.Tensor) -> torch.Tensor:
    """How far a deductive output varies over passages, layer by layer: RMS of (X - mean over B) / RMS of that mean.

    Args:
        X: [L, B, H, D, D] with B ≥ 2.

    Returns:
        [L], float64; 0 where the output does not depend on the input at all.

    Raises:
        ValueError: fewer than two passages, or values that are not finite.
    """
    if X.shape[1] < 2:
        raise ValueError("variation: needs at least two passages")
    X = _finite(X, "variation")
    mean = X.mean(1, keepdim=True)
    return _rms(X - mean) / _rms(mean)


def log_determinant(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sign and log10 of the magnitude of the determinants of X [..., D, D], in float64, each [...].

    The logarithm of the magnitude keeps determinants such as 1e-400, which no floating-point number can hold.

    Raises:
        ValueError: values that are not finite.
    """
    sign, log = torch.linalg.slogdet(_finite(X, "log_determinant"))
    return sign, log / math.log(10.0)


def row_jacobians(model: PldrForCausalLM, input_ids: torch.Tensor, *, rows: int = 32) -> torch.Tensor:
    """Jacobians of the metric learner's residual network at its input: how a row of A follows a row of LayerNorm(qᵀq).

    Where they contract in every layer, what differs between texts is lost on the way to A, and G_LM becomes a constant.

    Args:
        model: with a learned operator.
        input_ids: [B, T].
        rows: of each layer, spread evenly over sequences, heads and rows of the density matrix.

    Returns:
        [L, rows or less, D, D], at least float32: derivatives of each output number by each input number.

    Raises:
        ValueError: the operator is constant, and has no such network.
    """
    if model.config.operator != "learned":
        raise ValueError("row_jacobians: needs a learned operator; a constant one has no metric learner")
    operators = [cast(LearnedOperator, cast(PldrAttention, layer.self_attn).operator) for layer in model.model.layers]
    inputs: list[torch.Tensor] = []
    hooks = [
        each.input_norm.register_forward_hook(lambda module, args, output: inputs.append(output.detach()))
        for each in operators
    ]
    try:
        deductive_outputs(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for operator, A in zip(operators, inputs, strict=True):
        every = A.flatten(0, -2)
        picked = every[:: max(1, len(every) // rows)][:rows]
        of_one = torch.func.jacrev(lambda row, units=operator.metric_learner: residual_network(row[None], units)[0])
        found.append(torch.func.vmap(of_one)(picked).detach())
    jacobians = torch.stack(found)
    return jacobians.to(torch.promote_types(jacobians.dtype, torch.float32))


def numerical_rank(X: torch.Tensor, tolerance: float = 1e-2) -> torch.Tensor:
    """How many singular values of X [..., D, D] exceed `tolerance` times the largest, [...] (int64).

    Raises:
        ValueError: values that are not finite.
    """
    singular_values = torch.linalg.svdvals(_finite(X, "numerical_rank"))
    return (singular_values > tolerance * singular_values[..., :1]).sum(-1)


def _finite(X: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(X).all()):
        raise ValueError(f"{name}: the tensor holds NaN or infinite values")
    return X.double()


def _rms(X: torch.Tensor) -> torch.Tensor:
    return X.square().flatten(1).mean(1).sqrt()
