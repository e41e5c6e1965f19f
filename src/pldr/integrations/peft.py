"""PEFT: which layers of a PLDR-LLM get adapters, by name, and prefixes in a cache that has a place for G_LM.

What PEFT is not told it looks up by model type, in tables. `register` writes ours into them, once both libraries are imported.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from pldr.cache import DynamicPlgaLayer
from pldr.configuration_pldr import PldrConfig

_LINEAR = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_FEED_FORWARD = [f"mlp.{name}" for name in _LINEAR]
_POWER_LAW = ("metric_weight", "metric_bias", "exponent", "energy_weight", "energy_bias")
SETS = ("attention", "feed-forward", "operator", "power-law")


def targets(config: PldrConfig, *names: str) -> dict[str, list[str]]:
    """What a `peft.LoraConfig` is to adapt: `LoraConfig(**targets(model.config, "operator"))`.

    Args:
        config: the model's configuration.
        names: sets of weights. "attention" and "feed-forward" by default, which is also what PEFT takes where it is told
            nothing. "operator": of a learned one the layers of its metric learner, of a trainable constant G_LM, of a trainable
            factored one both factors. "power-law": the tensors of a learned one that follow the metric learner. A tensor of
            [heads, D, D] gets an adapter of rank r for each head.

    Returns:
        "target_modules" and "target_parameters", of `LoraConfig`.

    Raises:
        ValueError: another name; a set that the operator does not have; or both sets of a learned operator.
    """
    chosen = set(names or ("attention", "feed-forward"))
    if unknown := sorted(chosen.difference(SETS)):
        raise ValueError(f"targets: {unknown[0]!r} is not a set of weights; choose from {', '.join(SETS)}")
    if chosen >= {"operator", "power-law"}:
        raise ValueError(
            "targets: PEFT does not merge layers that lie in a module whose tensors it adapts; choose operator or power-law"
        )
    modules = _ATTENTION * ("attention" in chosen) + _FEED_FORWARD * ("feed-forward" in chosen)
    tensors: tuple[str, ...] = ()
    if config.operator == "learned":
        if "operator" in chosen:
            modules += [f"glus.{index}.{linear}" for index in range(config.metric_learner_glus) for linear in _LINEAR]
        tensors = _POWER_LAW if "power-law" in chosen else ()
    elif "power-law" in chosen:
        raise ValueError(f"targets: power-law is a set of learned operators; this one is {config.operator}")
    elif "operator" in chosen:
        if not config.operator_trainable:
            raise ValueError(
                "targets: the operator is a constant that is not trained; make it a parameter first, with "
                "pldr.freeze(model, …, trainable=True)"
            )
        tensors = ("left", "right") if config.operator == "factored" else ("G_LM",)
    return {"target_modules": modules, "target_parameters": [f"operator.{name}" for name in tensors]}


def register(constants: Any) -> None:
    """Write our names into the tables of `peft.utils.constants`. Running it again changes nothing."""
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for name, table in vars(constants).items():
        # Other methods that adapt the linear layers which LoRA does have copies of its table.
        if name.endswith("_TARGET_MODULES_MAPPING") and table.get("llama") == lora["llama"]:
            table["pldrllm"] = _ATTENTION + _FEED_FORWARD
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING["pldrllm"] = prefix_cache


def prefix_cache(prefixes: Sequence[torch.Tensor]) -> Cache:
    """A prefix of keys and values, of each layer [2, B, H, N, D], as a cache.

    A prefix has no queries, so that a learned G_LM is that of the tokens behind it, as without a prefix.
    """
    cache = Cache(layers=[DynamicPlgaLayer() for _ in prefixes])
    for index, (keys, values) in enumerate(prefixes):
        cache.update(keys, values, index)
    return cache
