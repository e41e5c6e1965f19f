"""q G_LM and qᵀq, on CUDA in training: of queries as attention wants them, [B, T, H, D] in memory, in one pass each way.

`apply_operator` and `density_matrix` are the entries: these where `training_dtype` says so, else matrix products.
"""

import torch

from pldr.ops import reference
from pldr.ops.aligned import precision, training_dtype

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Positions at a time.
_ROWS = 64


def apply_operator(query: torch.Tensor, G_LM: torch.Tensor) -> torch.Tensor:
    """query @ G_LM.

    Args:
        query: [B, H, T, D].
        G_LM: [H, D, D] or [B, H, D, D].

    Returns:
        [B, H, T, D] in the dtype of `query`.
    """
    if not _fits(query):
        return query @ G_LM.to(query.dtype)
    return _apply(query.transpose(1, 2), G_LM if G_LM.dim() == 4 else G_LM[None]).transpose(1, 2)


def density_matrix(query: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Like `reference.density_matrix`, which see; float32 where the kernel runs under autocast."""
    if padding_mask is not None or not _fits(query):
        return reference.density_matrix(query, padding_mask)
    density = _density(query.transpose(1, 2))
    return density if torch.is_autocast_enabled("cuda") else density.to(query.dtype)


def _fits(query: torch.Tensor) -> bool:
    return query.dtype == training_dtype(query) and query.shape[-1] in (16, 32, 64, 128) and query.stride(-1) == 1


@torch.library.custom_op("pldr::apply_operator", mutates_args=())
def _apply(query: torch.Tensor, G_LM: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D], [B or 1, H, D, D] → [B, T, H, D]."""
    batch, length, heads, width = query.shape
    output = query.new_empty(query.shape)
    _operator_product[(batch * heads, triton.cdiv(length, _ROWS))](
        query, G_LM, output, length, *query.stride()[:3], heads if len(G_LM) == 1 else batch * heads,
        H=heads, D=width, ROWS=_ROWS, PRECISION=precision(query.dtype),
    )  # fmt: skip
    return output


@_apply.register_fake
def _(query: torch.Tensor, G_LM: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("pldr::apply_operator_backward", mutates_args=())
def _apply_backward(
    gradient: torch.Tensor, query: torch.Tensor, G_LM: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of query and G_LM, each like it."""
    batch, length, heads, width = query.shape
    by_query = query.new_empty(query.shape)
    by_operator = torch.empty((batch, *G_LM.shape[1:]), dtype=torch.float32, device=query.device)
    _operator_backward[(batch * heads,)](
        gradient, query, G_LM, by_query, by_operator, length, *gradient.stride()[:3], *query.stride()[:3],
        heads if len(G_LM) == 1 else batch * heads, H=heads, D=width, ROWS=_ROWS, PRECISION=precision(query.dtype), DENSITY=False,
    )  # fmt: skip
    return by_query, by_operator.sum_to_size(G_LM.shape).to(G_LM.dtype)


@_apply_backward.register_fake
def _(gradient: torch.Tensor, query: torch.Tensor, G_LM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), G_LM.new_empty(G_LM.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    return _apply_backward(gradient if gradient.stride(-1) == 1 else gradient.contiguous(), *ctx.saved_tensors)


_apply.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("pldr::density_matrix", mutates_args=())
def _density(query: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D] → [B, H, D, D], float32."""
    batch, length, heads, width = query.shape
    output = torch.empty((batch, heads, width, width), dtype=torch.float32, device=query.device)
    _operator_backward[(batch * heads,)](
        query, query, output, query, output, length, *query.stride()[:3], *query.stride()[:3],
        1, H=heads, D=width, ROWS=_ROWS, PRECISION=precision(query.dtype), DENSITY=True,
    )  # fmt: skip
    return output


@_density.register_fake
def _(query: torch.Tensor) -> torch.Tensor:
    batch, _, heads, width = query.shape
    return query.new_empty((batch, heads, width, width), dtype=torch.float32)


def _density_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    (query,) = ctx.saved_tensors
    return _apply(query, gradient + gradient.transpose(-1, -2))


_density.register_autograd(_density_backward, setup_context=_save)


if triton is not None:

    @triton.jit
    def _operator_product(  # type: ignore[no-untyped-def]
        query, G_LM, output, length, of_sequence, of_position, of_head, operators,
        H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: ROWS positions of a head."""
        sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
        row, d = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.arange(0, D)
        inside = row < length
        q = tl.load(
            query + sequence * of_sequence + row * of_position + head * of_head + d[None, :], mask=inside, other=0.0
        )
        G = tl.load(G_LM + (tl.program_id(0) % operators).to(tl.int64) * D * D + d[:, None] * D + d[None, :])
        y = tl.dot(q, G.to(q.dtype), input_precision=PRECISION).to(output.dtype.element_ty)
        tl.store(output + ((sequence * length + row) * H + head) * D + d[None, :], y, mask=inside)

    @triton.jit
    def _operator_backward(  # type: ignore[no-untyped-def]
        gradient, query, G_LM, by_query, by_operator, length, of_sequence, of_position, of_head,
        query_of_sequence, query_of_position, query_of_head, operators,
        H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, DENSITY: tl.constexpr,
    ):  # fmt: skip
        """A program: all positions of a head of a sequence. DENSITY: only the sum of queryᵀ gradient is wanted."""
        sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
        d = tl.arange(0, D)
        if not DENSITY:
            G = tl.load(G_LM + (tl.program_id(0) % operators).to(tl.int64) * D * D + d[:, None] * D + d[None, :])
            G = G.to(query.dtype.element_ty)
        total = tl.zeros([D, D], tl.float32)
        gradient += sequence * of_sequence + head * of_head + d[None, :]
        query += sequence * query_of_sequence + head * query_of_head + d[None, :]
        by_query += sequence * length * H * D + head * D + d[None, :]
        for start in tl.range(0, length, ROWS, num_stages=3):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            inside = row < length
            g = tl.load(gradient + row * of_position, mask=inside, other=0.0)
            q = tl.load(query + row * query_of_position, mask=inside, other=0.0)
            if not DENSITY:
                x = tl.dot(g, tl.trans(G), input_precision=PRECISION).to(query.dtype.element_ty)
                tl.store(by_query + row * H * D, x, mask=inside)
            total = tl.dot(tl.trans(q), g, total, input_precision=PRECISION)
        by_operator += tl.program_id(0).to(tl.int64) * D * D + d[:, None] * D + d[None, :]
        tl.store(by_operator, total)
