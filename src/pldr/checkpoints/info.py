"""Facts about a model: shape, parameters, operators, cache sizes, and what its certificate says."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType

from pldr.checkpoints.certificate import is_about, read_certificate
from pldr.checkpoints.hub import local_path
from pldr.checkpoints.load import load_model
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tables import Printable, facts_view


@dataclass(frozen=True)
class Info(Printable):
    """What `info` shows.

    Attributes:
        facts: see `model_facts`; and where a certificate lies beside the model, "certificate", and "certified_weights":
            whether it is about these weights.
    """

    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.facts

    def __rich__(self) -> RenderableType:
        return facts_view(self.facts)


def info(
    model: str | os.PathLike[str] | PldrForCausalLM,
    *,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
) -> Info:
    """Shape, parameters, operators and cache sizes, as `pldr info` shows them.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model.
        rope, g_lm: see `pldr.load_model`.

    Raises:
        ValueError, OSError: see `pldr.load_model`; a damaged certificate.
    """
    if isinstance(model, PldrForCausalLM):
        return Info(model_facts(model))
    path = local_path(model)
    loaded = load_model(path, rope=rope, g_lm=g_lm)
    facts = model_facts(loaded)
    certificate = read_certificate(path)
    if certificate is not None:
        facts |= {"certificate": certificate, "certified_weights": is_about(certificate, loaded.state_dict())}
    return Info(facts)


def model_facts(model: PldrForCausalLM) -> dict[str, Any]:
    """Shape, parameter counts, operator kinds and cache sizes of a model, as plain numbers.

    Returns:
        `parameters` in all and by part; `operators`, how many layers have each kind; `kv_cache_bytes_per_token` and
        `g_cache_bytes_per_sequence` in the model's dtype (only a learned operator needs a G-cache; the keys of a factored
        one are smaller).
    """
    config = model.config
    decoder: Any = model.model
    operators = [layer.self_attn.operator for layer in decoder.layers]
    operator = _parameters(*operators)
    parts = {
        "embedding": _parameters(decoder.embed_tokens, decoder.embed_norm),
        "attention": sum(_parameters(x.self_attn, x.post_attention_layernorm) for x in decoder.layers) - operator,
        "operator": operator,
        "feed_forward": sum(_parameters(x.mlp, x.post_feedforward_layernorm) for x in decoder.layers),
        "head": _parameters(model.lm_head),
    }
    size = torch.empty(0, dtype=model.dtype).element_size()
    layers, heads, head_dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    state = layers * heads * head_dim**2
    # Of one token in one head: its key in each layer.
    keys = sum(config.operator_ranks or [head_dim] * layers)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
              "max_position_embeddings", "rope_pairing", "operator", "operator_init", "operator_trainable", "operator_ranks",
              "metric_learner_units", "metric_learner_glus", "metric_learner_width")  # fmt: skip
    learned = config.operator == "learned"
    skipped = "operator_" if learned else "metric_learner_"
    shown = {name: getattr(config, name) for name in fields if not name.startswith(skipped)}
    return {
        "parameters": model.num_parameters(),
        "parameters_by_part": parts,
        # A fixed G_LM, or its factors, are buffers; trainable ones are among the parameters.
        "constant_operator_values": sum(buffer.numel() for operator in operators for buffer in operator.buffers()),
        "operators": {config.operator: layers},
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_bytes_per_token": heads * (keys + layers * head_dim) * size,
        "g_cache_bytes_per_sequence": state * size if learned else 0,
        "config": {name: value for name, value in shown.items() if value is not None},
    }


def _parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
