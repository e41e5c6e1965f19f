"""The steps of decoding: one new token a sequence, over caches of fixed size.

A layer is five steps: LayerNorm with the products for queries, keys and values; attention, with rotation and operator;
the output product with its residual; LayerNorm with the gated unit's two products; the last product with its residual.
Every function here is the entry of one step: on CUDA a kernel of `ops.decoding`, elsewhere `ops.decoding.reference`.

LayerNorm comes after each residual sum in this model, so a step begins with the norm of what the last one ended with.

Shapes: N sequences, M model width, H heads, D head dimension, R key dimensions in the cache (D, or a factored operator's
rank), S rows and C positions of a cache, F width of the gated unit, V vocabulary.
"""

from typing import NamedTuple

import torch

from pldr.ops.decoding import reference
from pldr.ops.decoding.reference import Choice, Linear, Norm, Parts, Places, State

try:
    from pldr.ops.decoding import attention, few, many
    from pldr.ops.decoding import choice as choosing
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    few = many = attention = choosing = None  # type: ignore[assignment]

# Up to so many sequences, kernels that read each weight once and multiply without matrix units are the fastest; up to so
# many, kernels with matrix units; beyond, the library's matrix products between small kernels. Measured on an H100 with what
# benchmarks/bench_decode.py calls paths: µs a step of 2 sequences 188, 193, 228; of 3 248, 176, 231; of 128 -, 432, 457; of 192
# -, 578, 563.
FEW = 2
SOME = 128
# Into how many parts the sums of products with few features are cut, so that all of the chip has work.
_PARTS = 4


class Stream(NamedTuple):
    """The residual stream between two steps: the sum of both, which the next step's norm forms.

    Attributes:
        x: [N, M]; or [P, N, M], parts of a sum, in float32.
        residual: [N, M], or None.
    """

    x: torch.Tensor
    residual: torch.Tensor | None = None

    def sum(self) -> torch.Tensor:
        """[N, M], float32."""
        x = self.x.sum(0) if self.x.dim() == 3 else self.x.float()
        return x if self.residual is None else x + self.residual


def _path(x: torch.Tensor, linear: object) -> str:
    """How a product is done: "few", "some", "many" (see above), or "plain" where there are no kernels for it."""
    if not x.is_cuda or few is None or type(linear) is not Linear:
        return "plain"
    sequences = x.shape[-2]
    if sequences <= FEW:
        return "few"
    return "some" if sequences <= SOME and linear.dtype in (torch.bfloat16, torch.float16) else "many"


def embed(tokens: torch.Tensor, table: torch.Tensor, scale: float) -> Stream:
    """Scaled embeddings of tokens: [N] (int64), [V, M] → stream of [N, M], float32."""
    module = few if table.is_cuda and few is not None else reference
    return Stream(module.embed(tokens, table, scale))


