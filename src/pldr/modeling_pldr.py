"""PLDR-LLM, tokens to logits. Importing this module registers `model_type` "pldrllm" with the Auto classes.

Shapes, here and in the comments below:

    B  sequences in the batch
    T  tokens of this forward
    S  tokens that attention sees: those of this forward, and those of the cache before them
    H  heads, L  layers, V  vocabulary
    D  dimensions of a head, M = H·D  width of the model; r  those of queries and keys with a factored operator
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from pldr import layouts
from pldr.batching import limit_requests
from pldr.cache import OperatorOnlyLayer, check_operator_cache, make_cache, operator_state, set_g_cache
from pldr.configuration_pldr import PldrConfig
from pldr.files import write_sums
from pldr.masks import create_masks, find_packed, positions_of
from pldr.operator import (
    ConstantOperator,
    DeductiveOutputs,
    FactoredOperator,
    GatedLinearUnit,
    LearnedOperator,
    init_constant,
    make_operator,
)
from pldr.ops import reference
from pldr.ops.cross_entropy import linear_cross_entropy
from pldr.ops.norm import add_norm
from pldr.ops.projections import project
from pldr.provenance import add_card
from pldr.registration import name_classes

_CACHE_DECIDES = "use_g_cache: the given past_key_values decides; choose with pldr.make_cache(g=…)"


@dataclass
class PldrModelOutput(BaseModelOutputWithPast):
    """What `PldrModel` returns.

    Attributes:
        last_hidden_state: [B, T, M].
        deductive_outputs: with `output_deductive_outputs=True`, one `DeductiveOutputs` a layer.
    """

    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None


@dataclass
class PldrCausalLMOutput(CausalLMOutputWithPast):
    """What `PldrForCausalLM` returns.

    Attributes:
        loss: mean cross-entropy in nats per target, where labels were given.
        accuracy: fraction of the targets that have the highest logit (ties count), where labels were given.
        logits: [B, T, V].
        deductive_outputs: with `output_deductive_outputs=True`, one `DeductiveOutputs` a layer.
    """

    accuracy: torch.Tensor | None = None
    deductive_outputs: tuple[DeductiveOutputs, ...] | None = None


class PldrAttention(nn.Module):
    """Power law graph attention: softmax((q G_LM) kᵀ / sqrt(D) + causal mask) v."""

    def __init__(self, config: PldrConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.rope_pairing = config.rope_pairing
        # What transformers' attention functions read from the module.
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = ValueProjection(config.hidden_size, config.hidden_size)
        self.operator = make_operator(config, layer_idx)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, T, M]
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cos and sin, each [B or 1, 1, T, D/2]
        attention_mask: torch.Tensor | None,  # [B or 1, 1, T, S]
        padding_mask: torch.Tensor | None,  # [B, T]
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, DeductiveOutputs]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = project(hidden_states, layers, position_embeddings, self.head_dim, self.rope_pairing)
        state = operator_state(past_key_values, self.layer_idx)
        query, key, deductive = self.operator(query, key, padding_mask, state)  # q G_LM and k, each [B, H, T, D or r]

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, D or r] and [B, H, S, D]

        # A cache of pages has one width for keys and values, and so has FlashAttention; zeros add nothing to scores.
        if key.shape[-1] < self.head_dim and ("cache" in kwargs or is_flash_attention_requested(self.config)):
            query, key = (F.pad(x, (0, self.head_dim - x.shape[-1])) for x in (query, key))

        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # [B, T, H, D], and [B, H, T, S] where the implementation has them
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))  # [B, T, M]
        return output, weights, deductive


class ValueProjection(nn.Linear):
    """A linear of its own name, because the published training code initialises it in its own way."""


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, H, T, D or r]
    key: torch.Tensor,  # [B, H, S, D or r]
    value: torch.Tensor,  # [B, H, S, D]
    attention_mask: torch.Tensor | None,  # additive, [B or 1, 1, T, S]
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as written in the paper, with its weights; the other implementations are transformers' own."""
    scores = query @ key.transpose(-1, -2) * scaling  # [B, H, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)  # [B, H, T, S]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # [B, T, H, D], [B, H, T, S]


