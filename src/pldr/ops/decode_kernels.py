"""The steps of decoding as Triton kernels; see `ops.decode` for what each computes and `ops.decode_reference` for how.

For few sequences a step reads each weight once, straight into registers, and sums in float32: a program holds some rows
of a weight matrix and multiplies them with every sequence's vector, after whatever comes before the product (LayerNorm,
the sum of attention's parts). Its weights do not depend on the step before, so they are fetched before that has ended:
with programmatic dependent launch (PDL, Hopper and later) a kernel starts while its predecessor still runs, and waits
for it only where it needs its results. For many sequences the products are left to matrix products, and the kernels here
are what stands between them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pldr.ops.decode_reference import Choice, Linear, Norm, State

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_wait = gdc_launch_dependents = None

# Weights that a program of the first kind holds in registers, in elements.
_TILE = 8192
# Into how many parts attention over the cache is split while there are few sequences, so that all of the chip has work.
_PARTS = 8
MOST_SPLIT = 0
# Cached tokens that a program of attention looks at in one go, and its warps: for few sequences, and for many.
_ATTEND_FEW = {"BLOCK": 64, "num_warps": 4}
_ATTEND_MANY = {"BLOCK": 32, "num_warps": 2}
_ATTEND_EACH = {"BLOCK": 32, "num_warps": 2}
# Rows of the largest vocabulary that `choose` holds in registers.
MOST_LOGITS = 65536


class Parts(NamedTuple):
    """Attention over parts of the cache: out [N, P, H, D], highest score and sum of exponentials [N, P, H]; float32."""

    out: torch.Tensor
    highest: torch.Tensor
    total: torch.Tensor


def _dependent(x: torch.Tensor) -> dict[str, bool]:
    """Launch arguments: whether a kernel starts before its predecessor has ended."""
    pdl = gdc_wait is not None and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit
def _wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernels before have ended and what they wrote is seen."""
    if PDL:
        gdc_wait()


