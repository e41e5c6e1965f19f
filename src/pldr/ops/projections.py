"""Queries, keys and values of attention in one matrix product, queries and keys rotated, on CUDA in training.

Three products with a third of the width fill a GPU badly, backward above all, where their input's gradients would be
three products and two sums.

`project` is the entry: this where `training_dtype` says so, else layer by layer and `reference.apply_rotary`.
"""

import torch
from torch import nn

from pldr.ops import reference
from pldr.ops.aligned import MIN_ROWS, is_plain, training_dtype

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Positions and heads a program, and its warps.
_ROWS, _HEADS, _WARPS = 32, 7, 2


def project(
    x: torch.Tensor,
    layers: tuple[nn.Module, nn.Module, nn.Module],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
    pairing: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, and values.

    Args:
        x: [B, T, M].
        layers: what projects to queries, keys and values, linear or whatever was put in its place.
        position_embeddings: cos and sin, each [B or 1, 1, T, D/2], float32.
        pairing: see `reference.apply_rotary`.

    Returns:
        Three times [B, H, T, D].
    """
    cos, sin = position_embeddings
    dtype = training_dtype(x)
    if (
        dtype is not None
        and x.shape[:-1].numel() >= MIN_ROWS
        and head_dim in (16, 32, 64, 128)
        and all(map(is_plain, layers))
    ):
        weight = torch.cat([layer.weight for layer in layers]).to(dtype)  # type: ignore[misc]
        bias = torch.cat([layer.bias for layer in layers]).to(dtype)  # type: ignore[misc]
        rotated = _project(x.to(dtype), weight, bias, cos[:, 0], sin[:, 0], head_dim, pairing == "adjacent")
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2), rotated[2].transpose(1, 2)
    shape = (*x.shape[:-1], -1, head_dim)
    query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in layers)
    return *(reference.apply_rotary(part, cos, sin, pairing) for part in (query, key)), value


@torch.library.custom_op("pldr::project", mutates_args=())
def _project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int,
    adjacent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """[B, T, M], [3M, M], [3M], twice [B or 1, T, D/2] → query, key and value, each [B, T, H, D]."""
    packed = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
    parts = _empty_parts(x, weight, head_dim)
    _rotate_all(packed, parts, cos, sin, adjacent)
    return parts


def _empty_parts(
    x: torch.Tensor, weight: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], len(weight) // 3 // head_dim, head_dim)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


@_project.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int,
    adjacent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _empty_parts(x, weight, head_dim)


@torch.library.custom_op("pldr::project_backward", mutates_args=())
def _project_backward(
    by_query: torch.Tensor, by_key: torch.Tensor, by_value: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, adjacent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, each like it."""
    rows = x.reshape(-1, x.shape[-1])
    packed = x.new_empty(len(rows), len(weight))
    sums = torch.empty(triton.cdiv(len(rows), _ROWS), len(weight), dtype=torch.float32, device=x.device)
    _rotate_all(packed, (by_query, by_key, by_value), cos, sin, adjacent, sums)
    return (packed @ weight).view_as(x), packed.t() @ rows, sums.sum(0).to(x.dtype)


@_project_backward.register_fake
def _(
    by_query: torch.Tensor, by_key: torch.Tensor, by_value: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, adjacent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(len(weight))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, cos, sin, _, ctx.adjacent = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _backward(ctx, by_query, by_key, by_value):  # type: ignore[no-untyped-def]
    parts = (part if part.stride(-1) == 1 else part.contiguous() for part in (by_query, by_key, by_value))
    return *_project_backward(*parts, *ctx.saved_tensors, ctx.adjacent), None, None, None, None


_project.register_autograd(_backward, setup_context=_save)


def _rotate_all(  # type: ignore[no-untyped-def]
    packed: torch.Tensor, parts, cos: torch.Tensor, sin: torch.Tensor, adjacent: bool, sums: torch.Tensor | None = None
) -> None:
    """From `packed` [N, 3M] to queries, keys and values [B, T, H, D] or, with `sums` [programs, 3M], back from there."""
    count, width = len(packed), packed.shape[1] // 3
    for number, part in enumerate(parts):
        _rotate[(triton.cdiv(count, _ROWS), triton.cdiv(part.shape[2], _HEADS))](
            packed[:, number * width :], part, packed if sums is None else sums[:, number * width :], cos, sin,
            count, part.shape[1], cos.stride(0) if len(cos) > 1 else 0, *part.stride()[:3],
            H=part.shape[2], D=part.shape[3], ROTATE=number < 2, ADJACENT=adjacent, BACK=sums is not None, ROWS=_ROWS,
            HEADS=_HEADS, num_warps=_WARPS,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        packed, part, sums, cos, sin, count, length, angles, of_sequence, of_position, of_head,
        H: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr, ADJACENT: tl.constexpr, BACK: tl.constexpr,
        ROWS: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        """A program: ROWS positions, HEADS heads. BACK rotates the other way, and sums up what it writes."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None]
        d, half = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
        sequence, position = (row // length).to(tl.int64)[:, None], (row % length).to(tl.int64)[:, None]
        packed += row.to(tl.int64)[:, None] * 3 * H * D
        part += sequence * of_sequence + position * of_position
        sums += tl.program_id(0) * 3 * H * D
        if ROTATE:
            at = sequence * angles + position * (D // 2) + half
            c = tl.load(cos + at, mask=inside, other=0.0)
            s = tl.load(sin + at, mask=inside, other=0.0)
            if BACK:
                s = -s
        for head in range(tl.program_id(1) * HEADS, min(tl.program_id(1) * HEADS + HEADS, H)):
            if BACK:
                x = tl.load(part + head * of_head + d, mask=inside, other=0.0).to(tl.float32)
            else:
                x = tl.load(packed + head * D + d, mask=inside, other=0.0).to(tl.float32)
            if ROTATE:
                if ADJACENT:
                    first, second = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
                    x = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [ROWS, D])
                else:
                    first, second = tl.split(tl.trans(tl.reshape(x, [ROWS, 2, D // 2]), 0, 2, 1))
                    x = tl.join(first * c - second * s, second * c + first * s)
                    x = tl.reshape(tl.trans(x, 0, 2, 1), [ROWS, D])
            if BACK:
                tl.store(packed + head * D + d, x.to(packed.dtype.element_ty), mask=inside)
                tl.store(sums + head * D + tl.arange(0, D), tl.sum(x, 0))
            else:
                tl.store(part + head * of_head + d, x.to(part.dtype.element_ty), mask=inside)