class PldrDecoderLayer(GradientCheckpointingLayer):
    """h = LayerNorm(attention(h) + h); h = LayerNorm(GLU(h) + h)."""

    def __init__(self, config: PldrConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PldrAttention(config, layer_idx)
        assert config.intermediate_size is not None  # set by the configuration
        self.mlp = GatedLinearUnit(config.hidden_size, config.intermediate_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_feedforward_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states, rounded = add_norm(attended, hidden_states, self.post_attention_layernorm, rounded=True)
        return add_norm(self.mlp(rounded), hidden_states, self.post_feedforward_layernorm)[0]


class RotaryEmbedding(nn.Module):
    """cos and sin of position · base^(-2i/D) for every position of the context, always float32.

    A table, because a compiler would otherwise work out sines anew in each kernel that rotates something.
    """

    table: torch.Tensor

    def __init__(self, config: PldrConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> torch.Tensor:
        """[2, context, D/2]: cos and sin."""
        steps = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        positions = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)
        angles = positions[:, None] * (1.0 / self.config.rope_theta**steps)
        return torch.stack((angles.cos(), angles.sin()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32 and not self.table.is_meta:  # the model went to another dtype
            self.table = self.compute().to(self.table.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B or 1, T] → cos and sin, [B or 1, 1, T, D/2]."""
        cos, sin = self.table[:, position_ids][:, :, None]
        return cos, sin


class PldrPreTrainedModel(PreTrainedModel):
    """What every PLDR-LLM class shares: initialisation, and how it is loaded and saved."""

    config: PldrConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PldrDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PldrDecoderLayer,
        "attentions": OutputRecorder(PldrAttention, index=1),
        "deductive_outputs": OutputRecorder(PldrAttention, index=2),
    }
    # The hub layout marks which layers of its predefined G_LM are set; a folder that is published has all of them.
    _keys_to_ignore_on_load_unexpected = [r"past_G_values_status"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation: of the training code (v51), or of the hub port (v52).

        Linears Xavier-uniform with zero bias; the embedding N(0, 1). W, p and a Xavier on the 3-D tensor, b and b_a zero.
        v51 leaves the value projection at PyTorch's default, and draws W, p and a from normal distributions.

        Raises:
            ValueError: the configuration says that G_LM comes with the weights, and it did not.
        """
        is_v51 = self.config.initialization == "v51"
        if isinstance(module, ValueProjection) and is_v51:
            bound = 1.0 / math.sqrt(module.in_features)  # nn.Linear's default, for weight and bias alike
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:  # a head may have none, and a client's own linear
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LearnedOperator):
            for weight in (module.metric_weight, module.exponent, module.energy_weight):
                (init.xavier_normal_ if is_v51 else init.xavier_uniform_)(weight)
            for bias in (module.metric_bias, module.energy_bias):
                init.zeros_(bias)
        elif isinstance(module, (ConstantOperator, FactoredOperator)):
            has_weights = any(getattr(tensor, "_is_hf_initialized", False) for tensor in self.parameters())
            init_constant(module, self.config, has_weights=has_weights)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.table, module.compute())

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save in this library's layout, also after loading a published one, with the SHA-256 of each weight file.

        The sums let `pldr.load_model` tell a damaged file; ``sha256sum -c SHA256SUMS`` reads them too.
        """
        try:
            super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{save_directory}: the weights could not be written ({error})") from None
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            weights = list(folder.glob("*.safetensors"))
            for file in weights:  # which are written for their owner alone
                shutil.copymode(folder / "config.json", file)
            write_sums(folder, weights)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """What `push_to_hub` does last: here with a card that says what the model is, and its certificate."""
        source = Path(self.name_or_path) if self.name_or_path else None
        add_card(Path(working_dir), repo_id, self.config, self.state_dict(), source)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


class PldrModel(PldrPreTrainedModel):
    """The decoder stack: token ids to hidden states."""

    def __init__(self, config: PldrConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # A Python number, so that under autocast the embedding keeps its dtype.
        self.embed_scale = math.sqrt(config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_embedding = RotaryEmbedding(config)
        self.layers = nn.ModuleList(PldrDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        use_g_cache: bool | None = None,
        **kwargs: Any,
    ) -> PldrModelOutput:
        """
        Args:
            input_ids: [B, T].
            attention_mask: [B, S] over earlier and new tokens, zero at padding; further columns (a mask as long as a
                static cache) are not looked at. A prepared mask is taken as it is: [B, 1, T, S] (then no token
                counts as padding for G_LM), or the dict that `create_masks_for_generate` makes.
            position_ids: [B, T]; by default counted over the tokens that are not padding. Unlike in ordinary attention
                they matter absolutely, not only through differences: G_LM sits between the two rotations. Where they begin
                anew within a row, and neither a mask nor a cache is given, a row holds several sequences, none of which sees
                another; nothing is cached then, and a learned operator's recorded outputs have one sequence a row.
            past_key_values: cache of earlier tokens; see `pldr.make_cache`.
            inputs_embeds: [B, T, M], in place of `input_ids`, before the scaling by sqrt(M).
            use_cache: make a cache where none is given.
            use_g_cache: whether that cache keeps G_LM; the same as `use_cache` by default.
            output_deductive_outputs, output_hidden_states, output_attentions: what else to return.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; a sequence longer than the context length; a
                mask that leaves out earlier tokens; a cache without a place for G_LM, or of another batch.
        """
        hidden_states = self._embedded(input_ids, inputs_embeds)
        packed = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            packed = find_packed(self.config, position_ids, len(hidden_states))
        if packed is None:
            past_key_values = self._cache_for(past_key_values, use_cache, use_g_cache)
        elif position_ids is not None and packed.apart:
            attention_mask = packed.one_a_row(torch.ones_like(packed.place))
            hidden_states, position_ids = packed.one_a_row(hidden_states), packed.one_a_row(position_ids)
        given = position_ids
        position_ids = positions_of(self.config, hidden_states, attention_mask, past_key_values, given)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:  # with the positions as given: to look for packed ones in those counted here is to wait for the device
            masks = create_masks(self.config, hidden_states, attention_mask, past_key_values, given)
        if self.config.operator == "learned" and past_key_values is not None:
            check_operator_cache(past_key_values, self.config.num_hidden_layers, hidden_states.shape[0])

        hidden_states = self.embed_norm(hidden_states * self.embed_scale)  # [B, T, M]
        position_embeddings = self.rotary_embedding(position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer, where a draft exits early
            hidden_states = layer(
                hidden_states, position_embeddings=position_embeddings, attention_mask=masks["attention"],
                padding_mask=masks["padding"], past_key_values=past_key_values, position_ids=position_ids, **kwargs,
            )  # fmt: skip
        if packed is not None and packed.apart:
            hidden_states = packed.as_given(hidden_states)
        return PldrModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _embedded(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _cache_for(self, given: Cache | None, use_cache: bool | None, use_g_cache: bool | None) -> Cache | None:
        """The cache that was given, or a new one where one is asked for."""
        if given is not None and use_g_cache is not None:
            raise ValueError(_CACHE_DECIDES)
        if given is None and (use_cache or use_g_cache):
            return make_cache(self.config, kv=bool(use_cache), g=use_g_cache is not False)
        return given


class LanguageModelHead(nn.Linear):
    """Hidden states to logits; or, given targets, straight to the summed loss and the number of right guesses.

    Both within one module's forward, which is where sharded training (FSDP) gathers the weights.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, self.bias, targets)


class PldrForCausalLM(PldrPreTrainedModel, GenerationMixin):
    """PLDR-LLM with its language-model head.

    `generate` takes `use_cache` (keys and values) and `use_g_cache` (G_LM; the same as `use_cache` by default), which
    together give the published implementation's four modes.
    """

    def __init__(self, config: PldrConfig) -> None:
        super().__init__(config)
        self.model = PldrModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        use_g_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PldrCausalLMOutput:
        """
        Args:
            labels: [B, T], the same ids as `input_ids` (the shift by one happens here); -100 is left out of the mean.
                Where nothing is left, loss and accuracy are 0. The last target is an input then, and enters a learned G_LM.
            shift_labels: [B, T], the target of each position, in place of `labels`: of a row of T + 1 tokens all but the
                first, where `input_ids` are all but the last, as in training.
            logits_to_keep: number of last positions to compute logits for, or their indices; 0 means all.
            return_logits: False computes the loss without ever holding all logits (they are then None in the output).
            num_items_in_batch: what to divide the summed loss by, in place of the number of targets, where a batch is
                accumulated over several forwards.
            the others: see `PldrModel.forward`.

        Raises:
            ValueError: a loss together with `logits_to_keep`; and those of `PldrModel.forward`.
        """
        targets = shift_labels
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=reference.IGNORED_TARGET)[:, 1:]
        if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep: the loss needs the logits of every position; leave it out beside labels")
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, use_g_cache=use_g_cache,
            **kwargs,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state  # [B, T, M]
        logits = loss = accuracy = None
        if return_logits or targets is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])  # [B, T or what is kept, V]
        if targets is not None:
            loss, accuracy = self._loss_and_accuracy(hidden_states, logits, targets.flatten(), num_items_in_batch)
        return PldrCausalLMOutput(
            loss=loss, accuracy=accuracy, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
            deductive_outputs=outputs.deductive_outputs,
        )  # fmt: skip

    def _loss_and_accuracy(
        self,
        hidden_states: torch.Tensor,  # [B, T, M]
        logits: torch.Tensor | None,  # [B, T, V]; None: the head computes the loss without ever holding them all
        targets: torch.Tensor,  # [B·T]
        num_items_in_batch: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits is None:
            total, correct = self.lm_head(hidden_states.flatten(0, 1), targets)
        else:
            flat = logits.float().flatten(0, 1)  # [B·T, V]
            total = F.cross_entropy(flat, targets, reduction="sum")
            correct = reference.right_guesses(flat.detach(), targets)
        # A batch without targets counts nothing: its loss and gradient are 0, not 0/0.
        count = (targets != reference.IGNORED_TARGET).sum().clamp(min=1)
        items = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
        return total / items, correct / count

    @staticmethod
    def create_masks_for_generate(
        config: PldrConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """Called by `generate` once per step for static caches, outside the compiled forward."""
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        kv = generation_config.use_cache is not False
        use_g_cache = model_kwargs.pop("use_g_cache", None)
        g = kv if use_g_cache is None else use_g_cache
        cache = model_kwargs.get("past_key_values")
        if self.config.operator == "learned":
            # The first forward would not be the prompt, so that the wrong G_LM would be kept; or none could be.
            quantized = generation_config.cache_implementation == "quantized"
            chunked = generation_config.prefill_chunk_size is not None
            for name, given, why in (
                ("prefill_chunk_size", chunked, "needs the whole prompt at once"),
                ("cache_config", generation_config.cache_config is not None, "has no place in a quantized cache"),
                ("cache_implementation='quantized'", quantized, "has no place in a quantized cache"),
            ):
                if given:
                    raise ValueError(
                        f"{name}: a learned G_LM {why}; freeze the model first (pldr.freeze), or leave the setting out"
                    )
        context, static = self.config.max_position_embeddings, generation_config.cache_implementation == "static"
        if static and generation_config.max_length > context:
            raise ValueError(
                f"max_length={generation_config.max_length} is longer than the context length "
                f"max_position_embeddings={context}"
            )
        if cache is not None:
            if use_g_cache is not None:
                raise ValueError(_CACHE_DECIDES)
            if kv and any(isinstance(layer, OperatorOnlyLayer) for layer in cache.layers):
                raise ValueError("past_key_values: this cache keeps no keys and values; pass use_cache=False as well")
        elif not kv:
            only_g = make_cache(self.config, kv=False, g=g)
            if only_g is not None:
                model_kwargs["past_key_values"] = only_g
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if use_g_cache is not None:
            set_g_cache(model_kwargs["past_key_values"], g)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self.config.operator == "learned" and cache is not None and cache.get_seq_length() == 0:
            # The first forward will hold guessed tokens as well, which must not enter G_LM: it is the prompt's.
            mask = kwargs.get("attention_mask")
            self(input_ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            cache.crop(-input_ids.shape[1])
            for layer in cache.layers:  # emptied, it would be computed anew
                layer.has_operator_state = True
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `ContinuousBatchingManager`, which `generate_batch` and `transformers serve` use as well.

        Raises:
            ValueError: a learned operator.
        """
        if self.config.operator == "learned":
            raise ValueError(
                "continuous batching: packs requests into one row, and a learned G_LM would be that of them all; freeze the "
                "model first (pldr.freeze), or use pldr.Engine, which keeps a G_LM for each request"
            )
        return limit_requests(super().init_continuous_batching(*args, **kwargs), self.config.max_position_embeddings)


# --- registration ---------------------------------------------------------------------------------------------------


class _PublishedNames(WeightRenaming):
    """The table of published tensor names, in the form that transformers' loader asks for."""

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = layouts.published_to_ours([source_key]).get(source_key)
        if renamed is not None:
            self._was_used = True  # the loader asks which transforms a checkpoint needed
        return renamed or source_key, None


class _UnpackPredefinedG(ConversionOps):
    """The hub layout's `decoder.past_G_values` [L, 3, 1, H, D, D] into one G_LM a layer; only read, never written."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (packed,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        name = layouts.OUR_G.removeprefix("model.") if isinstance(model, PldrModel) else layouts.OUR_G
        return {name.format(i): layer[layouts.HUB_G_SLOT, 0].clone() for i, layer in enumerate(packed)}


register_checkpoint_conversion_mapping(
    "pldrllm",
    [
        # The patterns only say which keys may match; the table decides.
        _PublishedNames(r"^(decoder|final_layer)\.", "model."),
        WeightConverter(f"{layouts.HUB_G}$", layouts.OUR_G.format(0), operations=[_UnpackPredefinedG()]),
    ],
)
AutoConfig.register("pldrllm", PldrConfig, exist_ok=True)
AutoModel.register(PldrConfig, PldrModel, exist_ok=True)
AutoModelForCausalLM.register(PldrConfig, PldrForCausalLM, exist_ok=True)
name_classes()  # in the module that there is now: transformers makes it twice
