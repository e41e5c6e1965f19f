"""Ordinary attention as the special case: with G_LM = identity, a model computes what Llama's attention would with its weights.

Shapes: B texts, T tokens, V vocabulary, H heads, D head dimension, M = H·D.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from pldr.configuration_pldr import PldrConfig
from pldr.evaluation.modes import frozen_copy
from pldr.modeling_pldr import PldrAttention, PldrForCausalLM
from pldr.study.lab import Finding, Lab, Verdict, table

# Logits that differ by no more are the same: float32's rounding through a few layers. What is another operator differs by
# at least a thousand times that.
_ROUNDING = 1e-4


class LlamaAttentionInPlace(nn.Module):
    """transformers' Llama attention, scaled dot-product attention with rotations, with the weights of a `PldrAttention`."""

    def __init__(self, config: PldrConfig, attention: PldrAttention) -> None:
        super().__init__()
        settings = LlamaConfig(
            hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, attention_bias=True,
            num_key_value_heads=config.num_attention_heads, max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="sdpa",
        )  # fmt: skip
        self.attention = LlamaAttention(settings, attention.layer_idx)
        self.rotary = LlamaRotaryEmbedding(settings)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors = copy.deepcopy(getattr(attention, name).state_dict())
            if config.rope_pairing == "adjacent" and name in ("q_proj", "k_proj"):
                tensors = {key: self._halves(tensor, config.num_attention_heads) for key, tensor in tensors.items()}
            getattr(self.attention, name).load_state_dict(tensors)

    @staticmethod
    def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """[M, …] with each head's dimensions in Llama's order, whose pairs are i and i + D/2; scores do not see an order."""
        by_pair = tensor.unflatten(0, (heads, -1, 2))  # [H, D/2, 2, …]
        return by_pair.transpose(1, 2).reshape(tensor.shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        rotations = self.rotary(hidden_states, position_ids)
        output, weights = self.attention(hidden_states, rotations, attention_mask)
        return output, weights, None


def with_llama_attention(model: PldrForCausalLM) -> PldrForCausalLM:
    """A copy of the model, whatever its operator, with Llama's attention in the place of its own."""
    changed: Any = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.self_attn = LlamaAttentionInPlace(model.config, layer.self_attn).to(model.device, model.dtype)
    return changed.eval()


@torch.no_grad()
def sdpa(lab: Lab) -> Finding:
    """Logits of the model with constant operators against those of its weights under Llama's attention."""
    model, tokenizer = lab.learned_model("sdpa")
    ids = lab.passages(tokenizer, 4)
    expected = with_llama_attention(model)(ids, use_cache=False).logits
    D, generator = model.config.head_dim, torch.Generator().manual_seed(0)
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads, D, D)
    operators = {
        "identity": torch.eye(D).expand(shape),
        "identity, one dimension turned around": torch.diag(torch.tensor([-1.0] + [1.0] * (D - 1))).expand(shape),
        "random uniform": torch.rand(shape, generator=generator),
        "random normal": torch.randn(shape, generator=generator),
    }
    found = {}
    for name, G_LM in operators.items():
        logits = frozen_copy(model, G_LM=G_LM.to(model.device))(ids, use_cache=False).logits
        found[name] = float((logits - expected).abs().max())
    same = found["identity"]
    others = min(value for name, value in found.items() if name != "identity")
    holds = same <= _ROUNDING and others >= 1000 * _ROUNDING
    return Finding(
        "Ordinary attention is the special case G_LM = identity",
        Verdict.CONFIRMED if holds else Verdict.NOT_CONFIRMED,
        f"with the identity, logits are those of transformers' LlamaAttention with the same weights to {same:.1e}; with every other "
        f"operator they differ by at least {others:.1e}",
        [
            f"The largest difference of any logit, {len(ids)} passages of {ids.shape[1]} tokens, between the model with each constant "
            "operator and the same model whose attention is Llama's (SDPA, rotations of two halves; queries and keys permuted to them). "
            f"Its logits lie between {float(expected.min()):.1f} and {float(expected.max()):.1f}.",
            table(["G_LM", "largest difference of a logit"], [[name, f"{value:.1e}"] for name, value in found.items()]),
        ],
        {"largest_difference": found},
        subject=lab.model.name,
    )
