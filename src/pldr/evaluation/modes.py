"""Where G_LM comes from when a trained model reads a text: the one place that knows.

- "learned": computed from all that a forward is given, as in training. It looks at later tokens, too.
- "cached": computed from the context and kept, as when generating with a G-cache.
- "frozen": a constant, from calibration passages or from training; it sees nothing of what is read.

Shapes: B sequences, T tokens, V vocabulary, L layers, H heads, D head dimension.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn import functional as F

from pldr.cache import make_cache
from pldr.deductive import dag_loss, deductive_outputs, log_determinant, numerical_rank, row_jacobians, variation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze
from pldr.recipe import DAG_TENSORS

MODES = ("learned", "cached", "frozen")
# A way to score with a learned G_LM: each token by a forward of its own, of what stands before it alone.
SEQUENTIAL = "sequential"
# Rows that rank, determinant and contraction are followed on.
_FOLLOWED = 4

P = ParamSpec("P")
R = TypeVar("R")


def modes_of(model: PldrForCausalLM) -> tuple[str, ...]:
    """All modes with a learned operator, "frozen" alone with a constant one."""
    return MODES if model.config.operator == "learned" else ("frozen",)


def name_of(model: str | os.PathLike[str] | PldrForCausalLM) -> str:
    """Of a model for people: its folder or file, as it was given or as it was loaded from; "model" where there is none."""
    return str((model.name_or_path if isinstance(model, PldrForCausalLM) else model) or "model")


def check_mode(model: PldrForCausalLM, mode: str) -> None:
    """Raises ValueError: there is no such mode, or the model, whose operator is constant, does not have it."""
    if mode not in (*MODES, SEQUENTIAL):
        raise ValueError(f"mode: must be one of {', '.join((*MODES, SEQUENTIAL))}, got {mode!r}")
    if mode != "frozen" and model.config.operator != "learned":
        raise ValueError(
            f"mode: {mode} needs a learned operator; this model's is constant, so that frozen is its only mode"
        )


def frozen_copy(
    model: PldrForCausalLM,
    calibration: Iterable[torch.Tensor] | torch.Tensor | None = None,
    *,
    G_LM: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> PldrForCausalLM:
    """The model with a constant operator, in evaluation mode; the model itself stays as it is.

    Args and raises: see `pldr.freeze`.
    """
    return freeze(copy.deepcopy(model), calibration, G_LM=G_LM).eval()


def model_in_mode(model: PldrForCausalLM, mode: str, calibration: torch.Tensor | None = None) -> PldrForCausalLM:
    """What runs in a mode, in evaluation mode: the model itself or, of a learned one, its frozen copy.

    Args:
        model: with any operator.
        mode: one of `MODES`, or `SEQUENTIAL`.
        calibration: [C, T], what a learned operator is frozen from (the mean over C); for "frozen" only.

    Raises:
        ValueError: see `check_mode`; nothing to freeze G_LM from.
    """
    check_mode(model, mode)
    if mode != "frozen" or model.config.operator != "learned":
        return model.eval()
    if calibration is None or not len(calibration):
        raise ValueError("calibration: no passages to freeze G_LM from")
    return frozen_copy(model, calibration.to(model.device))


def keeps_training(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument, where it is a model in memory and was in training mode, is so again afterwards."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> R:
        model: Any = args[0] if args else options.get("model")
        training = isinstance(model, PldrForCausalLM) and model.training
        try:
            return function(*args, **options)
        finally:
            if training:
                model.train()

    return wrapped


def cache_settings(mode: str) -> dict[str, bool]:
    """Of `generate`, so that it takes G_LM from where the mode does: a learned one comes from all tokens so far, every time."""
    cached = mode not in ("learned", SEQUENTIAL)
    return {"use_cache": cached, "use_g_cache": cached}


class OperatorModes:
    """A model with a learned operator beside its frozen form, to compare the modes on the same text.

    Attributes:
        models: by mode, what runs in it.

    Args:
        model: with a learned operator.
        calibration: [C, T], passages that the frozen form is made from; or
        frozen: that form itself.
    """

    def __init__(
        self, model: PldrForCausalLM, calibration: torch.Tensor | None = None, *, frozen: PldrForCausalLM | None = None
    ) -> None:
        constant = frozen.eval() if frozen is not None else model_in_mode(model, "frozen", calibration)
        self.models = {"learned": model.eval(), "cached": model, "frozen": constant}

    @torch.no_grad()
    def logits(self, mode: str, ids: torch.Tensor, context: int) -> torch.Tensor:
        """Logits behind the last token of a context and behind each token after it.

        Args:
            mode: one of `MODES`.
            ids: [B, T].
            context: tokens of the context, at least 1; only "cached" makes a difference between them and the rest.

        Returns:
            [B, T - context + 1, V].
        """
        model = self.models[mode]
        if mode != "cached":
            return model(ids, use_cache=False).logits[:, context - 1 :]
        cache = make_cache(model.config)
        head = model(ids[:, :context], past_key_values=cache).logits[:, -1:]
        return torch.cat((head, model(ids[:, context:], past_key_values=cache).logits), 1)

    def loss(self, mode: str, passages: torch.Tensor, context: int) -> float:
        """Mean cross-entropy of what follows the first token after the context, nats per token; passages [B, T]."""
        logits = self.logits(mode, passages[:, :-1], context)[:, 1:].double()  # the last token is a target alone
        return float(F.cross_entropy(logits.flatten(0, 1), passages[:, context + 1 :].flatten()))


@torch.no_grad()
def operator_metrics(model: PldrForCausalLM, rows: torch.Tensor) -> dict[str, Any]:
    """Whether G_LM has become a constant: what an evaluation logs beside the loss.

    Args:
        model: with a learned operator.
        rows: [B, T + 1], B ≥ 2, held out; T tokens are read, and T are targets.

    Returns:
        "G_variation", of G_LM over the rows, layer by layer (see `pldr.deductive.variation`); "G_frozen_difference",
        the mean loss of all rows but the first with G_LM frozen from the first, minus that with a learned G_LM, in
        nats per token; "dag_A_LM", "dag_A_P" and "dag_G_LM", the DAG loss of each deductive output. Layer by layer, of the
        first rows: "G_rank", the mean numerical rank of G_LM (singular values over 1e-2 of the largest); "G_log10_determinant",
        the mean of its magnitude's logarithm, null where a head's is 0; "row_gain" and "row_norm", of the Jacobians of the metric
        learner's network (`pldr.deductive.row_jacobians`): by what a small random change of a row grows (RMS; 1 leaves it as it
        is), and the mean of the largest singular values.
    """
    was_training = model.training
    model.eval()
    ids, targets = rows[:, :-1], rows[:, 1:]
    frozen, learned = (
        float(running(ids[1:], shift_labels=targets[1:], use_cache=False, return_logits=False).loss)
        for running in (frozen_copy(model, ids[:1]), model)
    )
    outputs = deductive_outputs(model, ids)
    model.train(was_training)
    return {
        "G_variation": variation(outputs.G_LM).tolist(),
        "G_frozen_difference": frozen - learned,
        # In float64, which holds the exponentials of larger tensors.
        **{f"dag_{name}": float(dag_loss(getattr(outputs, name).double())) for name in DAG_TENSORS},
        **_singularity(model, ids[:_FOLLOWED], outputs.G_LM[:, :_FOLLOWED]),
    }


def _singularity(model: PldrForCausalLM, ids: torch.Tensor, G_LM: torch.Tensor) -> dict[str, list[float]]:
    """See `operator_metrics`; G_LM [L, B, H, D, D]."""
    jacobians = row_jacobians(model, ids)  # [L, rows, D, D]
    return {
        "G_rank": numerical_rank(G_LM).double().mean((1, 2)).tolist(),
        "G_log10_determinant": log_determinant(G_LM)[1].mean((1, 2)).tolist(),
        "row_gain": (jacobians.square().sum((-1, -2)).mean(1) / jacobians.shape[-1]).sqrt().tolist(),
        "row_norm": torch.linalg.matrix_norm(jacobians, 2).mean(1).tolist(),
    }
