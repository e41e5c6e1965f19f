"""The two published checkpoint layouts, as tables: field names, tensor names, both ways. Nothing here reads a file.

*reference* is the layout of the published training code: a ``.pth`` with ``model_state_dict`` beside a
``*hyperparameters.py``. *hub* is the layout of the published Hugging Face repositories. Both name their tensors alike;
the hub keeps a predefined G_LM as one more tensor, the reference as a pickle beside the weights.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pldr.configuration_pldr import PldrConfig

# Names of files: of the weights, in one file or in several with an index; of the reference layout's two.
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
REFERENCE_WEIGHTS, REFERENCE_G = "model-checkpoint.pth", "predefined_G_LM.pkl"

# One row a kind of tensor: (ours, published), {} standing for a layer, unit or GLU index.
_LAYER = ("model.layers.{}", "decoder.dec_layers.{}")
_GLU = (("gate_proj", "gluw1"), ("up_proj", "gluw2"), ("down_proj", "gluw3"))
_POWER_LAW = (("metric_weight", "Wlst"), ("metric_bias", "blst"), ("exponent", "pwlst"),
              ("energy_weight", "alst"), ("energy_bias", "balst"))  # fmt: skip


def _layer_modules() -> list[tuple[str, str]]:
    operator, unit = "self_attn.operator", "mha1.reslayerAs.{}"
    return [
        ("self_attn.q_proj", "mha1.wq"),
        ("self_attn.k_proj", "mha1.wk"),
        ("self_attn.v_proj", "mha1.wv"),
        ("self_attn.o_proj", "mha1.dense"),
        ("post_attention_layernorm", "layernorm1"),
        ("post_feedforward_layernorm", "layernorm2"),
        *((f"mlp.{ours}", f"ffn.{theirs}") for ours, theirs in _GLU),
        (f"{operator}.input_norm", "mha1.layernorm1"),
        (f"{operator}.metric_learner.{{}}.norm", f"{unit}.layernormA"),
        *(
            (f"{operator}.metric_learner.{{}}.glus.{{}}.{ours}", f"{unit}.denseAs.{{}}.{theirs}")
            for ours, theirs in _GLU
        ),
    ]


# Templates of every tensor name. The rows are the single source for conversion and for `from_pretrained`.
TENSOR_NAMES: list[tuple[str, str]] = [
    ("model.embed_tokens.weight", "decoder.embedding.weight"),
    *((f"{ours}.{kind}", f"{theirs}.{kind}")
      for ours, theirs in [("model.embed_norm", "decoder.layernorm1"), ("lm_head", "final_layer")]
      for kind in ("weight", "bias")),
    *((f"{_LAYER[0]}.{ours}.{kind}", f"{_LAYER[1]}.{theirs}.{kind}")
      for ours, theirs in _layer_modules() for kind in ("weight", "bias")),
    *((f"{_LAYER[0]}.self_attn.operator.{ours}", f"{_LAYER[1]}.mha1.plgatt_layer.{theirs}")
      for ours, theirs in _POWER_LAW),
]  # fmt: skip
# Tensors of heads in place of `lm_head`: both layouts call them alike, as transformers does.
_HEAD_NAMES = {
    "ForSequenceClassification": ["score.weight"],
    "ForTokenClassification": ["score.weight", "score.bias"],
    "ForQuestionAnswering": ["qa_outputs.weight", "qa_outputs.bias"],
    "ForMultipleChoice": ["score.weight"],
}

OUR_G = "model.layers.{}.self_attn.operator.G_LM"
# [layers, 3, 1, heads, head_dim, head_dim]: A, A_LM and G_LM of each layer; attention reads the last alone.
HUB_G = "decoder.past_G_values"
HUB_G_STATUS = "decoder.past_G_values_status"
HUB_G_SLOT = 2


def _rename(names: Iterable[str], source: int) -> dict[str, str]:
    """Map each name in `names` through the table from column `source` to the other; unknown names are left out."""
    templates = {row[source]: row[1 - source] for row in TENSOR_NAMES}
    renamed = {}
    for name in names:
        parts = name.split(".")
        template = ".".join("{}" if part.isdigit() else part for part in parts)
        if template in templates:
            renamed[name] = templates[template].format(*(part for part in parts if part.isdigit()))
        elif any(name in names for names in _HEAD_NAMES.values()):
            renamed[name] = name
    return renamed


def head_of(config: "PldrConfig") -> str:
    """What stands on the decoder stack, as the class names of both layouts end: "ForCausalLM" by default."""
    named = (config.architectures or [""])[0]
    return next((head for head in _HEAD_NAMES if named in (f"Pldr{head}", f"Pldrllm{head}")), "ForCausalLM")


def published_to_ours(names: Iterable[str]) -> dict[str, str]:
    """Published tensor name → ours, for each name of the published layouts in `names`."""
    return _rename(names, source=1)


def ours_to_published(names: Iterable[str]) -> dict[str, str]:
    """Our tensor name → published, for each of our names in `names`."""
    return _rename(names, source=0)


def tensor_count(config: "PldrConfig") -> int:
    """How many tensors a model of this configuration has, without making it."""
    repeats = (config.num_hidden_layers, config.metric_learner_units, config.metric_learner_glus)
    counts = {ours: math.prod(repeats[: ours.count("{}")]) for ours, _ in TENSOR_NAMES}
    if (head := head_of(config)) in _HEAD_NAMES:
        counts = {ours: count for ours, count in counts.items() if not ours.startswith("lm_head")}
        counts |= dict.fromkeys(_HEAD_NAMES[head], 1)
    if config.operator == "learned":
        return sum(counts.values())
    kept = sum(count for ours, count in counts.items() if ".operator." not in ours)
    return kept + config.num_hidden_layers * (2 if config.operator == "factored" else 1)


# --- configuration fields -------------------------------------------------------------------------------------------

# Both published layouts name the metric learner alike.
_METRIC_LEARNER = {"A_dff": "metric_learner_width", "num_reslayerA": "metric_learner_units",
               "num_denseA": "metric_learner_glus"}  # fmt: skip
# What the published model fixes: any other value describes a model that this library does not implement.
_HUB_FIXED = {"attention_bias": True, "glu_bias": True, "final_bias": True, "rope_scaling": None}
# Settings of the hub code's own run time, with no meaning here: its init scale for untrained weights, and whether it
# returns every attention tensor.
_HUB_RUNTIME = ("initializer_range", "output_pldr_attentions")


def hub_fields_to_ours(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `fields` into (our fields translated from the hub's, the rest untouched).

    Raises:
        ValueError: the hub fields describe a model that is not supported.
    """
    rest = dict(fields)
    ours: dict[str, Any] = {}
    for theirs, name in _METRIC_LEARNER.items():
        if theirs in rest:
            ours[name] = rest.pop(theirs)
    for name, value in _HUB_FIXED.items():
        if rest.get(name, value) != value:
            raise ValueError(f"{name}={rest[name]!r} is not supported: a PLDR-LLM has {name}={value!r}")
        rest.pop(name, None)
    if rest.pop("cache_first_G", False):
        raise ValueError(
            "cache_first_G=True is not supported: it gives every row and every later prompt the first one's G_LM; set it to "
            "false and make that G_LM a constant (pldr freeze MODEL DST --prompt TEXT)"
        )
    for name in _HUB_RUNTIME:
        rest.pop(name, None)
    if "reference_rope" in rest:
        ours["rope_pairing"] = "adjacent" if rest.pop("reference_rope") else "halves"
    if "custom_G_type" in rest:
        kind = rest.pop("custom_G_type")
        if kind not in (None, "identity", "random", "external"):
            raise ValueError(f"custom_G_type must be null, identity, random or external, got {kind!r}")
        # A hub folder with a predefined G_LM always carries the tensor, whatever it was first made from.
        init = "identity" if kind == "identity" else "external"
        ours |= {"operator": "learned"} if kind is None else {"operator": "constant", "operator_init": init}
    return ours, rest


