"""The order parameter of arXiv 2603.23539: how far two stochastic continuations of a prompt drive the deductive outputs apart.

Shapes: B prompts, T tokens, L layers, H heads, D head dimension.
"""

import torch

from pldr.deductive import deductive_outputs
from pldr.modeling_pldr import PldrForCausalLM

# Sequences of one forward.
_BATCH = 4


@torch.no_grad()
def continuations(model: PldrForCausalLM, prompts: torch.Tensor, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Prompts [B, T] with so many tokens drawn after them, at temperature 1, with KV-cache and G-cache: [B, T + tokens]."""
    torch.manual_seed(seed)
    return model.generate(prompts, max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None)


def order_parameter(model: PldrForCausalLM, prompts: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """`distance` of each deductive output that there is, of two continuations of each prompt by so many tokens, [L].

    Args:
        model: with any operator; a constant one has G_LM alone, whose order parameter is 0.
        prompts: [B, T].
        tokens: that each is continued by; the outputs are those of prompt and continuation together.
    """
    if model.config.operator != "learned":
        return {"G_LM": torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)}
    parts = []
    for few in prompts.split(_BATCH):
        pair = [deductive_outputs(model, continuations(model, few, tokens, seed=seed)) for seed in (0, 1)]
        parts.append([tensor._asdict() for tensor in pair])
    names = parts[0][0]
    return {name: distance(*(torch.cat([part[i][name] for part in parts], 1) for i in range(2))) for name in names}


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """RMS(one - other) / √((RMS(one)² + RMS(other)²) / 2) over prompts, heads and entries: [L, B, H, D, D] each → [L], float64.

    0 where they are the same, √2 where they have nothing to do with each other.
    """
    squares = [X.double().square().flatten(1).mean(1) for X in (one.double() - other.double(), one, other)]
    return (2 * squares[0] / (squares[1] + squares[2])).sqrt().cpu()