def norm(stream: Stream, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm of the stream, computed in float32: [N, M] in `dtype`."""
    if stream.x.is_cuda and few is not None:
        return many.norm(stream.x, stream.residual, norm, dtype)
    return reference.norm(stream.sum(), norm).to(dtype)


def silu_product(both: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the columns times the second. [N, 2 F] → [N, F]."""
    module = many if both.is_cuda and many is not None else reference
    return module.silu_product(both)


def norm_linear(stream: Stream, weights: Norm, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """h = LayerNorm(stream) and h Wᵀ + b.

    Returns:
        The product [N, features], and h [N, M] for the residual.
    """
    path = _path(stream.x, linear)
    if path == "few":
        return few.norm_linear(stream.sum(), weights, linear)
    h = norm(stream, weights, linear.dtype)
    return (many.dot(h, linear) if path == "some" else linear(h)), h


def norm_gated(stream: Stream, weights: Norm, gate_up: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """h = LayerNorm(stream) and silu(h W1ᵀ + b1) ∘ (h W2ᵀ + b2), with W1 over W2 in one matrix.

    Returns:
        The product [N, F], and h [N, M] for the residual.
    """
    path = _path(stream.x, gate_up)
    if path == "few":
        return few.norm_linear(stream.sum(), weights, gate_up, gated=True)
    h = norm(stream, weights, gate_up.dtype)
    return (many.dot(h, gate_up, gated=True) if path == "some" else silu_product(gate_up(h))), h


def linear_add(x: torch.Tensor | Parts, linear: Linear, residual: torch.Tensor) -> Stream:
    """x Wᵀ + b + residual.

    Args:
        x: [N, features]; or attention in parts, see `attend`.
        residual: [N, M].
    """
    path = _path(residual, linear)
    if path == "few":
        return Stream(few.linear_add(x, linear, residual))
    assert isinstance(x, torch.Tensor)
    x = x.to(linear.dtype)
    if path == "some":
        return Stream(many.dot(x, linear, residual=residual, split=_PARTS))
    product = linear(x)
    return Stream(product, residual) if path == "many" else Stream(product.float() + residual)


def residual_network(u: torch.Tensor, gate_up: Linear, down: Linear, weights: Norm) -> torch.Tensor:
    """The metric learner's: u ← LayerNorm(GLU(… GLU(u) …) + u) for each of its residual units. [N, D] → [N, D].

    Args:
        u: rows of A.
        gate_up, down: of the G gated linear units of U residual units: weights [U, G, 2 F, D] and [U, G, D, F].
        weights: of the norm at the end of each unit, [U, D].
    """
    if u.is_cuda and few is not None and many.fits_residual_network(u.shape[1], u.dtype):
        return many.residual_network(u, gate_up, down, weights)
    for unit, norm_weight in enumerate(weights.weight):
        residual = u
        for glu in range(down.weight.shape[1]):
            both = Linear(gate_up.weight[unit, glu], gate_up.bias[unit, glu])(u)
            u = Linear(down.weight[unit, glu], down.bias[unit, glu])(silu_product(both))
        u = norm(Stream(u, residual), Norm(norm_weight, weights.bias[unit], weights.eps), u.dtype)
    return u


def places(positions: torch.Tensor, rotary: torch.Tensor) -> Places:
    """What attention must know of the new tokens' places, once a step.

    Args:
        positions: [N] (int32), of the new token; cached are those before it.
        rotary: [2, C or more, D/2], cosines and sines, float32.
    """
    if positions.is_cuda and few is not None:
        return Places(positions, rotary)
    return reference.places(positions, rotary)


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    pairing: str,
    left: torch.Tensor,
    right: torch.Tensor | None,
) -> torch.Tensor | Parts:
    """Attention of one new token a sequence, whose key and value go into the cache: softmax(q L kᵀ / sqrt(D)) v.

    Args:
        qkv: [N, 3 M], queries, keys and values before rotation.
        keys: [S ≥ N, H, C, R], rows in the order of the sequences; the new one is written at its position.
        values: [S ≥ N, H, C, D], likewise.
        places: where the new tokens stand.
        pairing: see `reference.apply_rotary`.
        left: [H, D, R], or [S ≥ N, H, D, R] with one a sequence: G_LM, or the left factor.
        right: [H, D, R], the factor that keys are kept through; None where they are kept whole.

    Returns:
        [N, M]; on CUDA, for few sequences, the parts of it that `linear_add` sums.
    """
    if qkv.is_cuda and few is not None:
        return attention.attend(qkv, keys, values, places, pairing, left, right, few=len(qkv) <= FEW)
    return reference.attend(qkv, keys, values, places, pairing, left, right)


def norm_highest(stream: Stream, weights: Norm, head: Linear, state: State, column: int) -> None:
    """Go on with the most probable token by the logits of LayerNorm(stream); see `choose_highest`."""
    path = _path(stream.x, head)
    if path == "few":
        few.norm_highest(stream.sum(), weights, head, state, column)
    elif path == "some":
        many.highest(norm(stream, weights, head.dtype), head, state, column)
    else:
        choose_highest(norm_linear(stream, weights, head)[0], state, column)


def choose_highest(logits: torch.Tensor, state: State, column: int) -> None:
    """Go on with the most probable token of each row, the lowest of equal ones.

    Args:
        logits: [N, V].
        state: of the first N rows: the token and its place become current, the token is kept as chosen.
        column: where among the chosen.
    """
    if logits.is_cuda and few is not None:
        choosing.choose_highest(logits, state, column)
    else:
        reference.choose_highest(logits, state, column)


def choose(logits: torch.Tensor, state: State, column: int, choice: Choice) -> None:
    """Go on with a token drawn of each row, as `decoding.reference.draw` says; arguments as of `choose_highest`."""
    if logits.is_cuda and few is not None and logits.shape[1] <= choosing.MOST_LOGITS:
        choosing.choose(logits, state, column, choice)
    else:
        reference.choose(logits, state, column, choice)
