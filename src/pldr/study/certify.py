"""Is it safe to cache, freeze or factor G_LM for a checkpoint? Measured on held-out text, with a verdict.

Every mode of `pldr.evaluation.modes` is compared with the model as it is: G_LM learned from the whole passage. A factored
form is compared with the model that it came from. Shapes: B passages, T tokens each, V vocabulary.
"""

import copy
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console, RenderableType
from rich.progress import track
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.certificate import FACTORED_KIND, KIND, write_certificate
from pldr.checkpoints.load import load_model, load_with_tokenizer
from pldr.conditions import versions
from pldr.data.rows import choose_passages
from pldr.data.sources import Source, names_of
from pldr.deductive import deductive_outputs, variation
from pldr.evaluation.modes import OperatorModes, frozen_copy, keeps_training, name_of
from pldr.files import check_output, whole_folder
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import FactoredOperator
from pldr.provenance import weights_digest
from pldr.tables import Printable, certificate_view

# Resamples of the passages for the 95% interval of a mean.
_RESAMPLES = 10_000
# Passages on which frozen forms from each calibration passage alone are compared.
_CALIBRATION_COMPARED = 8


@dataclass(frozen=True)
class Thresholds:
    """What a certified model keeps, in each mode.

    Attributes:
        loss: bound on both ends of the 95% interval of the difference of mean loss, in nats per token.
        agreement: least fraction of positions with the same greedy next token.

    Raises:
        ValueError: a bound that nothing could meet, or that everything would.
    """

    loss: float = 1e-5
    agreement: float = 0.999

    def __post_init__(self) -> None:
        if not self.loss > 0:
            raise ValueError(f"loss: the bound must be positive, got {self.loss}")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement: must be between 0 and 1, got {self.agreement}")


@dataclass(frozen=True)
class Change:
    """How one kind of logits differs from another.

    Attributes:
        kl_mean: KL divergence of the next-token distributions, mean over positions, nats.
        agreement: fraction of positions with the same greedy next token.
        logit_difference: largest, of any logit.
    """

    kl_mean: float
    agreement: float
    logit_difference: float


@dataclass(frozen=True)
class Comparison(Change):
    """Of a mode with the model itself.

    Attributes:
        loss_difference: mean of this mode's loss minus the model's, nats per token.
        loss_interval: its 95% interval, by bootstrap over passages.
        kl_99, kl_max: 99th percentile and maximum of the KL divergence, from the model's distribution, nats.
    """

    loss_difference: float
    loss_interval: tuple[float, float]
    kl_99: float
    kl_max: float


@dataclass(frozen=True, kw_only=True)
class BaseReport:
    """What a change of the model changes in what it says, and whether that is little enough.

    Attributes:
        kind: of the certificate that it makes.
        passages, tokens: that were compared.
        loss: of the model before, nats per token.
        modes: what was compared, by name.
        thresholds: what the verdict is about.
        reasons: against it.
        certified: the verdict: there are none.
    """

    kind: ClassVar[str]
    passages: int
    tokens: int
    loss: float
    modes: dict[str, Comparison]
    thresholds: Thresholds
    reasons: list[str]
    certified: bool


@dataclass(frozen=True, kw_only=True)
class Report(BaseReport):
    """What caching and freezing change; modes: "cached" (positions in the second half of each passage) and "frozen" (all).

    Attributes:
        variation: of G_LM over passages, layer by layer (`pldr.deductive.variation`).
        calibration: frozen "loss_difference" by each calibration passage alone, on the first eight passages, and their
            "spread".
        causality: how much logits before the middle change when the tokens after it do, for a learned and a frozen G_LM.
    """

    kind = KIND
    variation: list[float]
    calibration: dict[str, Any]
    causality: dict[str, Change]


@dataclass(frozen=True, kw_only=True)
class FactoredReport(BaseReport):
    """What a factored operator changes; modes: "factored", all positions.

    Of the interval of the loss difference, the upper end counts.

    Attributes:
        against: "learned" or "frozen": the operator of the model that it is compared with.
        ranks: dimensions of cached keys, layer by layer.
        head_ranks: of those the ones that each head uses, layer by layer.
    """

    kind = FACTORED_KIND
    against: str
    ranks: list[int]
    head_ranks: list[list[int]]