def ours_to_hub_fields(config: "PldrConfig") -> dict[str, Any]:
    """The hub layout's config.json of a configuration, with the names that the published remote code reads.

    Raises:
        ValueError: a head that the published code does not have.
    """
    head = head_of(config)
    if head == "ForMultipleChoice":
        raise ValueError(f"--to hub: the published code has no class {head}")
    labels: dict[str, Any] = {}
    if head != "ForCausalLM":
        labels = {
            name: getattr(config, name, None) for name in ("id2label", "label2id", "problem_type", "classifier_dropout")
        }
    return {
        "architectures": [f"Pldrllm{head}"],
        "model_type": "pldrllm",
        **{theirs: getattr(config, ours) for theirs, ours in _METRIC_LEARNER.items()},
        **_HUB_FIXED,
        **{
            name: getattr(config, name)
            for name in ("attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
                         "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads",
                         "num_hidden_layers", "pad_token_id", "rope_theta", "tie_word_embeddings", "use_cache",
                         "vocab_size")
        },
        "initializer_range": 0.02,
        "output_pldr_attentions": False,
        "cache_first_G": False,
        "reference_rope": config.rope_pairing == "adjacent",
        "custom_G_type": None if config.operator == "learned" else "external",
        **{name: value for name, value in labels.items() if value is not None},
        # A field of ours, which the remote code does not read.
        **({"operator_trainable": True} if config.operator_trainable else {}),
    }  # fmt: skip


