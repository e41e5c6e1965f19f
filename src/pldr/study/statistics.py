"""Statistics of the deductive outputs over passages, by layer and head, and how they change as a passage grows.

Shapes: L layers, B passages, H heads, D head dimension, T tokens of a passage, N lengths.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from rich.console import RenderableType

from pldr.deductive import RANK_TOLERANCES, deductive_outputs, log_determinant, variation
from pldr.files import json_safe
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import DeductiveOutputs
from pldr.pictures import Scale, layers_html
from pldr.tables import Printable, analysis_view

_BINS = 41
# Passages of one forward.
_BATCH = 4


@dataclass(frozen=True, repr=False)
class Statistics:
    """Of one deductive output X [L, B, H, D, D]. Everything is float64; NaN stands where a number does not exist.

    Attributes:
        rms: [L, H], root of the mean square over passages and entries.
        minimum, maximum: [L, H], over passages and entries.
        determinant_sign: [L, H], mean over passages of 1, -1 or 0 (singular): 1 or -1 where all passages agree.
        log10_determinant: [L, H], mean over passages of log10 |det X|; -inf where X is singular.
        rank: tolerance → [L, H], mean over passages of how many singular values exceed tolerance · s_1, as
            `pldr.deductive.numerical_rank` counts them.
        singular_values: [L, H, D], mean over passages of s_i / s_1, in falling order.
        condition: [L, H], median over passages (the lower one of two) of s_1 / s_D; inf where s_D is zero.
        head_distance: [L], mean over passages and pairs of heads of RMS(X_h - X_g) / sqrt((RMS(X_h)² + RMS(X_g)²) / 2):
            0 for equal heads, 1.4 for unrelated ones; NaN with a single head.
        variation: [L, H], RMS of (X - mean over passages) / RMS of that mean, as `pldr.deductive.variation` defines it,
            of each head by itself; NaN with a single passage, 0 for a constant operator.
        layer_variation: [L], the same with all heads of a layer together.
        growth: [N, L], RMS(X_n - X_T) / RMS(X_T) over passages, heads and entries, where X_n is computed from the first
            n tokens alone; n from `Analysis.lengths`.
        histogram: [L, bins], fraction of the values in each bin; the bins are of equal width on `scale`, from -1 to 1.
        scale: of the values of all layers.
        example: [L, H, D, D], float32, of the first passage: what pictures show.
    """

    rms: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor
    determinant_sign: torch.Tensor
    log10_determinant: torch.Tensor
    rank: dict[float, torch.Tensor]
    singular_values: torch.Tensor
    condition: torch.Tensor
    head_distance: torch.Tensor
    variation: torch.Tensor
    layer_variation: torch.Tensor
    growth: torch.Tensor
    histogram: torch.Tensor
    scale: Scale
    example: torch.Tensor

    def __repr__(self) -> str:
        layers, heads, dim, _ = self.example.shape
        return f"Statistics({layers} layers, {heads} heads of {dim} dimensions, values up to ±{self.scale.bound:.3g})"


@dataclass(frozen=True, repr=False)
class Analysis(Printable):
    """Statistics of each deductive output that there is; prints as tables, in a notebook too.

    Attributes:
        tensors: "A", "A_LM", "A_P", "G_LM" → statistics; a constant operator has G_LM alone.
        passages: how many were looked at; 0 where the tensor does not come from any.
        length: their tokens, or None.
        lengths: first tokens of a passage that `Statistics.growth` was computed from: 1, 2, 4, … and `length`.
        growth_passages: of how many passages.
        order_parameter: by tensor, [L]; see `pldr.study.order`. Empty unless it was asked for.
        model: name of what was looked at.
        source: of the passages, for people.
    """

    tensors: dict[str, Statistics]
    passages: int = 0
    length: int | None = None
    lengths: tuple[int, ...] = ()
    growth_passages: int = 0
    order_parameter: dict[str, torch.Tensor] = field(default_factory=dict)
    model: str = ""
    source: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, H, D."""
        layers, heads, dim, _ = self.tensors["G_LM"].example.shape
        return layers, heads, dim

    def __rich__(self) -> RenderableType:
        return analysis_view(self)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + layers_html("G_LM", self.tensors["G_LM"].example)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures' tensors, as plain numbers; null where a number is infinite or does not exist."""
        layers, heads, dim = self.shape
        numbers = {name: _plain(statistics) for name, statistics in self.tensors.items()}
        return {
            "model": self.model, "source": self.source, "layers": layers, "heads": heads, "head_dim": dim,
            "passages": self.passages, "length": self.length, "growth_lengths": list(self.lengths),
            "growth_passages": self.growth_passages, "tensors": json_safe(numbers),
            "order_parameter": {name: values.tolist() for name, values in self.order_parameter.items()},
        }  # fmt: skip


