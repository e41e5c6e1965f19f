"""Is it safe to cache or freeze G_LM for a checkpoint? Measured on held-out text, with a verdict.

Every mode is compared with the model as it is: G_LM computed from the whole passage. Shapes: B passages, T tokens each, V
vocabulary.
"""

import copy
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from pldr.cache import make_cache
from pldr.deductive import deductive_outputs, variation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze

# Resamples of the passages for the 95% interval of a mean.
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Thresholds:
    """What a certified model keeps, in each mode.

    Attributes:
        loss: bound on both ends of the 95% interval of the difference of mean loss, in nats a token.
        agreement: least fraction of positions with the same greedy next token.
    """

    loss: float = 1e-5
    agreement: float = 0.999


@torch.no_grad()
def certify(
    model: PldrForCausalLM,
    passages: torch.Tensor,
    calibration: torch.Tensor,
    *,
    frozen: PldrForCausalLM | None = None,
    thresholds: Thresholds | None = None,
    track: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> tuple[dict[str, Any], PldrForCausalLM]:
    """Compare G_LM computed anew, cached from the first half of each passage, and frozen.

    Args:
        model: with a learned operator.
        passages: [B, T], held out, B ≥ 2, T ≥ 4.
        calibration: [C, T], other passages, which G_LM is frozen from (their mean).
        frozen: a frozen form of the model to compare in place of a new one.
        thresholds: what the verdict is about.
        track: wraps the passages, to show progress.

    Returns:
        The report, of plain numbers and lists, and the frozen model. In the report:

        "modes": for "cached" (positions in the second half) and "frozen" (all positions): "loss_difference" (mean of this
        mode's loss minus the model's, nats a token), "loss_interval" (95%, bootstrap over passages), "kl_mean", "kl_99"
        and "kl_max" (KL divergence of the next-token distributions, from the model's, nats), "agreement" and
        "logit_difference" (largest). "loss": of the model. "variation": of G_LM, a layer. "calibration": frozen
        "loss_difference" by each calibration passage alone, on the first eight passages, and their "spread". "causality": how much logits before the
        middle change when the tokens after it do, for the model and its frozen form. "certified" and "reasons" (against).

    Raises:
        ValueError: the model has no learned operator; too few passages.
    """
    thresholds = thresholds or Thresholds()
    if model.config.operator != "learned":
        raise ValueError("certify: this model's operator is constant already; certify the model it was frozen from")
    if len(passages) < 2 or passages.shape[1] < 4:
        raise ValueError(f"certify: needs at least 2 passages of 4 tokens, got {tuple(passages.shape)}")
    if len(calibration) < 1:
        raise ValueError("certify: needs at least one calibration passage")
    if frozen is None:
        frozen = freeze(copy.deepcopy(model), calibration)
    elif frozen.config.operator != "constant":
        raise ValueError("certify: the model to compare must have a constant operator")
    model.eval()
    frozen.eval()

    prefix = passages.shape[1] // 2
    modes = {"cached": _Comparison(), "frozen": _Comparison()}
    causality = {"computed": _Comparison(), "frozen": _Comparison()}
    losses = []
    for index in track(range(len(passages))):
        ids = passages[index : index + 1]
        full = model(ids, use_cache=False).logits
        losses.append(_losses(full, ids).mean().item())
        constant = frozen(ids, use_cache=False).logits
        modes["frozen"].add(full, constant, ids)
        cache = make_cache(model.config)
        model(ids[:, :prefix], past_key_values=cache)
        rest = model(ids[:, prefix:], past_key_values=cache).logits
        modes["cached"].add(full[:, prefix:], rest, ids[:, prefix:])
        # The same first half before the second half of another passage.
        other = torch.cat((ids[:, :prefix], passages[(index + 1) % len(passages), None, prefix:]), 1)
        for name, running, before in (("computed", model, full), ("frozen", frozen, constant)):
            after = running(other, use_cache=False).logits
            causality[name].add(before[:, :prefix], after[:, :prefix], ids[:, :prefix])

    alone = [_loss_difference(model, passages[:8], freeze(copy.deepcopy(model), row[None])) for row in calibration]
    report: dict[str, Any] = {
        "passages": len(passages),
        "tokens": passages.numel(),
        "loss": float(np.mean(losses)),
        "modes": {name: comparison.summary() for name, comparison in modes.items()},
        "variation": variation(_operators(model, passages)).tolist(),
        "calibration": {"loss_difference": alone, "spread": max(alone) - min(alone)},
        "causality": {name: comparison.change() for name, comparison in causality.items()},
        "thresholds": vars(thresholds),
    }
    report["reasons"] = [
        reason for name, mode in report["modes"].items() for reason in _against(name, mode, thresholds)
    ]
    report["certified"] = not report["reasons"]
    return report, frozen


def _operators(model: PldrForCausalLM, passages: torch.Tensor) -> torch.Tensor:
    """G_LM of every passage, [L, B, H, D, D]; a few passages at a time."""
    return torch.cat([deductive_outputs(model, part).G_LM.cpu() for part in passages.split(4)], 1)


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, T - 1], float64."""
    return F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")


def _loss_difference(model: PldrForCausalLM, passages: torch.Tensor, frozen: PldrForCausalLM) -> float:
    differences = [
        (_losses(frozen(ids, use_cache=False).logits, ids) - _losses(model(ids, use_cache=False).logits, ids)).mean()
        for ids in passages.split(1)
    ]
    return float(torch.stack(differences).mean())


def _against(name: str, mode: dict[str, Any], thresholds: Thresholds) -> list[str]:
    worst = max(abs(bound) for bound in mode["loss_interval"])
    reasons = []
    if not worst <= thresholds.loss:
        reasons.append(f"{name}: loss may differ by {worst:.1e} nats a token, more than {thresholds.loss:.1e}")
    if not mode["agreement"] >= thresholds.agreement:
        reasons.append(f"{name}: {mode['agreement']:.3%} same greedy tokens, less than {thresholds.agreement:.3%}")
    return reasons


class _Comparison:
    """Sums up how one kind of logits differs from another, passage by passage."""

    def __init__(self) -> None:
        self.loss_differences: list[float] = []
        self.kl: list[np.ndarray] = []
        self.same = self.positions = 0
        self.logit_difference = 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> None:
        """Of one passage: logits [1, T, V] both, ids [1, T]."""
        self.loss_differences.append(float((_losses(other, ids) - _losses(reference, ids)).mean()))
        one, two = (logits.double().log_softmax(-1) for logits in (reference, other))
        self.kl.append((one.exp() * (one - two)).sum(-1).clamp(min=0).flatten().cpu().numpy())
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.positions += reference.shape[1]
        self.logit_difference = max(self.logit_difference, float((reference - other).abs().max()))

    def summary(self) -> dict[str, Any]:
        values, kl = np.array(self.loss_differences), np.concatenate(self.kl)
        draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
        return {
            "loss_difference": float(values.mean()),
            "loss_interval": [float(low), float(high)],
            "kl_mean": float(kl.mean()),
            "kl_99": float(np.percentile(kl, 99)),
            "kl_max": float(kl.max()),
        } | self.change()

    def change(self) -> dict[str, float]:
        kl = np.concatenate(self.kl)
        return {
            "kl_mean": float(kl.mean()),
            "agreement": self.same / self.positions,
            "logit_difference": self.logit_difference,
        }


def make_certificate(
    report: dict[str, Any],
    *,
    model: str,
    weights: str,
    frozen_weights: str,
    device: str,
    data: dict[str, Any],
) -> dict[str, Any]:
    """A report with what it is about: weights, data and versions (see `pldr.certificate`).

    Args:
        report: of `certify`, measured in float32.
        model: name of the model.
        weights, frozen_weights: digests of both as they are stored.
        device: where it was measured.
        data: names of the data and whatever else tells it apart.
    """
    import pldr

    return {
        "kind": "pldr certificate 1",
        "model": model,
        "weights": weights,
        "frozen_weights": frozen_weights,
        "data": data,
        "versions": {
            "pldr": pldr.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        "dtype": "float32",
        "date": time.strftime("%Y-%m-%d"),
        "report": report,
    }