_HYPERPARAMETERS = {"num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
                    "dff": "intermediate_size", "input_vocab_size": "vocab_size",
                    "max_seq_len": "max_position_embeddings"}  # fmt: skip


def hyperparameters_to_ours(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration fields from a reference ``hpdict``. Without a metric learner in it, the operator is constant.

    Keys that only matter for training (learning rate, warm-up, paths …) are left out.

    Raises:
        ValueError: a key that the model needs is missing.
    """
    learned = "num_reslayerA" in hyperparameters
    wanted = _HYPERPARAMETERS | (_METRIC_LEARNER if learned else {})
    missing = sorted(set(wanted) - set(hyperparameters))
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    if hyperparameters.get("activation", "silu") != "silu":
        raise ValueError(f"activation must be F.silu, got {hyperparameters['activation']!r}")
    fields = {ours: hyperparameters[theirs] for theirs, ours in wanted.items()}
    fields |= {"operator": "learned"} if learned else {"operator": "constant", "operator_init": "external"}
    if "reference_rope" in hyperparameters:
        fields["rope_pairing"] = "adjacent" if hyperparameters["reference_rope"] else "halves"
    return fields | {name: hyperparameters[name] for name in _MARKS if name in hyperparameters}


# Numbers that the reference layout does not name because the published framework fixes them.
_REFERENCE_FIXED = {"rope_theta": 10000.0, "layer_norm_eps": 1e-6}
# What it does not name and does not need: written as further keys where it differs, which only this library reads.
_MARKS = {
    "attention_dropout": 0.0,
    "operator_trainable": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def ours_to_hyperparameters(config: "PldrConfig") -> dict[str, Any]:
    """A reference ``hpdict`` of a configuration. The published code knows adjacent-pair RoPE only; halves are marked.

    Raises:
        ValueError: a value that the published framework fixes to another.
    """
    if (head := head_of(config)) != "ForCausalLM":
        raise ValueError(f"--to reference: the published framework has no class {head}")
    for name, value in _REFERENCE_FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(f"--to reference: {name}={getattr(config, name)} can not be expressed there, only {value}")
    marks = {name: getattr(config, name) for name, value in _MARKS.items() if getattr(config, name) != value}
    table = _HYPERPARAMETERS | (_METRIC_LEARNER if config.operator == "learned" else {})
    fields = {theirs: getattr(config, ours) for theirs, ours in table.items()} | marks
    return fields if config.rope_pairing == "adjacent" else fields | {"reference_rope": False}
