"""Keys in fewer dimensions: a constant G_LM as left rightᵀ, with the ranks that a bound on the loss allows.

A score is qᵀ G k. Over queries and keys with second moments C_q = E[q qᵀ] and C_k = E[k kᵀ], the mean square of its error is
‖C_q^½ (G - left rightᵀ) C_k^½‖², so that the singular vectors of C_q^½ G C_k^½ make the best factors of each rank.

Shapes: L layers, H heads, D head dimension, r rank, B passages, T tokens.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.certificate import write_certificate
from pldr.checkpoints.info import model_facts
from pldr.checkpoints.load import load_with_tokenizer
from pldr.data.sources import Source, names_of
from pldr.evaluation.modes import frozen_copy
from pldr.files import check_output, whole_folder
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT
from pldr.operator import factor, stored_operator
from pldr.study.certify import (
    Certificate,
    Comparison,
    FactoredReport,
    Thresholds,
    certificate_of,
    compare_factored,
    in_float32,
    interval_of_mean,
    losses_of,
    spread_passages,
)
from pldr.tables import Printable, compression_view

WEIGHTINGS = ("moments", "none")
# Passages that the moments come from, and on which ranks are looked for; they are proved on others.
_CALIBRATION = 8
# Error of a head's scores, as a share of the worst head's in its layer, below which the rest of its columns are left out.
_NEGLIGIBLE = 0.1
# Share of the largest singular value of G_LM below which another is rounding.
_ROUNDING = 1e-6
# Added to the moments, as a share of their mean: directions that calibration text never takes keep a little weight.
_RIDGE = 1e-6


class Factors(NamedTuple):
    """The factors of one layer's G_LM, of every rank at once.

    Attributes:
        left, right: [H, D, D], float64; the first r columns are the best factors of rank r, balanced: the columns of
            q left and of k right have the same second moments.
        errors: [H, D + 1], RMS of a score's error, after attention's scaling by D^-½, with so many columns.
    """

    left: torch.Tensor
    right: torch.Tensor
    errors: torch.Tensor

    def cut(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """left and right, [H, D, rank]; the columns that a head has no need of, beside the worst of its layer, are zero."""
        enough = self.errors <= _NEGLIGIBLE * self.errors[:, rank].max()
        needed = enough.double().argmax(1).clamp(max=rank)
        kept = torch.arange(rank, device=needed.device) < needed[:, None, None]
        return self.left[..., :rank] * kept, self.right[..., :rank] * kept


def factors_of(
    G_LM: torch.Tensor, query_moment: torch.Tensor | None = None, key_moment: torch.Tensor | None = None
) -> Factors:
    """The best factors of G_LM [H, D, D] for queries and keys of these second moments, [H, D, D] each.

    Without moments, those of white queries and keys: the plain singular value decomposition.
    """
    G = G_LM.double()
    (query_root, query_inverse), (key_root, key_inverse) = map(
        root_and_inverse, (_or_white(query_moment, G), _or_white(key_moment, G))
    )
    U, S, Vh = torch.linalg.svd(query_root @ G @ key_root)
    half = S.sqrt()[:, None]
    tails = S.square().flip(-1).cumsum(-1).flip(-1)
    errors = (F.pad(tails, (0, 1)) / G.shape[-1]).sqrt()
    plain = torch.linalg.svdvals(G)
    numerical_rank = (plain > _ROUNDING * plain[:, :1]).sum(1)
    errors[torch.arange(errors.shape[1], device=G.device) >= numerical_rank[:, None]] = 0
    return Factors(query_inverse @ U * half, key_inverse @ Vh.mT * half, errors)


def _or_white(moment: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like) if moment is None else moment


def root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a moment, and its inverse."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    root = (values + _RIDGE * values.mean(-1, keepdim=True).clamp(min=_RIDGE)).sqrt()[..., None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


class Moments(NamedTuple):
    """Second moments of rotated queries and keys, [L, H, D, D] each, float64."""

    query: torch.Tensor
    key: torch.Tensor

    def score_errors(self, G_LM: torch.Tensor, other: torch.Tensor) -> list[float]:
        """RMS of the scores' difference over that of the scores, for each layer; G_LM and the other [L, H, D, D]."""
        error, whole = (self._power(X.double().to(self.query)) for X in (other.double() - G_LM.double(), G_LM))
        return (error.sum(1) / whole.sum(1)).clamp(min=0).sqrt().tolist()

    def _power(self, X: torch.Tensor) -> torch.Tensor:
        """E[(qᵀ X k)²], [L, H]."""
        return (self.query @ X @ self.key * X).sum((-2, -1))