@triton.jit
def _release(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start; it waits for this one by itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _prefetch(pointers):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


# --- few sequences ---------------------------------------------------------------------------------------------------


def _tile(inputs: int, features: int) -> tuple[int, int, int]:
    """Columns and rows of a program's weights, and its warps: what was the fastest. All inputs of a row are held at once."""
    columns = triton.next_power_of_2(inputs)
    rows = max(1, _TILE // columns)
    return columns, rows * 2 if features > 16384 else rows, 8 if columns <= 1024 else 4


def embed(tokens: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    width = table.shape[1]
    x = torch.empty(len(tokens), width, dtype=torch.float32, device=table.device)
    _embed[(len(tokens),)](
        tokens, table, x, width, scale, BLOCK=triton.next_power_of_2(width), **_dependent(table)
    )  # fmt: skip
    return x


@triton.jit
def _embed(tokens, table, x, width, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    token = tl.maximum(tl.load(tokens + row), 0)
    values = tl.load(table + token * width + columns, mask=columns < width).to(tl.float32)
    tl.store(x + row * width + columns, values * scale, mask=columns < width)


def norm_linear(x: torch.Tensor, norm: Norm, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, width = x.shape
    features = len(linear.weight)
    y = torch.empty(sequences, features, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x)
    columns, rows, warps = _tile(width, features)
    _norm_linear[(triton.cdiv(features, rows),)](
        x, norm.weight, norm.bias, linear.weight, linear.bias, y, h, y, y, width, features, norm.eps,
        N=sequences, GATED=False, HIGHEST=False, LATE=True, COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(x),
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
        N=sequences, GATED=False, HIGHEST=True, LATE=False, COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(x),
    )  # fmt: skip
    _choose_of_blocks(best, where, state, column)


def norm_gated(x: torch.Tensor, norm: Norm, gate_up: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, width = x.shape
    features = len(gate_up.weight) // 2
    y = torch.empty(sequences, features, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x)
    columns, rows, warps = _tile(width, features)
    _norm_linear[(triton.cdiv(features, rows),)](
        x, norm.weight, norm.bias, gate_up.weight, gate_up.bias, y, h, y, y, width, features, norm.eps,
        N=sequences, GATED=True, HIGHEST=False, LATE=False, COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(x),
    )  # fmt: skip
    return y, h


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
        _release(PDL)
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
    _wait(PDL)
    if LATE:
        _release(PDL)
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
        D=parts.out.shape[-1], COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(residual),
    )  # fmt: skip
    return y


@triton.jit
def _linear_add(  # type: ignore[no-untyped-def]
    x, highest, total, weight, bias, residual, y, width, features,
    N: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    columns = tl.arange(0, COLUMNS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = columns < width
    held = (rows < features)[:, None] & inside[None, :]
    w = tl.load(weight + rows[:, None].to(tl.int64) * width + columns[None, :], mask=held, other=0.0)
    b = tl.load(bias + rows, mask=rows < features, other=0.0).to(tl.float32)
    _wait(PDL)
    for n in tl.static_range(N):
        if PARTS:
            values = _sum_of_parts(x, highest, total, n, columns, inside, width, PARTS, D, COLUMNS)
        else:
            values = tl.load(x + n * width + columns, mask=inside, other=0.0)
        result = tl.sum(w.to(tl.float32) * values[None, :], 1) + b
        result += tl.load(residual + n * features + rows, mask=rows < features, other=0.0)
        tl.store(y + n * features + rows, result, mask=rows < features)


@triton.jit
def _sum_of_parts(  # type: ignore[no-untyped-def]
    x, highest, total, n, columns, inside, width,
    PARTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attention's output [width] out of its parts, each weighted by its share of the exponentials."""
    heads = width // D
    head = columns // D
    top = tl.full([COLUMNS], -1e30, tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(highest + (n * PARTS + part) * heads + head, mask=inside, other=-1e30))
    values = tl.zeros([COLUMNS], tl.float32)
    weights = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        index = (n * PARTS + part) * heads
        share = tl.exp(tl.load(highest + index + head, mask=inside, other=-1e30) - top)
        weights += share * tl.load(total + index + head, mask=inside, other=1.0)
        values += share * tl.load(x + index * D + columns, mask=inside, other=0.0)
    return values / weights


# --- attention -------------------------------------------------------------------------------------------------------


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    pairing: str,
    left: torch.Tensor,
    right: torch.Tensor | None,
    *,
    few: bool,
) -> torch.Tensor | Parts:
    sequences, (_, heads, _length, rank), dimensions = len(qkv), keys.shape, values.shape[-1]
    parts = _PARTS if few else 2 if sequences <= MOST_SPLIT else 1
    out = highest = total = torch.empty(sequences, heads * dimensions, dtype=qkv.dtype, device=qkv.device)
    if parts > 1:
        out = torch.empty(sequences, parts, heads, dimensions, dtype=torch.float32, device=qkv.device)
        highest = torch.empty(sequences, parts, heads, dtype=torch.float32, device=qkv.device)
        total = torch.empty_like(highest)
    _attend[(heads, sequences, parts)](
        qkv, keys, values, positions, rotary, left, left if right is None else right, out, highest, total,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), rotary.stride(0),
        left.stride(0) if left.dim() == 4 else 0, dimensions**-0.5,
        H=heads, D=dimensions, R=rank, BLOCK_R=triton.next_power_of_2(rank), PARTS=parts,
        ADJACENT=pairing == "adjacent", FACTORED=right is not None,
        **(_ATTEND_FEW if few else _ATTEND_EACH if left.dim() == 4 else _ATTEND_MANY), **_dependent(qkv),
    )  # fmt: skip
    if parts == 1:
        return out
    found = Parts(out, highest, total)
    return found if few else _sum_parts(found, qkv.dtype)


def _sum_parts(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """[N, P, H, D] → [N, H·D]."""
    sequences, count, heads, dimensions = parts.out.shape
    width = heads * dimensions
    y = torch.empty(sequences, width, dtype=dtype, device=parts.out.device)
    _sum_attention[(sequences,)](
        *parts, y, width, PARTS=count, D=dimensions, COLUMNS=triton.next_power_of_2(width), **_dependent(y)
    )
    return y


@triton.jit
def _sum_attention(  # type: ignore[no-untyped-def]
    x, highest, total, y, width, PARTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    values = _sum_of_parts(x, highest, total, row, columns, inside, width, PARTS, D, COLUMNS)
    tl.store(y + row * width + columns, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, positions, rotary, left, right, out, highest, total,
    keys_row, keys_head, values_row, values_head, sines, left_row, scale,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    ADJACENT: tl.constexpr, FACTORED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: one head of one sequence over one part of its cache. The last part also keeps the new key and value.

    The position, and the keys and values before it, are older than the kernel before this one, which starts this one only
    when its own predecessor has ended (LATE): the first of them are fetched before the new queries are there.
    """
    _release(PDL)
    head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    d = tl.arange(0, D)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK)
    used = (r < R)[None, :]
    position = tl.load(positions + row)
    size = tl.cdiv(tl.cdiv(position, PARTS), BLOCK) * BLOCK
    start = tl.minimum(part * size, position)
    stop = tl.minimum(start + size, position)
    keys += row * keys_row + head * keys_head
    values += row * values_row + head * values_head
    at = start + t
    k = tl.load(keys + at[:, None] * R + r[None, :], mask=(at < stop)[:, None] & used, other=0.0)
    v = tl.load(values + at[:, None] * D + d[None, :], mask=(at < stop)[:, None], other=0.0)
    if ADJACENT:
        partner, angle = d ^ 1, d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner, angle = (d + D // 2) % D, d % (D // 2)
        sign = tl.where(d < D // 2, -1.0, 1.0)
    cos = tl.load(rotary + position * (D // 2) + angle)
    sin = tl.load(rotary + sines + position * (D // 2) + angle) * sign
    factor = head * (D * R) + d[:, None] * R + r[None, :]
    l_factor = tl.load(left + row * left_row + factor, mask=used, other=0.0)
    if FACTORED:
        r_factor = tl.load(right + factor, mask=used, other=0.0)
    _wait(PDL)
    base = qkv + row * (3 * H * D) + head * D
    q = tl.load(base + d).to(tl.float32) * cos + tl.load(base + partner).to(tl.float32) * sin
    base += H * D
    new_k = tl.load(base + d).to(tl.float32) * cos + tl.load(base + partner).to(tl.float32) * sin
    new_v = tl.load(base + H * D + d).to(values.dtype.element_ty)
    q = tl.sum(q[:, None] * l_factor.to(tl.float32), 0) * scale  # [R]
    if FACTORED:
        new_k = tl.sum(new_k[:, None] * r_factor.to(tl.float32), 0)
    new_k = new_k.to(keys.dtype.element_ty)
    last = part == PARTS - 1
    tl.store(keys + position * R + tl.arange(0, BLOCK_R), new_k, mask=(tl.arange(0, BLOCK_R) < R) & last)
    tl.store(values + position * D + d, new_v, mask=(d < D) & last)

    # Each row of a block keeps a softmax of its own; they are put together at the end.
    m = tl.full([BLOCK], -1e30, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)  # noqa: E741 (the sum of exponentials, as in the literature)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for begin in range(start, stop, BLOCK):
        there = begin + t < stop
        at = begin + BLOCK + t
        next_k = tl.load(keys + at[:, None] * R + r[None, :], mask=(at < stop)[:, None] & used, other=0.0)
        next_v = tl.load(values + at[:, None] * D + d[None, :], mask=(at < stop)[:, None], other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        new_m = tl.where(there, tl.maximum(m, s), m)
        share = tl.exp(m - new_m)
        p = tl.where(there, tl.exp(s - new_m), 0.0)
        l = l * share + p  # noqa: E741
        acc = acc * share[:, None] + p[:, None] * v.to(tl.float32)
        m = new_m
        k, v = next_k, next_v
    s = tl.where(last, tl.sum(new_k.to(tl.float32) * q, 0), -1e30)
    top = tl.maximum(tl.max(m, 0), s)
    share = tl.exp(m - top)
    p = tl.where(last, tl.exp(s - top), 0.0)
    summed = tl.sum(l * share, 0) + p
    acc = tl.sum(acc * share[:, None], 0) + p * new_v.to(tl.float32)
    if PARTS > 1:
        index = (row * PARTS + part) * H + head
        tl.store(out + index * D + d, acc)
        tl.store(highest + index, top)
        tl.store(total + index, summed)
    else:
        tl.store(out + (row * H + head) * D + d, (acc / summed).to(out.dtype.element_ty))


# --- some sequences: matrix units, and the same steps ------------------------------------------------------------------


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
    sequences, inputs = x.shape
    features = len(linear.weight) // (2 if gated else 1)
    rows = min(64, max(16, triton.next_power_of_2(sequences)))
    if residual is None:
        y = torch.empty(sequences, features, dtype=x.dtype, device=x.device)
    else:
        y = torch.empty(split, sequences, features, dtype=torch.float32, device=x.device)
    tile = _dot_tile(sequences, len(linear.weight), residual is not None)
    steps = triton.cdiv(triton.cdiv(inputs, tile["BK"]), split)
    _dot[(triton.cdiv(len(linear.weight), tile["BF"]), triton.cdiv(sequences, rows), split)](
        x, linear.weight, linear.bias, x if residual is None else residual, y, sequences, inputs, features,
        GATED=gated, ADD=residual is not None, BN=rows, STEPS=steps,
        LINES=triton.next_power_of_2(triton.cdiv(steps * tile["BK"], 64)), LATE=not gated and residual is None,
        **tile, **_dependent(x),
    )  # fmt: skip
    return y


def _dot_tile(sequences: int, features: int, add: bool) -> dict[str, int]:
    """Features and inputs of a program's step, how deep its loads run ahead, and its warps: what was the fastest."""
    if features > 16384:
        return {"BF": 128, "BK": 64, "num_stages": 4, "num_warps": 8}
    wide = sequences > 32
    return {"BF": 64 if wide else 32, "BK": 64 if add and not wide else 128, "num_stages": 4, "num_warps": 4}


@triton.jit
def _dot(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, y, sequences, inputs, features,
    GATED: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    LINES: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: BN sequences, BF rows of weights, STEPS · BK inputs. Gated, the rows are those of BF / 2 features in turn."""
    if not LATE:
        _release(PDL)
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
        _prefetch(weight + tl.minimum(columns, last)[:, None].to(tl.int64) * inputs + line[None, :])
    _wait(PDL)
    if LATE:
        _release(PDL)
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


# --- between the matrix products of many sequences -------------------------------------------------------------------


def norm(x: torch.Tensor, residual: torch.Tensor | None, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm of x + residual. [N, M], or [P, N, M] with parts of a sum → [N, M] in `dtype`."""
    sequences, width = x.shape[-2:]
    y = torch.empty(sequences, width, dtype=dtype, device=x.device)
    _norm[(sequences,)](
        x, x if residual is None else residual, norm.weight, norm.bias, y, sequences, width, norm.eps,
        PARTS=len(x) if x.dim() == 3 else 1, ADD=residual is not None, BLOCK=triton.next_power_of_2(width),
        **_dependent(x),
    )  # fmt: skip
    return y


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, residual, gamma, beta, y, sequences, width, eps,
    PARTS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    _wait(PDL)
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
    _silu_product[(sequences, triton.cdiv(features, 512))](both, y, features, BLOCK=512, **_dependent(both))
    return y


@triton.jit
def _silu_product(both, y, features, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    gate = tl.load(both + row * 2 * features + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * features + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two products, as the plain form does.
    gate = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * features + columns, (gate * up).to(y.dtype.element_ty), mask=inside)


# --- the metric learner ----------------------------------------------------------------------------------------------


def fits_residual_unit(width: int, dtype: torch.dtype) -> bool:
    """Whether `residual_unit` takes rows of this width."""
    return dtype in (torch.bfloat16, torch.float16) and width in (16, 32, 64, 128)


def residual_unit(u: torch.Tensor, gate_up: Linear, down: Linear, norm: Norm) -> torch.Tensor:
    """LayerNorm(GLU(… GLU(u) …) + u), all of it in one kernel. [N, D] → [N, D].

    Args:
        u: rows.
        gate_up: of the G units one after the other: [G, 2 F, D] and [G, 2 F], F a multiple of 64.
        down: likewise, [G, D, F] and [G, D].
        norm: of the end.
    """
    rows, width = u.shape
    y = torch.empty_like(u)
    _residual_unit[(triton.cdiv(rows, 16),)](
        u, gate_up.weight, gate_up.bias, down.weight, down.bias, norm.weight, norm.bias, y, rows, norm.eps,
        UNITS=len(down.weight), D=width, F=down.weight.shape[-1], BLOCK=64, ROWS=16, num_warps=4, **_dependent(u),
    )  # fmt: skip
    return y


@triton.jit
def _residual_unit(  # type: ignore[no-untyped-def]
    u, gate_up, gate_up_bias, down, down_bias, gamma, beta, y, rows, eps,
    UNITS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows. Inner activations, rounded to the weights' dtype as in the plain form, stay on the chip."""
    _release(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    f = tl.arange(0, BLOCK)
    at = row[:, None] * D + d[None, :]
    inside = (row < rows)[:, None]
    _wait(PDL)
    z = tl.load(u + at, mask=inside, other=0.0)
    residual = z.to(tl.float32)
    for unit in tl.static_range(UNITS):
        total = tl.zeros([ROWS, D], tl.float32)
        for begin in range(0, F, BLOCK):
            inner = unit * 2 * F + begin + f
            w = tl.load(gate_up + inner[None, :] * D + d[:, None])
            gate = tl.dot(z, w) + tl.load(gate_up_bias + inner)[None, :].to(tl.float32)
            w = tl.load(gate_up + (inner + F)[None, :] * D + d[:, None])
            up = tl.dot(z, w) + tl.load(gate_up_bias + inner + F)[None, :].to(tl.float32)
            gate = (gate * tl.sigmoid(gate)).to(z.dtype).to(tl.float32)
            w = tl.load(down + unit * D * F + d[None, :] * F + (begin + f)[:, None])
            total = tl.dot((gate * up).to(z.dtype), w, total)
        z = (total + tl.load(down_bias + unit * D + d)[None, :].to(tl.float32)).to(z.dtype)
    values = z.to(tl.float32) + residual
    mean = tl.sum(values, 1) / D
    centred = values - mean[:, None]
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    g = tl.load(gamma + d).to(tl.float32)
    o = tl.load(beta + d).to(tl.float32)
    tl.store(y + at, (centred / deviation[:, None] * g[None, :] + o[None, :]).to(y.dtype.element_ty), mask=inside)


# --- the token -------------------------------------------------------------------------------------------------------


def choose_highest(logits: torch.Tensor, state: State, column: int) -> None:
    sequences, vocabulary = logits.shape
    block = 2048
    blocks = triton.cdiv(vocabulary, block)
    best = torch.empty(sequences, blocks, dtype=torch.float32, device=logits.device)
    where = torch.empty(sequences, blocks, dtype=torch.int32, device=logits.device)
    _highest_of_block[(blocks, sequences)](logits, best, where, vocabulary, BLOCK=block, **_dependent(logits))
    _choose_of_blocks(best, where, state, column)


def _choose_of_blocks(best: torch.Tensor, where: torch.Tensor, state: State, column: int) -> None:
    sequences, blocks = best.shape
    _highest_of_row[(sequences,)](
        best, where, *_places(state, column), blocks, BLOCK=triton.next_power_of_2(blocks), **_widths(state),
        num_warps=4, **_dependent(best),
    )  # fmt: skip


def _places(state: State, column: int) -> tuple[torch.Tensor | int | float, ...]:
    """The arguments of `_advance`, but for the row and its token."""
    return (
        state.tokens, state.positions, state.chosen, state.x, state.table, state.scale, state.length,
        state.chosen.stride(0), column,
    )  # fmt: skip


def _widths(state: State) -> dict[str, int]:
    width = state.x.shape[-1]
    return {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width)}


@triton.jit
def _highest_of_block(logits, best, where, vocabulary, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    _release(PDL)
    _wait(PDL)
    block, row = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(logits + row.to(tl.int64) * vocabulary + columns, mask=inside, other=0.0).to(tl.float32)
    damage = tl.sum(x * 0.0, 0)  # NaN where one is NaN or infinite; a maximum could pass over it
    x = tl.where(inside, x, -float("inf"))
    highest, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(0) + block
    tl.store(best + at, highest + damage)
    tl.store(where + at, block * BLOCK + index)


@triton.jit
def _highest_of_row(  # type: ignore[no-untyped-def]
    best, where, tokens, positions, chosen, x, table, scale, length, steps, column, blocks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    values = tl.load(best + row * blocks + block, mask=block < blocks, other=0.0)
    damage = tl.sum(values * 0.0, 0)
    values = tl.where(block < blocks, values, -float("inf"))
    index = tl.argmax(values, 0, tie_break_left=True)
    token = tl.where(damage == 0.0, tl.load(where + row * blocks + index), -1)
    _advance(tokens, positions, chosen, x, table, scale, length, steps, column, row, token, WIDTH, COLUMNS)


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    tokens, positions, chosen, x, table, scale, length, steps, column, row, token,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`State.advance` of one row."""
    token = token.to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    embedded = tl.load(table + tl.maximum(token, 0) * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(x + row * WIDTH + columns, embedded * scale, mask=columns < WIDTH)
    tl.store(tokens + row, token)
    tl.store(chosen + row * steps + column, token)
    tl.store(positions + row, tl.minimum(tl.load(positions + row) + 1, length - 1))


def choose(logits: torch.Tensor, state: State, column: int, choice: Choice) -> None:
    sequences, vocabulary = logits.shape
    seen = choice.seen if choice.seen is not None else state.tokens
    _choose[(sequences,)](
        logits, choice.uniform, choice.temperature, choice.top_k, choice.top_p, choice.penalty, seen,
        *_places(state, column), state.logprobs, vocabulary,
        SEEN=choice.seen is not None, BLOCK=triton.next_power_of_2(vocabulary), **_widths(state), num_warps=32,
        **_dependent(logits),
    )  # fmt: skip


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, uniform, temperature, top_k, top_p, penalty, seen,
    tokens, positions, chosen, embedded, table, scale, length, steps, column, logprobs, vocabulary,
    SEEN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, all of it in registers; see `decode_reference.draw`."""
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < vocabulary
    at = row * vocabulary + columns
    raw = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    damage = tl.sum(raw * 0.0, 0)
    x = tl.where(inside, raw, -float("inf"))
    highest = tl.max(x, 0)
    mass_of_all = tl.sum(tl.exp(x - highest), 0)
    if SEEN:
        p = tl.load(penalty + row)
        marked = tl.load(seen + at, mask=inside, other=0) > 0
        x = tl.where(marked, tl.where(x > 0, x / p, x * p), x)
    t = tl.load(temperature + row)
    if t == 0.0:
        token = tl.argmax(x, 0, tie_break_left=True)
    else:
        x = x / t
        mass = tl.exp(x - tl.max(x, 0))
        # Integers in the order of the floats, so that a threshold is found bit by bit, exactly.
        bits = x.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        lowest = tl.full([], -2147483648, tl.int32)
        k = tl.load(top_k + row)
        if k > 0:
            lowest = _threshold(order, tl.where(inside, 1.0, 0.0), tl.minimum(k, vocabulary).to(tl.float32))
        mass = tl.where(inside & (order >= lowest), mass, 0.0)
        share = tl.load(top_p + row)
        if share < 1.0:
            lowest = tl.maximum(lowest, _threshold(order, mass, share * tl.sum(mass, 0)))
            mass = tl.where(order >= lowest, mass, 0.0)
        cumulated = tl.cumsum(mass, 0)
        target = tl.load(uniform + row * steps + column) * tl.sum(mass, 0)
        found = (cumulated > target) & (mass > 0.0)
        token = tl.min(tl.where(found, columns, BLOCK), 0)
        # Where rounding leaves no such place, the last token with any mass.
        token = tl.where(token == BLOCK, tl.max(tl.where(mass > 0.0, columns, 0), 0), token)
    logit = tl.sum(tl.where(columns == token, raw, 0.0), 0)
    choice = tl.where(damage == 0.0, token, -1)
    _advance(tokens, positions, chosen, embedded, table, scale, length, steps, column, row, choice, WIDTH, COLUMNS)
    tl.store(logprobs + row * steps + column, logit - highest - tl.log(mass_of_all))
    if SEEN:
        tl.store(seen + row * vocabulary + token, 1)


@triton.jit
def _threshold(order, mass, wanted):  # type: ignore[no-untyped-def]
    """The largest integer at or above which the mass is at least what is wanted: from the highest bit down."""
    lowest = tl.full([], -2147483648, tl.int32)
    if tl.sum(tl.where(order >= 0, mass, 0.0), 0) >= wanted:
        lowest = tl.full([], 0, tl.int32)
    for step in range(31):
        tried = lowest + (1 << (30 - step))
        if tl.sum(tl.where(order >= tried, mass, 0.0), 0) >= wanted:
            lowest = tried
    return lowest
