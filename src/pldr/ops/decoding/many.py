"""The products of a step for tens of sequences, with matrix units; and what stands between the library's own for more."""

import torch
import triton
import triton.language as tl

from pldr.ops.decoding.choice import choose_of_blocks
from pldr.ops.decoding.launch import dependent, prefetch, release, wait
from pldr.ops.decoding.reference import Linear, Norm, State


def dot(
    x: torch.Tensor, linear: Linear, *, gated: bool = False, residual: torch.Tensor | None = None, split: int = 1
) -> torch.Tensor:
    """x Wᵀ + b, and what goes with it.

    Args:
        x: [N, K], in the weights' dtype.
        linear: W [features, K] and b; with `gated`, [2 features, K].
        gated: silu of the first half of the features times the second.
        residual: [N, features], added; the result is then float32.
        split: into how many parts the sum over K is cut.

    Returns:
        [N, features], or with a residual [split, N, features], parts of a sum.
    """
    sequences = len(x)
    features = len(linear.weight) // (2 if gated else 1)
    if residual is None:
        y = torch.empty(sequences, features, dtype=x.dtype, device=x.device)
    else:
        y = torch.empty(split, sequences, features, dtype=torch.float32, device=x.device)
    _launch_dot(x, linear, y, y, residual, gated=gated, split=split)
    return y


def highest(x: torch.Tensor, head: Linear, state: State, column: int) -> None:
    """`dot`, then `choose_highest`, without ever writing the logits."""
    blocks = triton.cdiv(len(head.weight), _dot_tile(len(x), len(head.weight), add=False)["BF"])
    best = torch.empty(len(x), blocks, dtype=torch.float32, device=x.device)
    where = torch.empty(len(x), blocks, dtype=torch.int32, device=x.device)
    _launch_dot(x, head, best, where, highest=True)
    choose_of_blocks(best, where, state, column)


def _launch_dot(
    x: torch.Tensor,
    linear: Linear,
    y: torch.Tensor,
    where: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    gated: bool = False,
    highest: bool = False,
    split: int = 1,
) -> None:
    (sequences, inputs), rows = x.shape, min(64, max(16, triton.next_power_of_2(len(x))))
    tile = _dot_tile(sequences, len(linear.weight), residual is not None)
    steps = triton.cdiv(triton.cdiv(inputs, tile["BK"]), split)
    _dot[(triton.cdiv(len(linear.weight), tile["BF"]), triton.cdiv(sequences, rows), split)](
        x, linear.weight, linear.bias, x if residual is None else residual, y, where, sequences, inputs,
        len(linear.weight) // (2 if gated else 1),
        GATED=gated, ADD=residual is not None, HIGHEST=highest, BN=rows, STEPS=steps,
        LINES=triton.next_power_of_2(triton.cdiv(steps * tile["BK"], 64)),
        LATE=not gated and not highest and residual is None, **tile, **dependent(x),
    )  # fmt: skip


def _dot_tile(sequences: int, features: int, add: bool) -> dict[str, int]:
    """Features and inputs of a program's step, how deep its loads run ahead, and its warps: what was the fastest."""
    if features > 16384:
        return {"BF": 128, "BK": 64, "num_stages": 4, "num_warps": 8}
    wide = sequences > 32
    return {"BF": 64 if wide else 32, "BK": 64 if add and not wide else 128, "num_stages": 4, "num_warps": 4}