def analyse_model(
    model: PldrForCausalLM, passages: torch.Tensor, *, growth_passages: int = 4, batch: int = _BATCH
) -> Analysis:
    """The deductive outputs of a model, computed from each passage by itself; no logits are computed.

    Args:
        model: with any operator.
        passages: [B, T] token ids, on any device.
        growth_passages: of how many of them to follow the outputs as the passage grows; 0 leaves that out.
        batch: passages of one forward.

    Raises:
        ValueError: no passages, or an output that is not finite (tensor, layer and head named).
    """
    if passages.dim() != 2 or 0 in passages.shape:
        raise ValueError(f"passages: must be [passages, tokens] with at least one of each, got {tuple(passages.shape)}")
    length = passages.shape[1]
    passages = passages.to(model.device)
    if model.config.operator != "learned":
        # The same for every passage and length, so that one token is enough to read it.
        outputs = _outputs(model, passages[:1, :1], batch)
        tensors = {name: summarise(X, name, constant=True) for name, X in outputs.items()}
        return Analysis(tensors, passages.shape[0], length)
    outputs = _outputs(model, passages, batch)
    lengths, few = _lengths(length), passages[:growth_passages]
    growth: dict[str, list[torch.Tensor]] = {name: [] for name in outputs}
    for n in lengths if len(few) else ():
        shorter = _outputs(model, few[:, :n], batch) if n < length else outputs
        for name, X in shorter.items():
            _check_finite(X, name)
            growth[name].append(_relative_rmse(X[:, : len(few)], outputs[name][:, : len(few)]))
    tensors = {}
    for name in list(outputs):
        curve = torch.stack(growth[name]) if growth[name] else None
        tensors[name] = summarise(outputs.pop(name), name, growth=curve)
    return Analysis(tensors, passages.shape[0], length, lengths if len(few) else (), len(few))


def analyse_operator(G_LM: torch.Tensor) -> Analysis:
    """A G_LM without a model, [L, H, D, D], for example from a file (`pldr.checkpoints.load.load_predefined_G`).

    Raises:
        ValueError: another number of dimensions, or a value that is not finite (layer and head named).
    """
    if G_LM.dim() != 4 or G_LM.shape[-1] != G_LM.shape[-2] or 0 in G_LM.shape:
        raise ValueError(f"G_LM: must be [layers, heads, head_dim, head_dim], got {tuple(G_LM.shape)}")
    return Analysis({"G_LM": summarise(G_LM[:, None], "G_LM")})


def summarise(X: torch.Tensor, name: str, *, constant: bool = False, growth: torch.Tensor | None = None) -> Statistics:
    """The statistics of one tensor [L, B, H, D, D].

    Args:
        name: for errors.
        constant: it does not depend on any input, so that it does not vary.
        growth: [N, L], see `Statistics.growth`; none by default.

    Raises:
        ValueError: a value that is not finite (tensor, layer and head named).
    """
    _check_finite(X, name)
    scale = Scale.of(X, X[:, 0])
    # Layer by layer, so that little of it is held in float64 at once.
    rows = [_summarise_layer(layer.double(), scale, constant) for layer in X]
    columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return Statistics(
        rank=dict(zip(RANK_TOLERANCES, columns.pop("rank").unbind(1), strict=True)),
        **columns,
        growth=torch.zeros(0, X.shape[0], dtype=torch.float64) if growth is None else growth.cpu(),
        scale=scale,
        example=X[:, 0].float().cpu(),
    )