@dataclass(frozen=True)
class Certificate(Printable):
    """A report with what it is about: weights, data and versions (see `pldr.checkpoints.certificate`).

    Attributes:
        model: name of the model.
        weights, frozen_weights: digests of the model and of its frozen, factored or quantised form, as they are stored.
        data: names of the data and whatever else tells it apart.
        device: where it was measured, in float32.
        date: when.
        report: what was measured.
        frozen: the frozen or factored form, which is no part of the written certificate.
        tokenizer: of the model.
    """

    model: str
    weights: str
    frozen_weights: str
    data: dict[str, Any]
    device: str
    date: str
    report: BaseReport
    frozen: PldrForCausalLM = dataclasses.field(repr=False)
    tokenizer: PreTrainedTokenizerFast = dataclasses.field(repr=False)

    @property
    def certified(self) -> bool:
        return self.report.certified

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        return {
            "kind": self.report.kind,
            **{name: getattr(self, name) for name in ("model", "weights", "frozen_weights", "data", "device", "date")},
            "dtype": "float32",
            "versions": versions(),
            "report": dataclasses.asdict(self.report),
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the frozen or factored model with its tokenizer and certificate, whole or not at all.

        Raises:
            FileExistsError, OSError: see `pldr.files.check_output`.
        """
        with whole_folder(folder, overwrite=overwrite) as partial:
            self.frozen.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            write_certificate(partial, self.to_json())

    def __rich__(self) -> RenderableType:
        return certificate_view(self.to_json())


@keeps_training
def certify(
    model: str | os.PathLike[str] | PldrForCausalLM,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str] | None = None,
    frozen: str | os.PathLike[str] | None = None,
    passages: int = 32,
    calibration: int = 4,
    length: int | None = None,
    loss: float | None = None,
    agreement: float = 0.999,
    text_column: str = "text",
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> Certificate:
    """Measure whether G_LM may be cached, frozen or factored, as `pldr certify` does.

    Args:
        model: with a learned operator: a folder in any layout, a ``.pth`` file, or a loaded model. A factored form can also
            be compared with the frozen model that it came from.
        data: held-out text: .txt, .jsonl, .parquet files or patterns, hub:NAME.
        output: folder for the frozen model and its certificate, written if certified.
        frozen: folder with a frozen or factored form of the model to certify, rather than make one; its certificate goes
            there.
        passages: to compare on, at least 2, spread over the beginning of the data.
        calibration: further passages, at least 1, that G_LM is frozen from.
        length: tokens of a passage, at least 4; 512, or the context if that is less.
        loss, agreement: see `Thresholds`; the loss is 1e-5 by default, of a factored form 1e-4.
        text_column: of JSON lines, Parquet files and hub data sets.
        tokenizer, rope, device: see `pldr.checkpoints.load.load_with_tokenizer`.
        overwrite: replace an output folder that is not empty.

    Raises:
        ValueError, OSError: an option outside its range, too little text, or a model, tokenizer or output folder that
            can not be used; nothing is written then.
    """
    Thresholds(1e-5 if loss is None else loss, agreement)  # refused before anything is read
    if passages < 2 or calibration < 1:
        raise ValueError(f"passages: must be at least 2, and calibration at least 1, got {passages} and {calibration}")
    if frozen is not None and output is not None:
        raise ValueError("frozen, output: the certificate goes into the folder given by frozen; choose one")
    if output is not None:
        check_output(output, overwrite=overwrite)
    stored, text_tokenizer = load_with_tokenizer(model, tokenizer, device=device, rope=rope)
    constant = None if frozen is None else load_model(frozen, device=stored.device)
    factored = constant is not None and constant.config.operator == "factored"
    if not factored:
        _check_learned(stored)
    thresholds = Thresholds((1e-4 if factored else 1e-5) if loss is None else loss, agreement)
    sources = names_of(data)
    rows = spread_passages(Source(sources, text_column), text_tokenizer, stored, passages + calibration, length)
    if constant is not None and constant.config.vocab_size != stored.config.vocab_size:
        raise ValueError(f"{frozen}: has another vocabulary than the model; it is not its frozen form")
    frozen_weights = None if constant is None else weights_digest(constant.state_dict())
    read, held_out = in_float32(stored), rows[calibration:].to(stored.device)
    report: BaseReport
    if factored:
        assert constant is not None
        report = compare_factored(read, in_float32(constant), held_out, thresholds=thresholds, progress=_progress)
    else:
        report, constant = compare_modes(
            read,
            held_out,
            rows[:calibration].to(stored.device),
            frozen=None if constant is None else in_float32(constant),
            thresholds=thresholds,
            progress=_progress,
        )
    certificate = certificate_of(
        model, stored, constant, text_tokenizer, report, sources=sources, rows=rows, calibration=calibration,
        frozen_weights=frozen_weights,
    )  # fmt: skip
    if certificate.certified and output is not None:
        certificate.save(output, overwrite=overwrite)
    elif certificate.certified and frozen is not None:
        write_certificate(Path(frozen), certificate.to_json())
    return certificate


def certificate_of(
    model: str | os.PathLike[str] | PldrForCausalLM,
    stored: PldrForCausalLM,
    form: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: BaseReport,
    *,
    sources: list[str],
    rows: torch.Tensor,
    calibration: int,
    frozen_weights: str | None = None,
) -> Certificate:
    """A report with what it is about.

    Args:
        model: as it was given; `stored`: as it was loaded.
        form: its frozen, factored or quantised form, and `frozen_weights`: its digest where it is stored in another dtype.
        tokenizer: of the model.
        report: what was measured.
        sources: of the passages `rows` [B, T], the first `calibration` of which were not held out.
    """
    return Certificate(
        model=Path(name_of(model)).resolve().name,
        weights=weights_digest(stored.state_dict()),
        frozen_weights=frozen_weights or weights_digest(form.state_dict()),
        data={
            "sources": sources, "passages": len(rows) - calibration, "calibration_passages": calibration,
            "length": rows.shape[1], "sha256": hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest(),
        },
        device=str(stored.device), date=time.strftime("%Y-%m-%d"), report=report, frozen=form, tokenizer=tokenizer,
    )  # fmt: skip


def _progress(items: Iterable[int]) -> Iterable[int]:
    """With a bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    return track(items, "certifying", console=console, transient=True, disable=not console.is_terminal)


def _check_learned(model: PldrForCausalLM) -> None:
    """Raises ValueError: there is nothing to certify."""
    if model.config.operator != "learned":
        raise ValueError("certify: this model's operator is constant already; certify the model it was frozen from")


def in_float32(model: PldrForCausalLM) -> PldrForCausalLM:
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def spread_passages(
    source: Source, tokenizer: PreTrainedTokenizerFast, model: PldrForCausalLM, count: int, length: int | None
) -> torch.Tensor:
    """[count, length] passages in random order, spread over the beginning of the data, not one stretch of a document.

    Raises:
        ValueError: a length outside the context, or too little text.
    """
    context = model.config.max_position_embeddings
    found = choose_passages(source, tokenizer, context, length=length, count=8 * count, needed=count, shortest=4)
    rows = found[torch.linspace(0, len(found) - 1, count).long()]
    return rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def compare_modes(
    model: PldrForCausalLM,
    passages: torch.Tensor,
    calibration: torch.Tensor,
    *,
    frozen: PldrForCausalLM | None = None,
    thresholds: Thresholds | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items,
) -> tuple[Report, PldrForCausalLM]:
    """Compare a learned G_LM with one cached from the first half of each passage, and with a frozen one.

    Args:
        model: with a learned operator.
        passages: [B, T], held out, B ≥ 2, T ≥ 4.
        calibration: [C, T], other passages, which G_LM is frozen from (their mean).
        frozen: a frozen form of the model to compare in place of a new one.
        thresholds: what the verdict is about.
        progress: wraps the indices of the passages, to show progress.

    Returns:
        The report and the frozen model.

    Raises:
        ValueError: the model has no learned operator; too few passages.
    """
    thresholds = thresholds or Thresholds()
    _check_learned(model)
    if len(passages) < 2 or passages.shape[1] < 4:
        raise ValueError(f"certify: needs at least 2 passages of 4 tokens, got {tuple(passages.shape)}")
    if frozen is not None and frozen.config.operator != "constant":
        raise ValueError("certify: the model to compare must have a constant operator")
    modes = OperatorModes(model, calibration, frozen=frozen)
    half = passages.shape[1] // 2
    compared = {"cached": _Sums(), "frozen": _Sums()}
    causality = {"learned": _Sums(), "frozen": _Sums()}
    losses = []
    for index in progress(range(len(passages))):
        ids = passages[index : index + 1]
        learned, constant = (modes.logits(mode, ids, 1) for mode in ("learned", "frozen"))
        losses.append(losses_of(learned, ids))
        compared["frozen"].add(learned, constant, ids)
        compared["cached"].add(learned[:, half:], modes.logits("cached", ids, half)[:, 1:], ids[:, half:])
        # The same first half before the second half of another passage.
        other = torch.cat((ids[:, :half], passages[(index + 1) % len(passages), None, half:]), 1)
        for mode, before in (("learned", learned), ("frozen", constant)):
            causality[mode].add(before[:, :half], modes.logits(mode, other, 1)[:, :half], ids[:, :half])

    few = passages[:_CALIBRATION_COMPARED]
    alone = [_loss_difference(frozen_copy(model, row[None]), few, losses) for row in calibration]
    comparisons = {mode: sums.comparison() for mode, sums in compared.items()}
    reasons = [reason for mode, found in comparisons.items() for reason in against(mode, found, thresholds)]
    report = Report(
        passages=len(passages), tokens=passages.numel(), loss=float(np.mean([loss.mean().item() for loss in losses])),
        modes=comparisons, variation=variation(_operators(model, passages)).tolist(),
        calibration={"loss_difference": alone, "spread": max(alone) - min(alone)},
        causality={mode: sums.change() for mode, sums in causality.items()},
        thresholds=thresholds, reasons=reasons, certified=not reasons,
    )  # fmt: skip
    return report, modes.models["frozen"]


@torch.no_grad()
def compare_factored(
    model: PldrForCausalLM,
    factored: PldrForCausalLM,
    passages: torch.Tensor,
    *,
    thresholds: Thresholds,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items,
) -> FactoredReport:
    """Compare a factored form with the model that it came from, on passages [B, T], held out, B ≥ 2, T ≥ 4."""
    found, loss = compare_forms(model, factored, passages, progress)
    reasons = against("factored", found, thresholds, worst=found.loss_interval[1])
    ranks = factored.config.operator_ranks
    assert ranks is not None
    return FactoredReport(
        against="learned" if model.config.operator == "learned" else "frozen", passages=len(passages),
        tokens=passages.numel(), loss=loss, modes={"factored": found}, ranks=ranks,
        head_ranks=[operator.head_ranks() for operator in factored.modules() if isinstance(operator, FactoredOperator)],
        thresholds=thresholds, reasons=reasons, certified=not reasons,
    )  # fmt: skip


@torch.no_grad()
def compare_forms(
    model: PldrForCausalLM,
    form: PldrForCausalLM,
    passages: torch.Tensor,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items,
) -> tuple[Comparison, float]:
    """How a form of a model reads passages [B, T], each with its own operator, and the model's mean loss."""
    sums, losses = _Sums(), []
    for index in progress(range(len(passages))):
        ids = passages[index : index + 1]
        before, after = (each.eval()(ids, use_cache=False).logits for each in (model, form))
        losses.append(losses_of(before, ids).mean().item())
        sums.add(before, after, ids)
    return sums.comparison(), float(np.mean(losses))


def _operators(model: PldrForCausalLM, passages: torch.Tensor) -> torch.Tensor:
    """G_LM of every passage, [L, B, H, D, D]; a few passages at a time."""
    return torch.cat([deductive_outputs(model, part).G_LM.cpu() for part in passages.split(4)], 1)


def losses_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, T - 1], float64."""
    return F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")


def _loss_difference(frozen: PldrForCausalLM, passages: torch.Tensor, losses: list[torch.Tensor]) -> float:
    """Mean loss of a frozen form minus the model's, whose losses of each passage, [1, T - 1], are known."""
    differences = [
        (losses_of(frozen(ids, use_cache=False).logits, ids) - known).mean()
        for ids, known in zip(passages.split(1), losses, strict=False)
    ]
    return float(torch.stack(differences).mean())


