"""TransformerLens: our models in its bridge, found by the entry point `transformer_lens.architectures`.

    bridge = pldr.integrations.lens.bridge(pldr.load_model(folder), pldr.load_tokenizer(folder))
    logits, cache = bridge.run_with_cache(ids)
    cache["blocks.0.attn.operator.hook_G"]  # [B or 1, H, D, D]

(`TransformerBridge.boot_transformers` of release 4.3 asks its own list of architectures, and not that of the entry points.)

Beside TransformerLens' own names (`hook_q`, `hook_attn_scores`, `hook_pattern`, `hook_z` …) the operator has `hook_q` and `hook_k`,
which it is given after rotation, and `hook_G`. What a hook returns is what the model goes on with. Layers are normalised behind
their sums: `ln1` behind attention, `ln2` behind the feed-forward block, and no norm stands before the head.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from pldr.cache import operator_state
from pldr.modeling_pldr import PldrForCausalLM
from pldr.ops import reference


def bridge(model: PldrForCausalLM, tokenizer: Any = None) -> TransformerBridge:
    """A model in TransformerLens' bridge, which takes it over: its modules are wrapped in place, its attention is eager."""
    config = model.config
    model.set_attn_implementation("eager")
    settings = TransformerBridgeConfig(
        d_model=config.hidden_size, d_head=config.head_dim, n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers, n_ctx=config.max_position_embeddings, d_vocab=config.vocab_size,
        d_mlp=config.intermediate_size, act_fn="silu", architecture="PldrForCausalLM", dtype=model.dtype, eps=config.layer_norm_eps,
        device=str(model.device),
    )  # fmt: skip
    ArchitectureAdapterFactory.register_adapter("PldrForCausalLM", PldrArchitectureAdapter)
    return TransformerBridge(model, ArchitectureAdapterFactory.select_architecture_adapter(settings), tokenizer)


class OperatorBridge(GeneralizedComponent):
    """An operator, with hooks on rotated queries and keys, [B, H, T, D], and on G_LM, [B or 1, H, D, D]."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.hook_q, self.hook_k, self.hook_G = HookPoint(), HookPoint(), HookPoint()

    def forward(self, query: torch.Tensor, key: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        query, key = self.hook_q(query), self.hook_k(key)
        assert self.original_component is not None
        multiplied, attended, deductive = self.original_component(query, key, *args)
        G_LM = self.hook_G(deductive.G_LM)
        if G_LM is not deductive.G_LM:  # a factored operator's keys are whole again, too
            multiplied, attended, deductive = query @ G_LM.to(query.dtype), key, deductive._replace(G_LM=G_LM)
        return multiplied, attended, deductive


class PldrAttentionBridge(AttentionBridge):
    """`pldr.modeling_pldr.PldrAttention`, eager, with hooks on scores and weights."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        attention: Any = self.original_component
        hidden_states = self.hook_in(hidden_states)
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (reference.apply_rotary(x, *position_embeddings, attention.rope_pairing) for x in (query, key))
        state = operator_state(past_key_values, attention.layer_idx)
        query, key, deductive = attention.operator(query, key, padding_mask, state)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        scores = query @ key.transpose(-1, -2) * attention.scaling
        scores = self.hook_attn_scores(scores if attention_mask is None else scores + attention_mask)
        pattern = self.hook_pattern(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
        output = (pattern @ value).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.hook_out(attention.o_proj(output)), pattern, deductive


class PldrArchitectureAdapter(ArchitectureAdapter):
    """Which of our modules is what in TransformerLens' terms."""

    supports_fold_ln = False  # norms stand behind the sums, where there is nothing to fold them into

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = "LN"
        self.cfg.positional_embedding_type = "rotary"
        self.cfg.gated_mlp = True
        self.cfg.final_rms = False
        self.weight_processing_conversions = self._qkvo_weight_conversions(include_biases=True)
        attention = {name: LinearBridge(name=f"{name}_proj") for name in "qkvo"}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "embed_ln": NormalizationBridge(name="model.embed_norm", config=self.cfg),
            "blocks": BlockBridge(
                name="model.layers",
                config=self.cfg,
                hook_alias_overrides={"hook_resid_mid": "mlp.hook_in"},  # behind the first norm, not before the second
                submodules={
                    "attn": PldrAttentionBridge(
                        name="self_attn",
                        config=self.cfg,
                        submodules={**attention, "operator": OperatorBridge(name="operator")},
                    ),
                    "ln1": NormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                    "mlp": self._gated_mlp(),
                    "ln2": NormalizationBridge(name="post_feedforward_layernorm", config=self.cfg),
                },
            ),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }
