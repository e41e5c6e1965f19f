"""Attention of one new token a sequence over its cache, with rotation and operator: `ops.decode.attend` in Triton."""

import torch
import triton
import triton.language as tl

from pldr.ops.decoding.launch import dependent, release, wait
from pldr.ops.decoding.reference import Parts, Places

# Into how many parts the cache is split while there are few sequences, so that all of the chip has work.
_PARTS = 8
# Cached tokens that a program looks at in one go, whether matrix units multiply them, and its warps; what was the fastest for
# few sequences, for up to `_SOME_SEQUENCES`, and for more, where the memory alone counts. Fewer registers, more programs at once.
_FEW = {"BLOCK": 64, "MATRIX": False, "num_warps": 4}
_SOME = {"BLOCK": 32, "MATRIX": True, "num_warps": 1, "num_stages": 3, "maxnreg": 144}
_MANY = {"BLOCK": 32, "MATRIX": False, "num_warps": 2}
_SOME_SEQUENCES = 64


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    pairing: str,
    left: torch.Tensor,
    right: torch.Tensor | None,
    *,
    few: bool,
) -> torch.Tensor | Parts:
    sequences, (_, heads, _length, rank), dimensions = len(qkv), keys.shape, values.shape[-1]
    parts = _PARTS if few else 1
    out = highest = total = torch.empty(sequences, heads * dimensions, dtype=qkv.dtype, device=qkv.device)
    if few:
        out = torch.empty(sequences, parts, heads, dimensions, dtype=torch.float32, device=qkv.device)
        highest = torch.empty(sequences, parts, heads, dtype=torch.float32, device=qkv.device)
        total = torch.empty_like(highest)
    _attend[(heads, sequences, parts)](
        qkv, keys, values, places.positions, places.rotary, left, left if right is None else right, out, highest, total,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), places.rotary.stride(0),
        left.stride(0) if left.dim() == 4 else 0, dimensions**-0.5,
        H=heads, D=dimensions, R=rank, BLOCK_D=max(16, triton.next_power_of_2(dimensions)), BLOCK_R=max(16, triton.next_power_of_2(rank)), PARTS=parts,
        ADJACENT=pairing == "adjacent", FACTORED=right is not None,
        **_tile(sequences, values.dtype, few), **dependent(qkv),
    )  # fmt: skip
    return Parts(out, highest, total) if few else out


def _tile(sequences: int, dtype: torch.dtype, few: bool) -> dict[str, int | bool]:
    if few:
        return _FEW
    return _SOME if sequences <= _SOME_SEQUENCES and dtype != torch.float32 else _MANY


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, positions, rotary, left, right, out, highest, total,
    keys_row, keys_head, values_row, values_head, sines, left_row, scale,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, ADJACENT: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK: tl.constexpr, MATRIX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: one head of one sequence over one part of its cache. The last part also keeps the new key and value.

    The position, and the keys and values before it, are older than the kernel before this one, which starts this one only
    when its own predecessor has ended (LATE): the first of them are fetched before the new queries are there.
    """
    release(PDL)
    head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    d, r, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    real, used = d < D, (r < R)[None, :]
    position = tl.load(positions + row)
    size = tl.cdiv(tl.cdiv(position, PARTS), BLOCK) * BLOCK
    start = tl.minimum(part * size, position)
    stop = tl.minimum(start + size, position)
    keys += row * keys_row + head * keys_head
    values += row * values_row + head * values_head
    if not MATRIX:
        at = start + t
        k = tl.load(keys + at[:, None] * R + r[None, :], mask=(at < stop)[:, None] & used, other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=(at < stop)[:, None] & real[None, :], other=0.0)
    partner, cos, sin = _rotation(rotary, sines, position, d, D, ADJACENT)
    factor = head * (D * R) + d[:, None] * R + r[None, :]
    l_factor = tl.load(left + row * left_row + factor, mask=used & real[:, None], other=0.0)
    if FACTORED:
        r_factor = tl.load(right + factor, mask=used & real[:, None], other=0.0)
    wait(PDL)
    base = qkv + row * (3 * H * D) + head * D
    q = _rotated(base, d, partner, real, cos, sin)
    base += H * D
    new_k = _rotated(base, d, partner, real, cos, sin)
    new_v = tl.load(base + H * D + d, mask=real, other=0.0).to(values.dtype.element_ty)
    q, q16 = _times_operator(q, l_factor, MATRIX)
    if FACTORED:
        new_k = tl.sum(new_k[:, None] * r_factor.to(tl.float32), 0)
    new_k = new_k.to(keys.dtype.element_ty)
    last = part == PARTS - 1
    tl.store(keys + position * R + tl.arange(0, BLOCK_R), new_k, mask=(tl.arange(0, BLOCK_R) < R) & last)
    tl.store(values + position * D + d, new_v, mask=real & last)

    if MATRIX:
        m, l, acc = _over_cache_by_matrix(keys, values, q16, scale, start, stop, D, R, BLOCK_D, BLOCK)  # noqa: E741
    else:
        m, l, acc = _over_cache(keys, values, q * scale, k, v, start, stop, D, R, BLOCK)  # noqa: E741
    s = tl.where(last, tl.sum(new_k.to(tl.float32) * q, 0) * scale, -1e30)
    top, summed, acc = _with_new(m, l, acc, s, tl.where(last, new_v.to(tl.float32), 0.0))
    if PARTS > 1:
        index = (row * PARTS + part) * H + head
        tl.store(out + index * D + d, acc, mask=real)
        tl.store(highest + index, top)
        tl.store(total + index, summed)
    else:
        tl.store(out + (row * H + head) * D + d, (acc / summed).to(out.dtype.element_ty), mask=real)


@triton.jit
def _rotation(rotary, sines, position, d, D: tl.constexpr, ADJACENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of dimensions d: the one that each is rotated with, and the cosine and the signed sine of their angle."""
    if ADJACENT:
        partner, angle = d ^ 1, d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner, angle = (d + D // 2) % D, d % (D // 2)
        sign = tl.where(d < D // 2, -1.0, 1.0)
    # Past the last dimension, which a size that is no power of two has, anything that is there.
    partner, angle = tl.where(d < D, partner, 0), tl.where(d < D, angle, 0)
    at = position * (D // 2) + angle
    return partner, tl.load(rotary + at), tl.load(rotary + sines + at) * sign


@triton.jit
def _rotated(base, d, partner, real, cos, sin):  # type: ignore[no-untyped-def]
    here = tl.load(base + d, mask=real, other=0.0).to(tl.float32)
    return here * cos + tl.load(base + partner, mask=real, other=0.0).to(tl.float32) * sin


@triton.jit
def _with_new(m, l, acc, s, new_v):  # type: ignore[no-untyped-def]  # noqa: E741
    """Softmaxes of several rows as one, with a new score and value: highest score, sum of exponentials, output [D]."""
    top = tl.maximum(tl.max(m, 0), s)
    share = tl.exp(m - top)
    p = tl.where(s > -1e30, tl.exp(s - top), 0.0)
    return top, tl.sum(l * share, 0) + p, tl.sum(acc * share[:, None], 0) + p * new_v


@triton.jit
def _times_operator(q, left, MATRIX: tl.constexpr):  # type: ignore[no-untyped-def]
    """q L, in float32, and 16 rows of it as matrix units want them: [D], [D, R] → [R], [16, R]."""
    if MATRIX:
        rows = tl.broadcast_to(q[None, :], [16, left.shape[0]]).to(left.dtype)
        rows = tl.dot(rows, left).to(left.dtype)
        product = tl.max(rows, 0).to(tl.float32)  # all rows are equal
    else:
        product = tl.sum(q[:, None] * left.to(tl.float32), 0)
        rows = product
    return product, rows


@triton.jit
def _over_cache(  # type: ignore[no-untyped-def]
    keys, values, q, k, v, start, stop, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Attention from start to stop, of which k and v are the first block; the next is fetched while one is worked on.

    Each row of a block keeps a softmax of its own: highest score [BLOCK], sum of exponentials [BLOCK], output [BLOCK, D].
    """
    t, r, d = tl.arange(0, BLOCK), tl.arange(0, k.shape[1]), tl.arange(0, v.shape[1])
    real, used = (d < D)[None, :], (r < R)[None, :]
    m = tl.full([BLOCK], -1e30, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)  # noqa: E741 (as the literature calls it)
    acc = tl.zeros(v.shape, tl.float32)
    for begin in range(start, stop, BLOCK):
        there = begin + t < stop
        at = begin + BLOCK + t
        next_k = tl.load(keys + at[:, None] * R + r[None, :], mask=(at < stop)[:, None] & used, other=0.0)
        next_v = tl.load(values + at[:, None] * D + d[None, :], mask=(at < stop)[:, None] & real, other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        new_m = tl.where(there, tl.maximum(m, s), m)
        share = tl.exp(m - new_m)
        p = tl.where(there, tl.exp(s - new_m), 0.0)
        l = l * share + p  # noqa: E741
        acc = acc * share[:, None] + p[:, None] * v.to(tl.float32)
        m = new_m
        k, v = next_k, next_v
    return m, l, acc


@triton.jit
def _over_cache_by_matrix(  # type: ignore[no-untyped-def]
    keys, values, q, scale, start, stop, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """As `_over_cache`, by matrix units, which want 16 rows of q: [16, R], all the same. Results are of the first row."""
    t, r, d = tl.arange(0, BLOCK), tl.arange(0, q.shape[1]), tl.arange(0, BLOCK_D)
    real, used = (d < D)[None, :], (r < R)[None, :]
    m = tl.full([16], -1e30, tl.float32)
    l = tl.zeros([16], tl.float32)  # noqa: E741
    acc = tl.zeros([16, BLOCK_D], tl.float32)
    for begin in range(start, stop, BLOCK):
        at = begin + t
        there = at < stop
        k = tl.load(keys + at[:, None] * R + r[None, :], mask=there[:, None] & used, other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=there[:, None] & real, other=0.0)
        s = tl.where(there[None, :], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        share = tl.exp(m - new_m)
        p = tl.exp(s - new_m[:, None])
        l = l * share + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * share[:, None])
        m = new_m
    first = tl.arange(0, 16) == 0
    return tl.where(first, m, -1e30), tl.where(first, l, 0.0), tl.where(first[:, None], acc, 0.0)


@triton.jit
def sum_of_parts(  # type: ignore[no-untyped-def]
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