@triton.jit
def _dot(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, y, where, sequences, inputs, features,
    GATED: tl.constexpr, ADD: tl.constexpr, HIGHEST: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    STEPS: tl.constexpr, LINES: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: BN sequences, BF rows of weights, STEPS · BK inputs.

    GATED: the rows are those of BF / 2 features in turn. HIGHEST: of the features only the highest and its place are written.
    """
    if not LATE:
        release(PDL)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(0) * BF
    part = tl.program_id(2)
    if GATED:
        of_tile = tl.arange(0, BF) // 2 + first // 2
        columns = of_tile + (tl.arange(0, BF) % 2) * features
    else:
        of_tile = tl.arange(0, BF) + first
        columns = of_tile
    real = of_tile < features
    last = 2 * features - 1 if GATED else features - 1
    b = tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BN, BF], tl.float32)
    if PDL:  # into the second-level cache, by lines of 64 weights, while the kernel before still runs
        line = tl.minimum(part * (STEPS * BK) + tl.arange(0, LINES) * 64, inputs - 1)
        prefetch(weight + tl.minimum(columns, last)[:, None].to(tl.int64) * inputs + line[None, :])
    wait(PDL)
    if LATE:
        release(PDL)
    for step in range(STEPS):
        k = (part * STEPS + step) * BK + tl.arange(0, BK)
        a = tl.load(
            x + rows[:, None] * inputs + k[None, :], mask=(rows < sequences)[:, None] & (k < inputs)[None, :], other=0.0
        )
        w = tl.load(
            weight + columns[None, :].to(tl.int64) * inputs + k[:, None],
            mask=(k < inputs)[:, None] & real[None, :],
            other=0.0,
        )
        total = tl.dot(a, w, total)
    if part == 0:
        total += b[None, :]
    if HIGHEST:
        _store_highest(y, where, total, real[None, :], first, rows, sequences)
        return
    if GATED:
        gate, up = tl.split(tl.reshape(total, [BN, BF // 2, 2]))
        total = gate * tl.sigmoid(gate) * up
        columns = first // 2 + tl.arange(0, BF // 2)
    at = rows[:, None] * features + columns[None, :]
    inside = (rows < sequences)[:, None] & (columns < features)[None, :]
    if ADD:
        if part == 0:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        at += part.to(tl.int64) * sequences * features
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _store_highest(best, where, logits, real, first, rows, sequences):  # type: ignore[no-untyped-def]
    """Of each row's logits [BN, BF] the highest and its place, as `choice.choose_of_blocks` takes them."""
    damage = tl.sum(
        tl.where(real, logits * 0.0, 0.0), 1
    )  # NaN where one is NaN or infinite; a maximum could pass over it
    logits = tl.where(real, logits, -float("inf"))
    top, index = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
    at = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(best + at, top + damage, mask=rows < sequences)
    tl.store(where + at, first + index, mask=rows < sequences)


# --- between the matrix products of many sequences -------------------------------------------------------------------


def norm(x: torch.Tensor, residual: torch.Tensor | None, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm of x + residual. [N, M], or [P, N, M] with parts of a sum → [N, M] in `dtype`."""
    sequences, width = x.shape[-2:]
    y = torch.empty(sequences, width, dtype=dtype, device=x.device)
    _norm[(sequences,)](
        x, x if residual is None else residual, norm.weight, norm.bias, y, sequences, width, norm.eps,
        PARTS=len(x) if x.dim() == 3 else 1, ADD=residual is not None, BLOCK=triton.next_power_of_2(width),
        **dependent(x),
    )  # fmt: skip
    return y


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, residual, gamma, beta, y, sequences, width, eps,
    PARTS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    at = tl.program_id(0) * width + columns
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        values += tl.load(x + part * sequences * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(y + at, (centred / deviation * g + o).to(y.dtype.element_ty), mask=inside)


def silu_product(both: torch.Tensor) -> torch.Tensor:
    sequences, features = both.shape[0], both.shape[1] // 2
    y = torch.empty(sequences, features, dtype=both.dtype, device=both.device)
    _silu_product[(sequences, triton.cdiv(features, 512))](both, y, features, BLOCK=512, **dependent(both))
    return y


@triton.jit
def _silu_product(both, y, features, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    release(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    gate = tl.load(both + row * 2 * features + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * features + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two products, as the plain form does.
    gate = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * features + columns, (gate * up).to(y.dtype.element_ty), mask=inside)


# --- the metric learner ----------------------------------------------------------------------------------------------


def fits_residual_network(width: int, dtype: torch.dtype) -> bool:
    """Whether `residual_network` takes rows of this width."""
    return dtype in (torch.bfloat16, torch.float16) and width in (16, 32, 64, 128)


def residual_network(u: torch.Tensor, gate_up: Linear, down: Linear, norm: Norm) -> torch.Tensor:
    """u ← LayerNorm(GLU(… GLU(u) …) + u) for each residual unit, all of it in one kernel. [N, D] → [N, D].

    Args:
        u: rows.
        gate_up: of U units with G gated linear units each: [U, G, 2 F, D] and [U, G, 2 F], F a multiple of 64.
        down: likewise, [U, G, D, F] and [U, G, D].
        norm: of the end of each, [U, D].
    """
    rows, width = u.shape
    units, glus, _, inner = down.weight.shape
    y = torch.empty_like(u)
    _residual_network[(triton.cdiv(rows, 16),)](
        u, gate_up.weight, gate_up.bias, down.weight, down.bias, norm.weight, norm.bias, y, rows, norm.eps,
        UNITS=units, GLUS=glus, D=width, F=inner, BLOCK=64, ROWS=16, STAGES=3, num_warps=4, **dependent(u),
    )  # fmt: skip
    return y


@triton.jit
def _residual_network(  # type: ignore[no-untyped-def]
    u, gate_up, gate_up_bias, down, down_bias, gamma, beta, y, rows, eps,
    UNITS: tl.constexpr, GLUS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows through everything. What the plain form rounds to the weights' dtype is rounded, and stays on the chip."""
    release(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    f = tl.arange(0, BLOCK)
    at = row[:, None] * D + d[None, :]
    inside = (row < rows)[:, None]
    blocks: tl.constexpr = F // BLOCK
    wait(PDL)
    z = tl.load(u + at, mask=inside, other=0.0)
    residual = z.to(tl.float32)
    total = tl.zeros([ROWS, D], tl.float32)
    for step in tl.range(0, UNITS * GLUS * blocks, num_stages=STAGES):
        glu = step // blocks
        block = step % blocks
        inner = glu * 2 * F + block * BLOCK + f
        w = gate_up + inner[:, None] * D + d[None, :]
        w_gate, w_up = tl.load(w), tl.load(w + F * D)
        w_down = tl.load(down + glu * D * F + d[:, None] * F + (block * BLOCK + f)[None, :])
        gate = tl.dot(z, tl.trans(w_gate)) + tl.load(gate_up_bias + inner)[None, :].to(tl.float32)
        up = tl.dot(z, tl.trans(w_up)) + tl.load(gate_up_bias + inner + F)[None, :].to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(z.dtype).to(tl.float32)
        total = tl.dot((gate * up).to(z.dtype), tl.trans(w_down), total)
        if block == blocks - 1:
            z = (total + tl.load(down_bias + glu * D + d)[None, :].to(tl.float32)).to(z.dtype)
            if glu % GLUS == GLUS - 1:
                values = z.to(tl.float32) + residual
                centred = values - (tl.sum(values, 1) / D)[:, None]
                deviation = tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
                norm = glu // GLUS * D + d
                g = tl.load(gamma + norm).to(tl.float32)
                o = tl.load(beta + norm).to(tl.float32)
                z = (centred / deviation[:, None] * g[None, :] + o[None, :]).to(z.dtype)
                residual = z.to(tl.float32)
            total = tl.zeros([ROWS, D], tl.float32)
    tl.store(y + at, z, mask=inside)
