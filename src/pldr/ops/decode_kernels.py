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
_PARTS = 4
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


# --- few sequences ---------------------------------------------------------------------------------------------------


def _tile(inputs: int) -> tuple[int, int, int]:
    """Columns and rows of a program's weights, and its warps."""
    columns = triton.next_power_of_2(inputs)
    return columns, max(1, _TILE // columns), 4 if columns <= 1024 else 8


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
    columns, rows, warps = _tile(width)
    _norm_linear[(triton.cdiv(features, rows),)](
        x, norm.weight, norm.bias, linear.weight, linear.bias, y, h, width, features, norm.eps,
        N=sequences, GATED=False, COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(x),
    )  # fmt: skip
    return y, h


def norm_gated(x: torch.Tensor, norm: Norm, gate_up: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, width = x.shape
    features = len(gate_up.weight) // 2
    y = torch.empty(sequences, features, dtype=torch.float32, device=x.device)
    h = torch.empty_like(x)
    columns, rows, warps = _tile(width)
    _norm_linear[(triton.cdiv(features, rows),)](
        x, norm.weight, norm.bias, gate_up.weight, gate_up.bias, y, h, width, features, norm.eps,
        N=sequences, GATED=True, COLUMNS=columns, ROWS=rows, num_warps=warps, **_dependent(x),
    )  # fmt: skip
    return y, h


@triton.jit
def _norm_linear(  # type: ignore[no-untyped-def]
    x, gamma, beta, weight, bias, y, h, width, features, eps,
    N: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS features of every sequence. Gated, a feature is silu of one row times another, `features` below."""
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
    for n in tl.static_range(N):
        values = tl.load(x + n * width + columns, mask=inside, other=0.0)
        mean = tl.sum(values, 0) / width
        centred = tl.where(inside, values - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        normed = centred / deviation * g + o
        if tl.program_id(0) == 0:
            tl.store(h + n * width + columns, normed, mask=inside)
        total = tl.sum(w.to(tl.float32) * normed[None, :], 1) + b
        if GATED:
            up = tl.sum(w_up.to(tl.float32) * normed[None, :], 1) + b_up
            total = total * tl.sigmoid(total) * up
        tl.store(y + n * features + rows, total, mask=rows < features)


def linear_add(x: torch.Tensor | Parts, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
    features, width = linear.weight.shape
    sequences = len(residual)
    y = torch.empty(sequences, features, dtype=torch.float32, device=residual.device)
    columns, rows, warps = _tile(width)
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
    sequences, (_, heads, length, rank), dimensions = len(qkv), keys.shape, values.shape[-1]
    parts = _PARTS if few else 1
    if few:
        out = torch.empty(sequences, parts, heads, dimensions, dtype=torch.float32, device=qkv.device)
        highest = torch.empty(sequences, parts, heads, dtype=torch.float32, device=qkv.device)
        total = torch.empty_like(highest)
    else:
        out = highest = total = torch.empty(sequences, heads * dimensions, dtype=qkv.dtype, device=qkv.device)
    _attend[(heads, sequences, parts)](
        qkv, keys, values, positions, rotary, left, left if right is None else right, out, highest, total,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), rotary.stride(0),
        left.stride(0) if left.dim() == 4 else 0, dimensions**-0.5,
        H=heads, D=dimensions, R=rank, BLOCK_R=triton.next_power_of_2(rank), C=length, PARTS=parts,
        ADJACENT=pairing == "adjacent", FACTORED=right is not None, BLOCK=32, num_warps=4, **_dependent(qkv),
    )  # fmt: skip
    return Parts(out, highest, total) if few else out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, positions, rotary, left, right, out, highest, total,
    keys_row, keys_head, values_row, values_head, sines, left_row, scale,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    ADJACENT: tl.constexpr, FACTORED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: one head of one sequence over one part of its cache. The last part also keeps the new key and value."""
    _release(PDL)
    head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = tl.arange(0, D // 2)
    first = pair * 2 if ADJACENT else pair
    second = pair * 2 + 1 if ADJACENT else pair + D // 2
    d = tl.arange(0, D)
    r = tl.arange(0, BLOCK_R)
    used = (r < R)[None, :]
    if R == D:  # a constant operator, or one a sequence, which prefill wrote and no step changes
        factor = left + row * left_row + head * (D * R)
    else:
        factor = left + head * (D * R)
    left_first = tl.load(factor + first[:, None] * R + r[None, :], mask=used, other=0.0).to(tl.float32)
    left_second = tl.load(factor + second[:, None] * R + r[None, :], mask=used, other=0.0).to(tl.float32)
    _wait(PDL)
    position = tl.load(positions + row)
    cos = tl.load(rotary + position * (D // 2) + pair)
    sin = tl.load(rotary + sines + position * (D // 2) + pair)
    base = qkv + row * (3 * H * D) + head * D
    x = tl.load(base + first).to(tl.float32)
    y = tl.load(base + second).to(tl.float32)
    q = tl.sum((x * cos - y * sin)[:, None] * left_first, 0)
    q = (q + tl.sum((y * cos + x * sin)[:, None] * left_second, 0)) * scale

    keys += row * keys_row + head * keys_head
    values += row * values_row + head * values_head
    if part == PARTS - 1:
        x = tl.load(base + H * D + first).to(tl.float32)
        y = tl.load(base + H * D + second).to(tl.float32)
        key_first, key_second = x * cos - y * sin, y * cos + x * sin
        new = keys + position * R
        if FACTORED:
            factor = right + head * (D * R)
            right_first = tl.load(factor + first[:, None] * R + r[None, :], mask=used, other=0.0).to(tl.float32)
            right_second = tl.load(factor + second[:, None] * R + r[None, :], mask=used, other=0.0).to(tl.float32)
            kept = tl.sum(key_first[:, None] * right_first, 0) + tl.sum(key_second[:, None] * right_second, 0)
            tl.store(new + r, kept.to(keys.dtype.element_ty), mask=r < R)
        else:
            tl.store(new + first, key_first.to(keys.dtype.element_ty))
            tl.store(new + second, key_second.to(keys.dtype.element_ty))
        value = tl.load(base + 2 * H * D + d)
        tl.store(values + position * D + d, value.to(values.dtype.element_ty))
        tl.debug_barrier()  # written before they are read below

    # Each row of a block keeps a softmax of its own; they are put together at the end.
    size = tl.cdiv(tl.cdiv(position + 1, PARTS), BLOCK) * BLOCK
    # The new token is the last part's, however the others are cut.
    start = tl.minimum(part * size, position)
    stop = position + 1 if part == PARTS - 1 else tl.minimum((part + 1) * size, position)
    t = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], -1e30, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)  # noqa: E741 (the sum of exponentials, as in the literature)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for begin in range(start, stop, BLOCK):
        at = begin + t
        there = at < stop
        k = tl.load(keys + at[:, None] * R + r[None, :], mask=there[:, None] & used, other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        new_m = tl.where(there, tl.maximum(m, s), m)
        share = tl.exp(m - new_m)
        p = tl.where(there, tl.exp(s - new_m), 0.0)
        l = l * share + p  # noqa: E741
        acc = acc * share[:, None] + p[:, None] * v.to(tl.float32)
        m = new_m
    top = tl.max(m, 0)
    share = tl.exp(m - top)
    summed = tl.sum(l * share, 0)
    acc = tl.sum(acc * share[:, None], 0)
    if PARTS > 1:
        index = (row * PARTS + part) * H + head
        tl.store(out + index * D + d, acc)
        tl.store(highest + index, top)
        tl.store(total + index, summed)
    else:
        tl.store(out + (row * H + head) * D + d, (acc / summed).to(out.dtype.element_ty))


# --- between the matrix products of many sequences -------------------------------------------------------------------


def norm(x: torch.Tensor, residual: torch.Tensor | None, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm of x + residual. [N, M] → [N, M] in `dtype`."""
    sequences, width = x.shape
    y = torch.empty(sequences, width, dtype=dtype, device=x.device)
    _norm[(sequences,)](
        x, x if residual is None else residual, norm.weight, norm.bias, y, width, norm.eps,
        ADD=residual is not None, BLOCK=triton.next_power_of_2(width), **_dependent(x),
    )  # fmt: skip
    return y


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, residual, gamma, beta, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _release(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)
    _wait(PDL)
    at = tl.program_id(0) * width + columns
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(y + at, (centred / deviation * g + o).to(y.dtype.element_ty), mask=inside)


def silu_product(both: torch.Tensor) -> torch.Tensor:
    sequences, features = both.shape[0], both.shape[1] // 2
    y = torch.empty(sequences, features, dtype=both.dtype, device=both.device)
    _silu_product[(triton.cdiv(features, 512), sequences)](both, y, features, BLOCK=512, **_dependent(both))
    return y


@triton.jit
def _silu_product(both, y, features, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    _release(PDL)
    _wait(PDL)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = columns < features
    gate = tl.load(both + row * 2 * features + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * features + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two products, as the plain form does.
    gate = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * features + columns, (gate * up).to(y.dtype.element_ty), mask=inside)


# --- the token -------------------------------------------------------------------------------------------------------


def choose_highest(logits: torch.Tensor, state: State, column: int) -> None:
    sequences, vocabulary = logits.shape
    block = 2048
    blocks = triton.cdiv(vocabulary, block)
    best = torch.empty(sequences, blocks, dtype=torch.float32, device=logits.device)
    where = torch.empty(sequences, blocks, dtype=torch.int32, device=logits.device)
    _highest_of_block[(blocks, sequences)](logits, best, where, vocabulary, BLOCK=block, **_dependent(logits))
    _highest_of_row[(sequences,)](
        best, where, state.tokens, state.positions, state.chosen, blocks, state.length, state.chosen.stride(0), column,
        BLOCK=triton.next_power_of_2(blocks), num_warps=1, **_dependent(logits),
    )  # fmt: skip


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
    best, where, tokens, positions, chosen, blocks, length, steps, column, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _release(PDL)
    _wait(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < blocks
    x = tl.load(best + row * blocks + columns, mask=inside, other=0.0)
    damage = tl.sum(x * 0.0, 0)
    x = tl.where(inside, x, -float("inf"))
    index = tl.argmax(x, 0, tie_break_left=True)
    token = tl.load(where + row * blocks + index)
    _advance(tokens, positions, chosen, row, tl.where(damage == 0.0, token, -1), length, steps, column)


@triton.jit
def _advance(tokens, positions, chosen, row, token, length, steps, column):  # type: ignore[no-untyped-def]
    """`State.advance` of one row."""
    token = token.to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(chosen + row * steps + column, token)
    tl.store(positions + row, tl.minimum(tl.load(positions + row) + 1, length - 1))


def choose(logits: torch.Tensor, state: State, column: int, choice: Choice) -> None:
    sequences, vocabulary = logits.shape
    seen = choice.seen if choice.seen is not None else state.tokens
    _choose[(sequences,)](
        logits, choice.uniform, choice.temperature, choice.top_k, choice.top_p, choice.penalty, seen,
        state.tokens, state.positions, state.chosen, state.logprobs,
        vocabulary, state.length, state.chosen.stride(0), column,
        SEEN=choice.seen is not None, BLOCK=triton.next_power_of_2(vocabulary), num_warps=32, **_dependent(logits),
    )  # fmt: skip


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, uniform, temperature, top_k, top_p, penalty, seen, tokens, positions, chosen, logprobs,
    vocabulary, length, steps, column,
    SEEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
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
    _advance(tokens, positions, chosen, row, tl.where(damage == 0.0, token, -1), length, steps, column)
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