def factored_copy(whole: PldrForCausalLM, calibration: torch.Tensor, error: float = 0.01) -> PldrForCausalLM:
    """Keys in as few dimensions as keep the RMS error of every head's scores within a bound; the model stays as it is.

    That is quick, and proves nothing about the loss: `compress` does.

    Args:
        whole: with a constant operator.
        calibration: [C, T], the text that scores are of.
        error: of a score, after attention's scaling.
    """
    factors = [
        factors_of(*layer) for layer in zip(stored_operator(whole), *moments_of(whole, calibration), strict=True)
    ]
    steps = range(8, whole.config.head_dim + 1, 8)
    ranks = [next((r for r in steps if layer.errors[:, r].max() <= error), steps[-1]) for layer in factors]
    return factor(copy.deepcopy(whole), [layer.cut(rank) for layer, rank in zip(factors, ranks, strict=True)])


@torch.no_grad()
def moments_of(model: PldrForCausalLM, passages: torch.Tensor) -> Moments:
    """The moments of what reaches the operators of a model when it reads passages [B, T]."""
    config = model.config
    shape = (config.num_hidden_layers, 2, config.num_attention_heads, config.head_dim, config.head_dim)
    sums = torch.zeros(shape, dtype=torch.float64, device=model.device)

    def add_to(total: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for place, X in zip(total, arguments[:2], strict=True):  # query and key, [B, H, T, D]
                rows = X.double().transpose(0, 1).flatten(1, 2)
                place += rows.mT @ rows

        return hook

    operators = (layer.get_submodule("self_attn.operator") for layer in model.model.layers)
    handles = [
        operator.register_forward_pre_hook(add_to(total)) for operator, total in zip(operators, sums, strict=True)
    ]
    try:
        for ids in passages.split(1):
            model.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    query, key = (sums / passages.numel()).unbind(1)
    return Moments(query, key)


# --- ranks ----------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What a model makes of passages [B, T]: the mean loss of each, [B] float64, and its greedy tokens, [B, T]."""

    passages: torch.Tensor
    losses: torch.Tensor
    greedy: torch.Tensor


@torch.no_grad()
def read(model: PldrForCausalLM, passages: torch.Tensor) -> Read:
    """Passages [B, T], each from its beginning, by a model whose operator sees nothing of them."""
    losses, greedy = [], []
    for ids in passages.split(1):
        logits = model(ids, use_cache=False).logits
        losses.append(losses_of(logits, ids).mean(1))
        greedy.append(logits.argmax(-1))
    return Read(passages, torch.cat(losses), torch.cat(greedy))


class _Trials:
    """Factored forms of a model, judged by the loss that they add on some passages.

    Args:
        model: whose operator is constant; it stays as it is.
        layers: its factors, layer by layer.
        thresholds: what a form must keep; of the interval of the loss difference, the upper end counts.
    """

    def __init__(self, model: PldrForCausalLM, layers: Sequence[Factors], thresholds: Thresholds) -> None:
        self.layers, self.thresholds = layers, thresholds
        self.form = copy.deepcopy(model)

    def accepts(self, ranks: Sequence[int], before: Read) -> bool:
        """Whether factors of these ranks keep to the thresholds on passages that the model itself has read."""
        factor(self.form, [layer.cut(rank) for layer, rank in zip(self.layers, ranks, strict=True)])
        after = read(self.form, before.passages)
        upper = interval_of_mean((after.losses - before.losses).tolist())[1]
        agreement = float((after.greedy == before.greedy).double().mean())
        return upper <= self.thresholds.loss and agreement >= self.thresholds.agreement

    def search(self, before: Read) -> list[list[int]]:
        """Ranks, layer by layer, that are accepted: from generous to lean.

        First one bound on the error of scores for all layers, by bisection; then layer by layer, the cheapest step first.
        """
        head_dim = self.layers[0].left.shape[1]
        allowed = list(range(8, head_dim + 1, 8))
        error = [{rank: float(layer.errors[:, rank].max()) for rank in allowed} for layer in self.layers]
        bounds = sorted({value for layer in error for value in layer.values()})

        def within(bound: float) -> list[int]:
            return [next((rank for rank in allowed if layer[rank] <= bound), allowed[-1]) for layer in error]

        path = [[allowed[-1]] * len(self.layers)]
        low, high = 0, len(bounds)  # the first is taken for good, the last for too much
        while high - low > 1:
            middle = (low + high) // 2
            if self.accepts(within(bounds[middle]), before):
                low = middle
                path.append(within(bounds[middle]))
            else:
                high = middle
        ranks, steps = path[-1], set(range(len(self.layers)))
        while steps := {layer for layer in steps if ranks[layer] > 8}:
            layer = min(steps, key=lambda index: error[index][ranks[index] - 8])
            lower = [rank - 8 * (index == layer) for index, rank in enumerate(ranks)]
            if self.accepts(lower, before):
                path.append(ranks := lower)
            else:
                steps.remove(layer)
        return path


# --- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What factors of the chosen ranks change, on held-out passages.

    Attributes:
        score_error: RMS of the scores' error over that of the scores, layer by layer.
        comparison: with the frozen model.
    """

    score_error: list[float]
    comparison: Comparison


@dataclass(frozen=True)
class Compression(Printable):
    """A model with a factored operator, and what that changes.

    Attributes:
        ranks: dimensions of cached keys, layer by layer.
        head_dim: their dimensions before.
        kv_bytes, kv_bytes_before: of one token in the KV-cache.
        weighting: how the factors of the model were found, one of `WEIGHTINGS`.
        fits: by weighting: the model's, and the other at the same ranks.
        certificate: with the verdict, the ranks of each head, and what was compared.
    """

    ranks: list[int]
    head_dim: int
    kv_bytes: int
    kv_bytes_before: int
    weighting: str
    fits: dict[str, Fit]
    certificate: Certificate

    @property
    def model(self) -> PldrForCausalLM:
        """In evaluation mode, in the dtype of the model that it was made of."""
        return self.certificate.frozen

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        names = ("ranks", "head_dim", "kv_bytes", "kv_bytes_before", "weighting")
        fits = {name: {"score_error": fit.score_error, **vars(fit.comparison)} for name, fit in self.fits.items()}
        return {
            **{name: getattr(self, name) for name in names},
            "fits": fits,
            "certificate": self.certificate.to_json(),
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model with its tokenizer and, if it is certified, its certificate: whole or not at all.

        Raises:
            FileExistsError, OSError: see `pldr.files.check_output`.
        """
        with whole_folder(folder, overwrite=overwrite) as partial:
            self.model.save_pretrained(partial)
            self.certificate.tokenizer.save_pretrained(partial)
            if self.certificate.certified:
                write_certificate(partial, self.certificate.to_json())

    def __rich__(self) -> RenderableType:
        return compression_view(self.to_json())


def compress(
    model: str | os.PathLike[str] | PldrForCausalLM,
    destination: str | os.PathLike[str] | None = None,
    *,
    tolerance: float = 1e-4,
    agreement: float = 0.999,
    rank: int | None = None,
    weighting: str = "moments",
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    passages: int = 16,
    length: int | None = None,
    text_column: str = "text",
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> Compression:
    """Cache keys in fewer dimensions, as `pldr compress` does: a model whose operator is factored.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model, which stays as it is. A learned operator is
            frozen first, from eight passages of the calibration text.
        destination: folder for the model, its tokenizer and, if it is certified, its certificate.
        tolerance: bound on the upper end of the 95% interval of the loss difference on held-out passages, nats per token.
        agreement: least fraction of positions with the same greedy next token.
        rank: of all layers, a multiple of 8, in place of those that `tolerance` and `agreement` allow.
        weighting: "moments" (factors that are best for the scores of calibration text) or "none" (for G_LM itself).
        calibration: text: .txt, .jsonl, .parquet files or patterns, hub:NAME; by default excerpts that ship with pldr.
        passages: held out of that text, at least 2, on which the result is proved.
        length: tokens of a passage, at least 4; 512, or the context if that is less.
        text_column: of JSON lines, Parquet files and hub data sets.
        tokenizer, rope, device: see `pldr.checkpoints.load.load_with_tokenizer`.
        overwrite: replace a destination that is not empty.

    Raises:
        ValueError, OSError: an option outside its range, too little text, a tolerance that full rank does not meet, or a
            model, tokenizer or destination that can not be used; nothing is written then.
    """
    _check_options(tolerance, weighting, passages)
    thresholds = Thresholds(tolerance, agreement)
    if destination is not None:
        check_output(destination, overwrite=overwrite)
    stored, text_tokenizer = load_with_tokenizer(model, tokenizer, device=device, rope=rope)
    _check_rank(8 if rank is None else rank, stored.config.head_dim)
    sources = names_of(calibration)
    source = Source(sources, text_column) if sources else Source([str(HELD_OUT)])
    rows = spread_passages(source, text_tokenizer, stored, passages + _CALIBRATION, length).to(stored.device)
    whole = _whole(stored, rows[:_CALIBRATION])
    made, fits, report = _factored(whole, rows[:_CALIBRATION], rows[_CALIBRATION:], rank, weighting, thresholds)
    kv_bytes, kv_bytes_before = (model_facts(form)["kv_cache_bytes_per_token"] for form in (made, whole))
    certificate = certificate_of(
        model, stored, made, text_tokenizer, report, sources=sources or [HELD_OUT.name], rows=rows, calibration=_CALIBRATION
    )  # fmt: skip
    result = Compression(report.ranks, whole.config.head_dim, kv_bytes, kv_bytes_before, weighting, fits, certificate)
    if destination is not None:
        result.save(destination, overwrite=overwrite)
    return result


def _check_options(tolerance: float, weighting: str, passages: int) -> None:
    if not tolerance > 0:
        raise ValueError(f"tolerance: the bound must be positive, got {tolerance}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if passages < 2:
        raise ValueError(f"passages: must be at least 2, got {passages}")


def _check_rank(rank: int, head_dim: int) -> None:
    if rank % 8 or not 8 <= rank <= head_dim:
        raise ValueError(f"rank: must be a multiple of 8, from 8 to the model's head_dim of {head_dim}, got {rank}")


def _whole(model: PldrForCausalLM, passages: torch.Tensor) -> PldrForCausalLM:
    """The model with G_LM as a constant."""
    if model.config.operator == "learned":
        return frozen_copy(model, passages)
    return frozen_copy(model, G_LM=stored_operator(model))


def _factored(
    whole: PldrForCausalLM,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    rank: int | None,
    weighting: str,
    thresholds: Thresholds,
) -> tuple[PldrForCausalLM, dict[str, Fit], FactoredReport]:
    """The factored form, the fits of both weightings at its ranks, and the report about it.

    Raises:
        ValueError: not even full rank is within the thresholds.
    """
    plain, G_LM = in_float32(whole), stored_operator(whole)
    moments = moments_of(plain, calibration)
    layers = {
        "moments": [factors_of(G, q, k) for G, q, k in zip(G_LM.to(moments.query), *moments, strict=True)],
        "none": [factors_of(G) for G in G_LM],
    }
    if rank is not None:
        ranks = [rank] * len(G_LM)
    else:
        trials, others = _Trials(plain, layers[weighting], thresholds), read(plain, held_out)
        # What was accepted on the calibration passages must hold on others: the leanest ranks that do.
        path = trials.search(read(plain, calibration))
        proved = (ranks for ranks in reversed(path) if trials.accepts(ranks, others))
        found = next(proved, None)
        if found is None:
            raise ValueError(
                f"tolerance: not even factors of full rank keep the loss within {thresholds.loss:.1e} nats per token and "
                f"{thresholds.agreement:.3%} of the greedy tokens; allow more, or give a rank"
            )
        ranks = found
    seen, fits, forms, reports = moments_of(plain, held_out), {}, {}, {}
    for name in WEIGHTINGS:
        pairs = [layer.cut(size) for layer, size in zip(layers[name], ranks, strict=True)]
        form = forms[name] = factor(copy.deepcopy(whole), pairs)
        report = reports[name] = compare_factored(plain, in_float32(form), held_out, thresholds=thresholds)
        fits[name] = Fit(seen.score_errors(G_LM, stored_operator(form)), report.modes["factored"])
    return forms[weighting], fits, reports[weighting]