def against(mode: str, found: Comparison, thresholds: Thresholds, worst: float | None = None) -> list[str]:
    """Reasons; `worst`: the loss difference that counts, by default the larger end of its interval, of either sign."""
    worst = max(abs(bound) for bound in found.loss_interval) if worst is None else worst
    reasons = []
    if not worst <= thresholds.loss:
        reasons.append(f"{mode}: loss may differ by {worst:.1e} nats per token, more than {thresholds.loss:.1e}")
    if not found.agreement >= thresholds.agreement:
        reasons.append(f"{mode}: {found.agreement:.3%} same greedy tokens, less than {thresholds.agreement:.3%}")
    return reasons


class _Sums:
    """Sums up how one kind of logits differs from another, passage by passage."""

    def __init__(self) -> None:
        self.loss_differences: list[float] = []
        self.kl: list[np.ndarray] = []
        self.same = self.positions = 0
        self.logit_difference = 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> None:
        """Of one passage: logits [1, T, V] both, ids [1, T]."""
        self.loss_differences.append(float((losses_of(other, ids) - losses_of(reference, ids)).mean()))
        one, two = (logits.double().log_softmax(-1) for logits in (reference, other))
        self.kl.append((one.exp() * (one - two)).sum(-1).clamp(min=0).flatten().cpu().numpy())
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.positions += reference.shape[1]
        self.logit_difference = max(self.logit_difference, float((reference - other).abs().max()))

    def change(self) -> Change:
        return Change(float(np.concatenate(self.kl).mean()), self.same / self.positions, self.logit_difference)

    def comparison(self) -> Comparison:
        kl = np.concatenate(self.kl)
        return Comparison(
            **vars(self.change()), loss_difference=float(np.mean(self.loss_differences)),
            loss_interval=interval_of_mean(self.loss_differences), kl_99=float(np.percentile(kl, 99)), kl_max=float(kl.max()),
        )  # fmt: skip


def interval_of_mean(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of their mean, by bootstrap."""
    values = np.array(numbers)
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)
