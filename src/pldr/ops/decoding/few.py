"""The products of a step for few sequences: each weight is read once, straight into registers, and summed in float32.

A program holds some rows of a weight matrix and multiplies them with every sequence's vector, after whatever comes before
the product: LayerNorm, or the sum of attention's parts.
"""

import torch
import triton
import triton.language as tl

from pldr.ops.decoding.attention import sum_of_parts
from pldr.ops.decoding.choice import choose_of_blocks
from pldr.ops.decoding.launch import dependent, release, wait
from pldr.ops.decoding.reference import Linear, Norm, Parts, State

# Weights that a program holds, in elements.
_TILE = 8192


def _tile(inputs: int, features: int) -> tuple[int, int, int]:
    """Columns and rows of a program's weights, and its warps: what was the fastest. All inputs of a row are held at once."""
    columns = triton.next_power_of_2(inputs)
    rows = max(1, _TILE // columns)
    return columns, rows * 2 if features > 16384 else rows, 8 if columns <= 1024 else 4


def embed(tokens: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    width = table.shape[1]
    x = torch.empty(len(tokens), width, dtype=torch.float32, device=table.device)
    _embed[(len(tokens),)](
        tokens, table, x, width, scale, BLOCK=triton.next_power_of_2(width), **dependent(table)
    )  # fmt: skip
    return x


@triton.jit
def _embed(tokens, table, x, width, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    release(PDL)
    wait(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    token = tl.maximum(tl.load(tokens + row), 0)
    values = tl.load(table + token * width + columns, mask=columns < width).to(tl.float32)
    tl.store(x + row * width + columns, values * scale, mask=columns < width)


def norm_linear(
    x: torch.Tensor, norm: Norm, linear: Linear, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.decode.norm_linear`, or with `gated` `norm_gated`."""
    sequences, width = x.shape
    features = len(linear.weight) // (2 if gated else 1)
    y = torch.empty(sequences, features, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x)
    columns, rows, warps = _tile(width, features)
    _norm_linear[(triton.cdiv(features, rows),)](
        x, norm.weight, norm.bias, linear.weight, linear.bias, y, h, y, y, width, features, norm.eps,
        N=sequences, GATED=gated, HIGHEST=False, LATE=not gated, COLUMNS=columns, ROWS=rows, num_warps=warps,
        **dependent(x),
    )  # fmt: skip
    return y, h


def norm_highest(x: torch.Tensor, norm: Norm, head: Linear, state: State, column: int) -> None:
    """`norm_linear`, then `choose_highest`, without ever writing the logits."""
    sequences, width = x.shape
    features = len(head.weight)
    columns, rows, warps = _tile(width, features)
    blocks = triton.cdiv(features, rows)
    best = torch.empty(sequences, blocks, dtype=torch.float32, device=x.device)
    where = torch.empty(sequences, blocks, dtype=torch.int32, device=x.device)
    _norm_linear[(blocks,)](
        x, norm.weight, norm.bias, head.weight, head.bias, x, x, best, where, width, features, norm.eps,
        N=sequences, GATED=False, HIGHEST=True, LATE=False, COLUMNS=columns, ROWS=rows, num_warps=warps, **dependent(x),
    )  # fmt: skip
    choose_of_blocks(best, where, state, column)


@triton.jit
def _norm_linear(  # type: ignore[no-untyped-def]
    x, gamma, beta, weight, bias, y, h, best, where, width, features, eps,
    N: tl.constexpr, GATED: tl.constexpr, HIGHEST: tl.constexpr, LATE: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS features of every sequence.

    GATED: a feature is silu of one row times another, `features` below. HIGHEST: of the features only the highest and its
    place are written, and no h. LATE: the next kernel starts when this one's predecessor has ended, so that it may read
    what that one wrote without waiting.
    """
    if not LATE:
        release(PDL)
    columns = tl.arange(0, COLUMNS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = columns < width
    tile = rows[:, None].to(tl.int64) * width + columns[None, :]
    held = (rows < features)[:, None] & inside[None, :]
    w = tl.load(weight + tile, mask=held, other=0.0)
    b = tl.load(bias + rows, mask=rows < features, other=0.0).to(tl.float32)
    if GATED:
        below = tl.full([1], features, tl.int64) * width
        w_up = tl.load(weight + below + tile, mask=held, other=0.0)
        b_up = tl.load(bias + features + rows, mask=rows < features, other=0.0).to(tl.float32)
    g = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    if LATE:
        release(PDL)
    for n in tl.static_range(N):
        values = tl.load(x + n * width + columns, mask=inside, other=0.0)
        mean = tl.sum(values, 0) / width
        centred = tl.where(inside, values - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        normed = centred / deviation * g + o
        total = tl.sum(w.to(tl.float32) * normed[None, :], 1) + b
        if GATED:
            up = tl.sum(w_up.to(tl.float32) * normed[None, :], 1) + b_up
            total = total * tl.sigmoid(total) * up
        if HIGHEST:
            damage = tl.sum(total * 0.0, 0)  # NaN where one is NaN or infinite; a maximum could pass over it
            total = tl.where(rows < features, total, -float("inf"))
            highest, index = tl.max(total, 0, return_indices=True, return_indices_tie_break_left=True)
            at = n * tl.num_programs(0) + tl.program_id(0)
            tl.store(best + at, highest + damage)
            tl.store(where + at, tl.program_id(0) * ROWS + index)
        else:
            if tl.program_id(0) == 0:
                tl.store(h + n * width + columns, normed, mask=inside)
            tl.store(y + n * features + rows, total, mask=rows < features)


def linear_add(x: torch.Tensor | Parts, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
    features, width = linear.weight.shape
    sequences = len(residual)
    y = torch.empty(sequences, features, dtype=torch.float32, device=residual.device)
    columns, rows, warps = _tile(width, features)
    parts = x if isinstance(x, Parts) else Parts(x, x, x)
    _linear_add[(triton.cdiv(features, rows),)](
        *parts, linear.weight, linear.bias, residual, y, width, features,
        N=sequences, PARTS=parts.out.shape[1] if isinstance(x, Parts) else 0,
        D=parts.out.shape[-1], COLUMNS=columns, ROWS=rows, num_warps=warps, **dependent(residual),
    )  # fmt: skip
    return y


@triton.jit
def _linear_add(  # type: ignore[no-untyped-def]
    x, highest, total, weight, bias, residual, y, width, features,
    N: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    columns = tl.arange(0, COLUMNS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = columns < width
    held = (rows < features)[:, None] & inside[None, :]
    w = tl.load(weight + rows[:, None].to(tl.int64) * width + columns[None, :], mask=held, other=0.0)
    b = tl.load(bias + rows, mask=rows < features, other=0.0).to(tl.float32)
    wait(PDL)
    for n in tl.static_range(N):
        if PARTS:
            values = sum_of_parts(x, highest, total, n, columns, inside, width, PARTS, D, COLUMNS)
        else:
            values = tl.load(x + n * width + columns, mask=inside, other=0.0)
        result = tl.sum(w.to(tl.float32) * values[None, :], 1) + b
        result += tl.load(residual + n * features + rows, mask=rows < features, other=0.0)
        tl.store(y + n * features + rows, result, mask=rows < features)
