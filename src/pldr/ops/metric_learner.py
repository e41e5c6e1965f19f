"""The metric learner's residual network as three kernels: its output, the gradient of its input, those of its weights.

A row of D numbers goes through all units while it stays on the chip; module by module, the 16 gated linear units of the
published models are 48 small matrix products and as many passes over memory, and twice that backward. What the backward
needs is kept in the dtype of the products: the input of each gated unit or, at the end of a residual unit, its normalised
values. The inner activations, three times as wide, are computed again.

`residual_network` is the entry: these kernels where `fits` says so, else one module after the other.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pldr.ops.aligned import has_hooks, is_plain, precision, training_dtype

try:
    import triton
    import triton.language as tl

    from pldr.ops.aligned import sigmoid
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Inner columns at a time; the inner width is filled up with zeros to a multiple of it.
CHUNK = 64
# Below so many rows a GPU is not filled.
MIN_ROWS = 4096
# Sums of each weight's gradient that are added afterwards: as many programs as fill a GPU.
SPLITS = 11
# Rows a program, warps, stages of the pipeline, registers a thread: of the output, the input's gradient, the weights' gradients.
FORWARD, BACKWARD, WEIGHTS = (128, 8, 1, 128), (64, 4, 3, None), (32, 4, 3, None)


def residual_network(rows: torch.Tensor, units: nn.ModuleList) -> torch.Tensor:
    """u ← LayerNorm(GLU_N(… GLU_1(u) …) + u) for each of `units`, on the rows of a tensor [..., D].

    Returns:
        The same shape; float32 under autocast, as LayerNorm gives it, else the dtype of `rows`.
    """
    dtype = training_dtype(rows)
    if dtype is None or not fits(rows, units):
        for unit in units:
            rows = unit(rows)
        return rows
    norm = units[0].norm
    output, *_ = _network(rows.reshape(-1, rows.shape[-1]), parameters_of(units), len(units), norm.eps, dtype)  # type: ignore[union-attr]
    return output.view_as(rows)


def parameters_of(units: nn.ModuleList) -> list[torch.Tensor]:
    """Weights, then biases, of all gate projections; of all up and of all down projections; of all norms."""
    glus = [glu for unit in units for glu in unit.glus]  # type: ignore[union-attr]
    linears = [[getattr(glu, name) for glu in glus] for name in ("gate_proj", "up_proj", "down_proj")]
    kinds = [*linears, [unit.norm for unit in units]]
    return [getattr(module, name) for kind in kinds for name in ("weight", "bias") for module in kind]


def fits(rows: torch.Tensor, units: nn.ModuleList) -> bool:
    """Whether the kernels do what the modules would, and faster: for a width that they know, many rows and plain modules."""
    if rows.shape[-1] not in (32, 64, 128) or rows.numel() < MIN_ROWS * rows.shape[-1]:
        return False
    for module in units.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            if not is_plain(module):
                return False
        elif has_hooks(module):
            return False
    return True


@torch.library.custom_op("pldr::residual_network", mutates_args=())
def _network(
    rows: torch.Tensor, parameters: Sequence[torch.Tensor], units: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what the backward reads: kept [glus + 1, N, D], 1 / deviation [units, N], weights and vectors packed."""
    count, width = rows.shape
    weights, vectors = _pack(parameters, units, dtype)
    glus = weights.shape[1]
    output, kept, scale = _empty(rows, glus, units, dtype)
    block, warps, stages, registers = _tile(FORWARD, width, dtype)
    _learner_forward[(triton.cdiv(count, block),)](
        rows, weights, vectors, output, kept, scale, count, eps,
        GLUS=glus, UNITS=units, D=width, F=weights.shape[2], CHUNK=CHUNK, ROWS=block, STAGES=stages,
        PRECISION=precision(dtype), num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return output, kept, scale, weights, vectors


def _tile(tile: tuple[int, int, int, int | None], width: int, dtype: torch.dtype) -> tuple[int, int, int, int | None]:
    """A tile for rows of 64 numbers as one for wider rows; smaller in float32, which is there for tests."""
    rows, warps, stages, registers = tile
    if dtype == torch.float32:
        return 32, 4, 1, None
    return (
        (rows // 2, 8, stages, registers)
        if width > 64 and rows > 32
        else (rows, warps * max(1, width // 64), stages, registers)
    )


def _empty(
    rows: torch.Tensor, glus: int, units: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, width = rows.shape
    kept = rows.new_empty((glus + 1, count, width), dtype=dtype)
    return torch.empty_like(rows), kept, rows.new_empty((units, count), dtype=torch.float32)


def _packed_shapes(parameters: Sequence[torch.Tensor], units: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inner, width = parameters[0].shape
    glus = (len(parameters) - 2 * units) // 6
    filled = -(-inner // CHUNK) * CHUNK
    return (3, glus, filled, width), (glus, 2 * filled + 3 * width)


def _pack(parameters: Sequence[torch.Tensor], units: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [3, glus, F, D] in `dtype`, the down projection's transposed, zero where the inner width is filled up;
    and, float32, of each gated unit its three biases, and weight and bias of the norm that its output goes through, if any.
    """
    inner, width = parameters[0].shape
    of_weights, of_vectors = _packed_shapes(parameters, units)
    flat = torch._utils._flatten_dense_tensors(list(parameters))
    weights, vectors = flat.new_empty(of_weights, dtype=dtype), flat.new_empty(of_vectors, dtype=torch.float32)
    _, glus, F, _ = of_weights
    _learner_pack[(glus * F // CHUNK, 3)](
        flat, weights, vectors, inner, GLUS=glus, UNITS=units, D=width, F=F, CHUNK=CHUNK, num_warps=8
    )
    return weights, vectors


@_network.register_fake
def _(
    rows: torch.Tensor, parameters: Sequence[torch.Tensor], units: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_weights, of_vectors = _packed_shapes(parameters, units)
    return (
        *_empty(rows, of_weights[1], units, dtype),
        rows.new_empty(of_weights, dtype=dtype),
        rows.new_empty(of_vectors, dtype=torch.float32),
    )


@torch.library.custom_op("pldr::residual_network_backward", mutates_args=())
def _network_backward(
    gradient: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    vectors: torch.Tensor,
    inner: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of the rows, in the gradient's dtype; and, float32, flat and in their order, those of all weights and of the
    inner biases, and those of the outer biases and of the norms.
    """
    units, count = scale.shape
    _, glus, F, width = weights.shape
    by_rows = torch.empty_like(gradient)
    ahead = torch.empty_like(kept[1:])  # the gradient of what each gated unit gives
    block, warps, stages, registers = _tile(BACKWARD, width, kept.dtype)
    programs = triton.cdiv(count, block)
    sums = vectors.new_empty((programs, (glus + 2 * units) * width))
    constants = {"GLUS": glus, "UNITS": units, "D": width, "F": F, "CHUNK": CHUNK, "PRECISION": precision(kept.dtype)}
    _learner_rows[(programs,)](
        gradient, kept, scale, weights, vectors, by_rows, ahead, sums, count,
        **constants, ROWS=block, STAGES=stages, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    block, warps, stages, registers = _tile(WEIGHTS, width, kept.dtype)
    steps = triton.cdiv(triton.cdiv(count, SPLITS), block)
    partial = vectors.new_empty((SPLITS, glus * inner * (3 * width + 2)))
    _learner_weights[(glus * F // CHUNK, SPLITS)](
        kept, ahead, weights, vectors, partial, count, inner, steps,
        **constants, ROWS=block, STAGES=stages, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return by_rows, partial.sum(0), sums.sum(0)


@_network_backward.register_fake
def _(
    gradient: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    vectors: torch.Tensor,
    inner: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, glus, _, width = weights.shape
    of_sums = (glus + 2 * len(scale)) * width
    return torch.empty_like(gradient), vectors.new_empty(glus * inner * (3 * width + 2)), vectors.new_empty(of_sums)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, parameters, ctx.units, *_ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*saved)
    ctx.shapes = [(p.shape, p.dtype) for p in parameters]


def _backward(ctx, gradient, *_unused):  # type: ignore[no-untyped-def]
    by_rows, *flat = _network_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.shapes[0][0][0])
    sizes = [shape.numel() for shape, _ in ctx.shapes]
    outer = 5 * ((len(sizes) - 2 * ctx.units) // 6)  # where the biases of the down projections begin
    parts = [*flat[0].split(sizes[:outer]), *flat[1].split(sizes[outer:])]
    by_parameters = [part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.shapes, strict=True)]
    return by_rows, by_parameters, None, None, None


_network.register_autograd(_backward, setup_context=_save)


if triton is not None:

    @triton.jit
    def _learner_forward(  # type: ignore[no-untyped-def]
        rows, weights, vectors, output, kept, scale, count, eps,
        GLUS: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
        ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: ROWS rows through everything."""
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        d, f = tl.arange(0, D), tl.arange(0, CHUNK)
        at = row[:, None] * D + d[None, :]
        inside = (row < count)[:, None]
        of_chunk = f[:, None] * D + d[None, :]
        plane: tl.constexpr = GLUS * F * D
        chunks: tl.constexpr = F // CHUNK
        glus_of_unit: tl.constexpr = GLUS // UNITS
        dtype = weights.dtype.element_ty
        residual = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        z = residual.to(dtype)
        tl.store(kept + at, z, mask=inside)
        total = tl.zeros([ROWS, D], tl.float32)
        for step in tl.range(0, GLUS * chunks, num_stages=STAGES):
            w = weights + step * CHUNK * D + of_chunk
            w_gate, w_up, w_down = tl.load(w), tl.load(w + plane), tl.load(w + 2 * plane)
            glu = step // chunks
            chunk = step % chunks
            v = vectors + glu * (2 * F + 3 * D)
            gate = tl.dot(z, tl.trans(w_gate), input_precision=PRECISION) + tl.load(v + chunk * CHUNK + f)[None, :]
            up = tl.dot(z, tl.trans(w_up), input_precision=PRECISION) + tl.load(v + F + chunk * CHUNK + f)[None, :]
            total = tl.dot((gate * sigmoid(gate) * up).to(dtype), w_down, total, input_precision=PRECISION)
            if chunk == chunks - 1:
                total += tl.load(v + 2 * F + d)[None, :]
                z = total.to(dtype)
                if glu % glus_of_unit == glus_of_unit - 1:
                    total += residual
                    centred = total - (tl.sum(total, 1) / D)[:, None]
                    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
                    tl.store(scale + (glu // glus_of_unit).to(tl.int64) * count + row, inverse, mask=row < count)
                    centred = centred * inverse[:, None]
                    residual = centred * tl.load(v + 2 * F + D + d)[None, :] + tl.load(v + 2 * F + 2 * D + d)[None, :]
                    tl.store(kept + (glu + 1).to(tl.int64) * count * D + at, _coarse(centred, dtype), mask=inside)
                    z = residual.to(dtype)
                else:
                    tl.store(kept + (glu + 1).to(tl.int64) * count * D + at, z, mask=inside)
                total = tl.zeros([ROWS, D], tl.float32)
        tl.store(output + at, residual.to(output.dtype.element_ty), mask=inside)

    @triton.jit
    def _coarse(normalised, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """Normalised values, at most sqrt(D), for keeping: where bfloat16 is kept, the bits of a float16, which is finer."""
        if dtype == tl.bfloat16:
            return normalised.to(tl.float16).to(tl.bfloat16, bitcast=True)
        return normalised.to(dtype)

    @triton.jit
    def _fine(kept):  # type: ignore[no-untyped-def]
        """What `_coarse` kept, in float32."""
        if kept.dtype == tl.bfloat16:
            return kept.to(tl.float16, bitcast=True).to(tl.float32)
        return kept.to(tl.float32)

    @triton.jit
    def _input(  # type: ignore[no-untyped-def]
        kept, vectors, at, inside, d, glu, count,
        GLUS_OF_UNIT: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    ):  # fmt: skip
        """What went into a gated unit: as kept or, at the beginning of a unit, the normalised values with weight and bias."""
        z = tl.load(kept + glu.to(tl.int64) * count * D + at, mask=inside, other=0.0)
        if glu > 0 and glu % GLUS_OF_UNIT == 0:
            v = vectors + (glu - 1) * (2 * F + 3 * D) + 2 * F + D
            z = (_fine(z) * tl.load(v + d)[None, :] + tl.load(v + D + d)[None, :]).to(z.dtype)
        return z

    @triton.jit
    def _learner_rows(  # type: ignore[no-untyped-def]
        gradient, kept, scale, weights, vectors, by_rows, ahead, sums, count,
        GLUS: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
        ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: ROWS rows from the last gated unit to the first. `ahead` is the gradient of each one's output.

        `sums` are those over these rows of `ahead`, and of the gradients of the norms' weights and biases.
        """
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        d, f = tl.arange(0, D), tl.arange(0, CHUNK)
        at = row[:, None] * D + d[None, :]
        inside = (row < count)[:, None]
        of_chunk = f[:, None] * D + d[None, :]
        plane: tl.constexpr = GLUS * F * D
        chunks: tl.constexpr = F // CHUNK
        glus_of_unit: tl.constexpr = GLUS // UNITS
        dtype = weights.dtype.element_ty
        sums += tl.program_id(0) * (GLUS + 2 * UNITS) * D + d
        # Of the output of the unit behind, then of this unit's: what its residual branch takes.
        total = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        residual = tl.zeros([ROWS, D], tl.float32)
        z = tl.zeros([ROWS, D], dtype)
        after = tl.zeros([ROWS, D], dtype)
        for step in tl.range(0, GLUS * chunks, num_stages=STAGES):
            glu = GLUS - 1 - step // chunks
            chunk = step % chunks
            w = weights + (glu * chunks + chunk) * CHUNK * D + of_chunk
            w_gate, w_up, w_down = tl.load(w), tl.load(w + plane), tl.load(w + 2 * plane)
            v = vectors + glu * (2 * F + 3 * D)
            if chunk == 0:
                if glu % glus_of_unit == glus_of_unit - 1:
                    total += residual
                    normalised = tl.load(kept + (glu + 1).to(tl.int64) * count * D + at, mask=inside, other=0.0)
                    normalised = _fine(normalised)
                    unit = glu // glus_of_unit
                    inverse = tl.load(scale + unit.to(tl.int64) * count + row, mask=row < count, other=0.0)
                    tl.store(sums + (GLUS + unit) * D, tl.sum(total * normalised, 0))
                    tl.store(sums + (GLUS + UNITS + unit) * D, tl.sum(total, 0))
                    total *= tl.load(v + 2 * F + D + d)[None, :]
                    along = tl.sum(total * normalised, 1) / D
                    total = (total - (tl.sum(total, 1) / D)[:, None] - normalised * along[:, None]) * inverse[:, None]
                    residual = total
                after = total.to(dtype)
                tl.store(sums + glu * D, tl.sum(total, 0))
                tl.store(ahead + glu.to(tl.int64) * count * D + at, after, mask=inside)
                z = _input(kept, vectors, at, inside, d, glu, count, glus_of_unit, D, F)
                total = tl.zeros([ROWS, D], tl.float32)
            gate = tl.dot(z, tl.trans(w_gate), input_precision=PRECISION) + tl.load(v + chunk * CHUNK + f)[None, :]
            up = tl.dot(z, tl.trans(w_up), input_precision=PRECISION) + tl.load(v + F + chunk * CHUNK + f)[None, :]
            by_inner = tl.dot(after, tl.trans(w_down), input_precision=PRECISION)
            open_ = sigmoid(gate)
            by_gate = by_inner * up * open_ * (1 + gate * (1 - open_))
            total = tl.dot(by_gate.to(dtype), w_gate, total, input_precision=PRECISION)
            total = tl.dot((by_inner * gate * open_).to(dtype), w_up, total, input_precision=PRECISION)
        tl.store(by_rows + at, (total + residual).to(by_rows.dtype.element_ty), mask=inside)

    @triton.jit
    def _learner_weights(  # type: ignore[no-untyped-def]
        kept, ahead, weights, vectors, partial, count, inner, steps,
        GLUS: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
        ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A program: CHUNK inner columns of a gated unit, over one part of the rows. All is transposed: rows are columns."""
        glu = tl.program_id(0) // (F // CHUNK)
        chunk = tl.program_id(0) % (F // CHUNK)
        d, f, r = tl.arange(0, D), tl.arange(0, CHUNK), tl.arange(0, ROWS)
        dtype = weights.dtype.element_ty
        glus_of_unit: tl.constexpr = GLUS // UNITS
        w = weights + tl.program_id(0) * CHUNK * D + f[:, None] * D + d[None, :]
        w_gate, w_up, w_down = tl.load(w), tl.load(w + GLUS * F * D), tl.load(w + 2 * GLUS * F * D)
        v = vectors + glu * (2 * F + 3 * D) + chunk * CHUNK + f
        bias_gate, bias_up = tl.load(v)[:, None], tl.load(v + F)[:, None]
        of_gate, of_up, of_down = (tl.zeros([CHUNK, D], tl.float32), tl.zeros([CHUNK, D], tl.float32),
                                   tl.zeros([CHUNK, D], tl.float32))  # fmt: skip
        of_gate_bias, of_up_bias = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
        kept += glu.to(tl.int64) * count * D
        ahead += glu.to(tl.int64) * count * D
        is_kept = glu == 0 or glu % glus_of_unit != 0  # else normalised, see `_input`
        n = vectors + tl.maximum(glu - 1, 0) * (2 * F + 3 * D) + 2 * F + D + d
        weight, bias = tl.load(n)[None, :], tl.load(n + D)[None, :]
        first = tl.program_id(1) * steps * ROWS
        for step in tl.range(0, steps, num_stages=STAGES):
            row = first + step * ROWS + r
            at = row.to(tl.int64)[:, None] * D + d[None, :]
            inside = (row < count)[:, None]
            z = tl.load(kept + at, mask=inside, other=0.0)
            after = tl.load(ahead + at, mask=inside, other=0.0)
            z = tl.where(is_kept, z, (_fine(z) * weight + bias).to(dtype))
            gate = tl.dot(w_gate, tl.trans(z), input_precision=PRECISION) + bias_gate
            up = tl.dot(w_up, tl.trans(z), input_precision=PRECISION) + bias_up
            by_inner = tl.dot(w_down, tl.trans(after), input_precision=PRECISION)
            open_ = sigmoid(gate)
            silu = gate * open_
            by_gate = by_inner * up * (open_ + silu * (1 - open_))
            by_up = by_inner * silu
            of_gate_bias += tl.sum(by_gate, 1)
            of_up_bias += tl.sum(by_up, 1)
            of_gate = tl.dot(by_gate.to(dtype), z, of_gate, input_precision=PRECISION)
            of_up = tl.dot(by_up.to(dtype), z, of_up, input_precision=PRECISION)
            of_down = tl.dot((silu * up).to(dtype), after, of_down, input_precision=PRECISION)
        partial += tl.program_id(1).to(tl.int64) * GLUS * inner * (3 * D + 2)
        column = chunk * CHUNK + f
        there = column < inner
        at = (glu * inner + column)[:, None] * D + d[None, :]
        plane = GLUS * inner * (D + 1)  # weights and biases
        tl.store(partial + at, of_gate, mask=there[:, None])
        tl.store(partial + GLUS * inner * D + glu * inner + column, of_gate_bias, mask=there)
        tl.store(partial + plane + at, of_up, mask=there[:, None])
        tl.store(partial + plane + GLUS * inner * D + glu * inner + column, of_up_bias, mask=there)
        at = (glu * D + d[None, :]) * inner + column[:, None]
        tl.store(partial + 2 * plane + at, of_down, mask=there[:, None])

    @triton.jit
    def _learner_pack(  # type: ignore[no-untyped-def]
        flat, weights, vectors, inner,
        GLUS: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A program: CHUNK inner columns of a gated unit's gate, up or down projection."""
        glu, first = tl.program_id(0) // (F // CHUNK), tl.program_id(0) % (F // CHUNK) * CHUNK
        kind = tl.program_id(1)
        d, f = tl.arange(0, D), tl.arange(0, CHUNK)
        column = first + f
        there = column < inner
        plane = GLUS * inner * (D + 1)
        at = flat + kind * plane + glu * inner * D
        if kind < 2:
            w = tl.load(at + column[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
            bias = tl.load(flat + kind * plane + GLUS * inner * D + glu * inner + column, mask=there, other=0.0)
            tl.store(vectors + glu * (2 * F + 3 * D) + kind * F + column, bias.to(tl.float32))
        else:
            w = tl.load(at + d[None, :] * inner + column[:, None], mask=there[:, None], other=0.0)
            if first == 0:
                outer = flat + 2 * plane + GLUS * inner * D + d
                unit = glu // (GLUS // UNITS)
                v = vectors + glu * (2 * F + 3 * D) + 2 * F + d
                tl.store(v, tl.load(outer + glu * D).to(tl.float32))
                tl.store(v + D, tl.load(outer + (GLUS + unit) * D).to(tl.float32))
                tl.store(v + 2 * D, tl.load(outer + (GLUS + UNITS + unit) * D).to(tl.float32))
        tl.store(weights + ((kind * GLUS + glu) * F + column)[:, None] * D + d[None, :], w.to(weights.dtype.element_ty))
