"""Where G_LM comes from."""

import copy
from typing import Any

import torch

from pldr.deductive import dag_loss, deductive_outputs, variation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze


@torch.no_grad()
def operator_metrics(model: PldrForCausalLM, passages: torch.Tensor) -> dict[str, Any]:
    """Whether G_LM has become a constant: what an evaluation logs beside the loss.

    Args:
        model: with a learned operator.
        passages: [B, T], B ≥ 2, held out.

    Returns:
        "G_variation", of G_LM over the passages, layer by layer (see `pldr.deductive.variation`); "G_frozen_difference",
        the mean loss of all passages but the first with G_LM frozen from the first, minus that with G_LM computed from
        each, in nats a token; "dag_A_LM", "dag_A_P" and "dag_G_LM", the DAG loss of each deductive output.
    """
    was_training = model.training
    model.eval()
    frozen = freeze(copy.deepcopy(model), passages[:1])
    losses = [
        float(running(passages[1:], labels=passages[1:], use_cache=False, return_logits=False).loss)
        for running in (frozen, model)
    ]
    outputs = deductive_outputs(model, passages)
    model.train(was_training)
    return {
        "G_variation": variation(outputs.G_LM).tolist(),
        "G_frozen_difference": losses[0] - losses[1],
        # In float64, which holds the exponentials of larger tensors.
        **{f"dag_{name}": float(dag_loss(getattr(outputs, name).double())) for name in ("A_LM", "A_P", "G_LM")},
    }
