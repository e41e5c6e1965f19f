"""Gated linear units on CUDA: an inner width that matrix units like, and what is elementwise in one pass each way.

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

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Elements: 128 bytes of bf16, a whole line of the matrix units' shared-memory tiles.
ALIGNMENT = 64
# Below so many rows the padding costs more than it brings (decoding).
MIN_ROWS = 512
# Of a program of the backward: rows, whose sum it writes, and how many at a time; columns; warps.
_ROWS, _STEP, _BLOCK, _WARPS = 128, 16, 128, 4


def gated_linear_unit(z: torch.Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> torch.Tensor:
    """Like `reference.gated_linear_unit`, which see."""
    is_large = z.is_cuda and z.numel() >= MIN_ROWS * z.shape[-1]
    if is_large and all(map(is_plain, (gate, up, down))) and gate.out_features % 8:  # type: ignore[operator]
        return padded_gated_linear_unit(z, gate, up, down)  # type: ignore[arg-type]
    return reference.gated_linear_unit(z, gate, up, down)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a linear layer or a norm does only what its class does with its parameters, so that these may stand for it.

    An adapter, a quantised or a parametrised layer is of another class, or holds another kind of weight; a hook, or a
    `forward` that was put in place of the class's, would not be run.
    """
    return (
        type(layer).forward in (nn.Linear.forward, nn.LayerNorm.forward)
        and all(type(p) is nn.Parameter and p.is_floating_point() for p in (layer.weight, layer.bias))
        and not has_hooks(layer)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more, or something else, than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def training_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which the kernels for training compute with `x`: float16 or bfloat16; None where they are of no use."""
    if triton is None or not (x.is_cuda and torch.is_grad_enabled()):
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def precision(dtype: torch.dtype) -> str:
    """How a kernel's products treat float32, which is there for tests: exactly. Of half precision there is only one way."""
    return "ieee" if dtype == torch.float32 else "tf32"


def padded_gated_linear_unit(z: torch.Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    """Like `reference.gated_linear_unit`, with an inner width that is a multiple of `ALIGNMENT`; layers are plain."""
    missing = -gate.out_features % ALIGNMENT
    weight = torch.cat([F.pad(layer.weight, (0, 0, 0, missing)) for layer in (gate, up)])
    bias = torch.cat([F.pad(layer.bias, (0, missing)) for layer in (gate, up)])
    down_weight = F.pad(down.weight, (0, missing))
    dtype = training_dtype(z)
    if dtype is None:
        gated, linear = F.linear(z, weight, bias).chunk(2, dim=-1)
        return F.linear(F.silu(gated) * linear, down_weight, down.bias)
    parameters = [p.to(dtype) for p in (weight, bias, down_weight, down.bias)]
    return _gated_unit(z.reshape(-1, z.shape[-1]).to(dtype), *parameters)[0].view_as(z)


@torch.library.custom_op("pldr::gated_unit", mutates_args=())
def _gated_unit(
    z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, M]; gate and up together [2F, M], [2F]; [M, F], [M] → [N, M]; and gate and up, [N, 2F], for the backward."""
    both = torch.addmm(bias, z, weight.t())
    inner = both.new_empty(len(z), len(weight) // 2)
    _silu_product[(len(z), triton.cdiv(inner.shape[1], 1024))](both, inner, inner.shape[1], BLOCK=1024)
    return torch.addmm(down_bias, inner, down.t()), both


@_gated_unit.register_fake
def _(
    z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return z.new_empty(z.shape), z.new_empty(len(z), len(weight))


@torch.library.custom_op("pldr::gated_unit_backward", mutates_args=())
def _gated_unit_backward(
    gradient: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, both: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of z, weight, bias, down and its bias. The inner activations are computed again: they are the largest."""
    inner = gradient @ down  # its gradient at first
    rows, width = inner.shape
    by_both = torch.empty_like(both)
    programs = triton.cdiv(rows, _ROWS)
    sums = torch.empty(programs, 2 * width, dtype=torch.float32, device=z.device)
    _silu_product_backward[(programs, triton.cdiv(width, _BLOCK))](
        inner, both, by_both, sums, rows, width, ROWS=_ROWS, STEP=_STEP, BLOCK=_BLOCK, num_warps=_WARPS
    )
    of_down = gradient.t() @ inner, gradient.sum(0)
    return by_both @ weight, by_both.t() @ z, sums.sum(0).to(z.dtype), *of_down


@_gated_unit_backward.register_fake
def _(
    gradient: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, both: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    biases = weight.new_empty(len(weight)), down.new_empty(len(down))
    return z.new_empty(z.shape), weight.new_empty(weight.shape), biases[0], down.new_empty(down.shape), biases[1]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    z, weight, _, down, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, weight, down, output[1])


def _backward(ctx, gradient, _unused):  # type: ignore[no-untyped-def]
    return _gated_unit_backward(gradient.contiguous(), *ctx.saved_tensors)


_gated_unit.register_autograd(_backward, setup_context=_save)


if triton is not None:

    @triton.jit
    def sigmoid(x):  # type: ignore[no-untyped-def]
        """In float32, by the reciprocal that is one instruction, and right but for the last bit."""
        e = 1 + tl.exp(-x)
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _silu_product(both, inner, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program: BLOCK columns of a row."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(both + row * 2 * width + column, mask=inside).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + column, mask=inside).to(tl.float32)
        tl.store(inner + row * width + column, (gate * sigmoid(gate) * up).to(inner.dtype.element_ty), mask=inside)

    @triton.jit
    def _silu_product_backward(  # type: ignore[no-untyped-def]
        inner, both, by_both, sums, rows, width, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
    ):
        """A program: BLOCK columns of ROWS rows, and the sums of what it writes over these rows.

        `inner` holds the gradient of silu(gate) · up, and then silu(gate) · up.
        """
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        of_gate, of_up = tl.zeros([STEP, BLOCK], tl.float32), tl.zeros([STEP, BLOCK], tl.float32)
        for start in range(0, ROWS, STEP):
            row = (tl.program_id(0) * ROWS + start + tl.arange(0, STEP)).to(tl.int64)[:, None]
            inside = (row < rows) & (column < width)[None, :]
            at = row * 2 * width + column[None, :]
            gate = tl.load(both + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(both + at + width, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(inner + row * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            open_ = sigmoid(gate)
            silu = gate * open_
            by_gate = gradient * up * (open_ + silu * (1 - open_))
            by_up = gradient * silu
            tl.store(by_both + at, by_gate.to(by_both.dtype.element_ty), mask=inside)
            tl.store(by_both + at + width, by_up.to(by_both.dtype.element_ty), mask=inside)
            tl.store(inner + row * width + column[None, :], (silu * up).to(inner.dtype.element_ty), mask=inside)
            of_gate += by_gate
            of_up += by_up
        sums += tl.program_id(0) * 2 * width + column
        tl.store(sums, tl.sum(of_gate, 0), mask=column < width)
        tl.store(sums + width, tl.sum(of_up, 0), mask=column < width)