def _summarise_layer(X: torch.Tensor, scale: Scale, constant: bool) -> dict[str, torch.Tensor]:
    """One layer, [B, H, D, D] in float64."""
    sign, log_magnitude = log_determinant(X)
    values = torch.linalg.svdvals(X)  # [B, H, D]
    largest, smallest = values[..., 0], values[..., -1]
    condition = torch.where(smallest > 0, largest / smallest, torch.inf)
    positions = ((scale.position(X) + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
    result = {
        "rms": X.square().mean((0, 2, 3)).sqrt(),
        "minimum": X.amin((0, 2, 3)),
        "maximum": X.amax((0, 2, 3)),
        "determinant_sign": sign.mean(0),
        "log10_determinant": log_magnitude.mean(0),
        "rank": torch.stack([(values > t * largest[..., None]).sum(-1).double().mean(0) for t in RANK_TOLERANCES]),
        "singular_values": (values / largest.clamp(min=torch.finfo(X.dtype).tiny)[..., None]).mean(0),
        "condition": condition.median(0).values,
        "head_distance": _head_distance(X),
        "variation": _variation(X.transpose(0, 1)[:, :, None], constant),
        "layer_variation": _variation(X[None], constant)[0],
        "histogram": torch.bincount(positions.flatten(), minlength=_BINS).double() / X.numel(),
    }
    return {key: value.double().cpu() for key, value in result.items()}


def _variation(X: torch.Tensor, constant: bool) -> torch.Tensor:
    """`variation` of [K, B, H, D, D] over its first dimension: the K things that are looked at one by one."""
    if constant:
        return X.new_zeros(X.shape[0])
    return variation(X) if X.shape[1] > 1 else X.new_full((X.shape[0],), torch.nan)


def _head_distance(X: torch.Tensor) -> torch.Tensor:
    """See `Statistics.head_distance`: [B, H, D, D] → a scalar, NaN with one head."""
    heads = X.shape[1]
    if heads == 1:
        return X.new_tensor(torch.nan)
    flat = X.flatten(2)
    # Not by way of products, in which the distance of nearly equal heads would drown.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")  # [B, H, H]
    squares = flat.square().sum(-1)
    size = ((squares[:, :, None] + squares[:, None, :]) / 2).sqrt().clamp(min=torch.finfo(X.dtype).tiny)
    first, second = torch.triu_indices(heads, heads, offset=1, device=X.device)
    return (distance / size)[:, first, second].mean()


def _relative_rmse(X: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """RMS(X - reference) / RMS(reference) of each layer, [L, B, H, D, D] → [L]."""
    difference = (X.double() - reference.double()).square().flatten(1).mean(1)
    return (difference / reference.double().square().flatten(1).mean(1)).sqrt()


def _lengths(length: int) -> tuple[int, ...]:
    """1, 2, 4, … below `length`, and `length` itself."""
    return (*(1 << power for power in range((length - 1).bit_length())), length)


def _outputs(model: PldrForCausalLM, passages: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """Name → [L, B, H, D, D], of the outputs that the model has, at least float32, on the CPU."""
    parts = [deductive_outputs(model, few) for few in passages.split(batch)]
    joined = {}
    for name in DeductiveOutputs._fields:
        pieces = [getattr(part, name) for part in parts]
        if pieces[0] is not None:
            joined[name] = torch.cat(
                [piece.to("cpu", torch.promote_types(piece.dtype, torch.float32)) for piece in pieces], 1
            )
    return joined


def _check_finite(X: torch.Tensor, name: str) -> None:
    """Raises ValueError: a value of X [L, B, H, D, D] is NaN or infinite."""
    bad = ~torch.isfinite(X)
    if bad.any():
        layer, _, head, _, _ = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: layer {layer}, head {head} holds NaN or infinite values")


def _plain(statistics: Statistics) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in (each.name for each in fields(statistics)):
        value = getattr(statistics, name)
        if name == "rank":
            result["rank"] = {str(tolerance): rank.tolist() for tolerance, rank in value.items()}
        elif name == "scale":
            result["scale"] = value._asdict()
        elif name != "example":
            result[name] = value.tolist()
    return result
