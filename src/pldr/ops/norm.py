"""LayerNorm of a sum, as every layer has it twice, in one pass each way on CUDA in training.

The backward keeps the normalised values in float16 in place of the sum in float32: half the memory, and as fine as its
products need. Its gradient takes in what comes in half precision from the next matrix product.

`add_norm` is the entry: this where `training_dtype` says so, else an addition and the norm.
"""

import torch
from torch import nn

from pldr.ops.aligned import is_plain, training_dtype

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Programs of the backward, each with sums of its own: some for each of a GPU's multiprocessors.
_PROGRAMS = 528
# Rows at a time.
_ROWS = 2


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: nn.Module, *, rounded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + residual), both [..., M]; `residual` is float32 under autocast, and so is the result.

    Args:
        rounded: the result is wanted in the dtype of matrix products, too.

    Returns:
        The result twice, the second time in that dtype where `rounded` asks for it and the kernel runs.
    """
    dtype = training_dtype(x)
    if dtype != x.dtype or residual.dtype != torch.float32 or x.shape[-1] > 8192 or not is_plain(norm):
        y = norm(x + residual)
        return y, y
    weight, bias = norm.weight, norm.bias
    y, low, *_ = _add_norm(x.contiguous(), residual.contiguous(), weight, bias, norm.eps, rounded)
    return y, low if rounded else y


@torch.library.custom_op("pldr::add_norm", mutates_args=())
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm, rounded or [0], and for the backward the normalised values and 1 / deviation."""
    y, low, kept, scale = _empty(x, residual, rounded)
    rows, width = scale.numel(), x.shape[-1]
    _norm_forward[(triton.cdiv(rows, _ROWS),)](
        x, residual, weight, bias, y, low, kept, scale, rows, width, eps,
        ROUNDED=rounded, BLOCK=triton.next_power_of_2(width), ROWS=_ROWS,
    )  # fmt: skip
    return y, low, kept, scale


def _empty(
    x: torch.Tensor, residual: torch.Tensor, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, scale = residual.new_empty(x.shape), residual.new_empty(x.shape[:-1])
    return y, x.new_empty(x.shape if rounded else 0), x.new_empty(x.shape, dtype=torch.float16), scale


@_add_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(x, residual, rounded)


@torch.library.custom_op("pldr::add_norm_backward", mutates_args=())
def _add_norm_backward(
    gradient: torch.Tensor, of_rounded: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, in the dtype of `of_rounded`, and of residual, and those of weight and bias, [2, M]."""
    rows, width = scale.numel(), kept.shape[-1]
    by_x, by_residual = of_rounded.new_empty(kept.shape), torch.empty_like(gradient)
    sums = torch.empty((_PROGRAMS, 2, width), dtype=torch.float32, device=kept.device)
    _norm_backward[(_PROGRAMS,)](
        gradient, of_rounded, kept, scale, weight, by_x, by_residual, sums, rows, width,
        ROUNDED=of_rounded.numel() > 0, BLOCK=triton.next_power_of_2(width), ROWS=_ROWS,
    )  # fmt: skip
    return by_x, by_residual, sums.sum(0).to(weight.dtype)


@_add_norm_backward.register_fake
def _(
    gradient: torch.Tensor, of_rounded: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return of_rounded.new_empty(kept.shape), torch.empty_like(gradient), weight.new_empty(2, len(weight))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, kept, scale = output
    ctx.mark_non_differentiable(kept, scale)
    ctx.save_for_backward(kept, scale, inputs[2])


def _backward(ctx, gradient, of_rounded, *_unused):  # type: ignore[no-untyped-def]
    gradients = gradient.contiguous(), of_rounded.contiguous()
    *by_values, by_parameters = _add_norm_backward(*gradients, *ctx.saved_tensors)
    return *by_values, *by_parameters, None, None


_add_norm.register_autograd(_backward, setup_context=_save)


if triton is not None:

    @triton.jit
    def _norm_forward(  # type: ignore[no-untyped-def]
        x, residual, weight, bias, y, low, kept, scale, rows, width, eps,
        ROUNDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """A program: ROWS rows."""
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        there = column < width
        inside = (row < rows)[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0)
        v = tl.where(inside, v - (tl.sum(v, 1) / width)[:, None], 0.0)
        inverse = 1 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
        v *= inverse[:, None]
        w = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
        b = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        tl.store(scale + row, inverse, mask=row < rows)
        tl.store(kept + at, v.to(tl.float16), mask=inside)
        v = v * w + b
        tl.store(y + at, v, mask=inside)
        if ROUNDED:
            tl.store(low + at, v.to(low.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward(  # type: ignore[no-untyped-def]
        gradient, of_rounded, kept, scale, weight, by_x, by_residual, sums, rows, width,
        ROUNDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """A program: every so many of the rows, ROWS at a time, and the sums over them of weight's and bias's gradients."""
        column = tl.arange(0, BLOCK)
        there = column < width
        w = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
        of_weight, of_bias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & there[None, :]
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            g = tl.load(gradient + at, mask=inside, other=0.0)
            if ROUNDED:
                g += tl.load(of_rounded + at, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
            of_weight += g * n
            of_bias += g
            g *= w
            g -= (tl.sum(g, 1) / width)[:, None] + n * (tl.sum(g * n, 1) / width)[:, None]
            g *= tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
            tl.store(by_x + at, g.to(by_x.dtype.element_ty), mask=inside)
            tl.store(by_residual + at, g, mask=inside)
        sums += tl.program_id(0) * 2 * width + column
        tl.store(sums, tl.sum(of_weight, 0), mask=there)
        tl.store(sums + width, tl.sum(of_bias, 0), mask=there)
