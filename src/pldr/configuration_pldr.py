"""PldrConfig: the shape of a PLDR-LLM, and the presets of the published models."""

import math
from difflib import get_close_matches
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from pldr.layouts import hub_fields_to_ours

# The cache layer that keeps K, V and the operator's state together: see cache.py.
PLGA_LAYER_TYPE = "power_law_graph_attention"

OPERATORS = ("learned", "constant", "factored")
OPERATOR_INITS = ("identity", "uniform", "normal", "external")
ROPE_PAIRINGS = ("adjacent", "halves")
INITIALIZATIONS = ("v51", "v52")
# Of weights.
DTYPES = ("float32", "bfloat16", "float16", "float64")
# By any other name transformers may fetch a kernel and run it; and by these, where the package of the name is not installed.
ATTENTIONS = ("eager", "sdpa", "flex_attention")
FLASH = {
    "flash_attention_2": ("flash_attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash_attn_interface", is_flash_attn_3_available),
}

_V51_110M = {"num_hidden_layers": 5, "num_attention_heads": 14, "hidden_size": 896, "intermediate_size": 2389}
_V51_104M = {"num_hidden_layers": 7, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 2048}
# Which predefined G each v51G model was trained with travels in its weights ("external"), as in its hub folder.
_V51G_106M = _V51_110M | {"operator": "constant", "operator_init": "external"}

# Shapes of the published checkpoints; what they do not name is PldrConfig's default. 104M's shape is inferred from the
# size of its published file. The v51-110M models differ in how they were trained, not in shape.
PRESETS: dict[str, dict[str, Any]] = {
    "v51-104M": _V51_104M,
    **{f"v51-110M-{i}": _V51_110M for i in range(1, 6)},
    "v51-DAG-110M": _V51_110M,
    **{f"v51G-106M-{i}": _V51G_106M for i in range(1, 4)},
    "v52-110M-1": _V51_110M | {"rope_pairing": "halves", "initialization": "v52"},
}


@strict
class PldrConfig(PreTrainedConfig):
    """Configuration of a PLDR-LLM; the defaults are the published 110M shape.

    Args:
        vocab_size: number of tokens, V.
        hidden_size: model width, M = heads · head_dim.
        intermediate_size: width F of the feed-forward GLU; ``None`` means ``floor(8/3 · hidden_size)``, as published.
        num_hidden_layers: number of decoder layers, L.
        num_attention_heads: number of heads, H.
        max_position_embeddings: context length in tokens; longer input is refused.
        hidden_act: activation of every GLU; only "silu", as published.
        layer_norm_eps: epsilon of every LayerNorm.
        rope_theta: base of the rotary embedding.
        rope_pairing: which dimensions of a head rotate together: "adjacent" pairs (v51, GPT-J) or the two "halves"
            (v52, GPT-NeoX).
        attention_dropout: dropout on attention weights during training.
        initialization: of weights that are not loaded, "v51" or "v52"; see `PldrPreTrainedModel`.
        operator: what produces G_LM: "learned" (a metric learner, from the queries), "constant" (a stored tensor) or
            "factored" (the product of two, in which queries and keys have fewer dimensions).
        operator_init: where the tensors of an operator that is not learned come from: "identity" (exactly scaled
            dot-product attention; factored, of the first dimensions alone), "uniform" (on [0, 1], as the published tensor
            that is called random normal is), "normal" (standard normal) or "external" (with
            the weights, or from `freeze` or `compress`).
        operator_trainable: whether those tensors are trainable parameters.
        operator_ranks: of a factored operator, the dimensions of queries and keys in each layer: multiples of 8.
        metric_learner_units: residual units R of the metric learner.
        metric_learner_glus: GLUs N in one residual unit.
        metric_learner_width: width F_A of those GLUs.
        use_cache: whether a forward keeps keys, values and G_LM for the next one.
        pad_token_id, bos_token_id, eos_token_id: token ids; the published tokenizer has 0 [PAD], 2 [START], 3 [END].

    The fields of the published hub layout (`A_dff`, `num_reslayerA`, `num_denseA`, `custom_G_type`, `reference_rope`,
    …) are understood and translated, so that `from_pretrained` reads a published config.json as it is.

    Raises:
        ValueError: a field that does not exist, or a value that the model does not support.
    """

    model_type = "pldrllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "deductive_outputs"]

    vocab_size: int = 32000
    hidden_size: int = 896
    intermediate_size: int | None = None
    num_hidden_layers: int = 5
    num_attention_heads: int = 14
    max_position_embeddings: int = 1024
    hidden_act: str = "silu"
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_pairing: str = "adjacent"
    attention_dropout: float = 0.0
    initialization: str = "v51"
    operator: str = "learned"
    operator_init: str = "identity"
    operator_trainable: bool = False
    operator_ranks: list[int] | None = None
    metric_learner_units: int = 8
    metric_learner_glus: int = 2
    metric_learner_width: int = 170
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        translated, kwargs = hub_fields_to_ours(kwargs)
        for name, value in translated.items():
            setattr(self, name, value)
        if self.operator_init == "random":  # in configurations written before there were two kinds
            self.operator_init = "normal"
        self._check_sizes()  # before anything is derived from them
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * 8 // 3
        if kwargs.pop("head_dim", self.head_dim) != self.head_dim:
            raise ValueError("PldrConfig: head_dim must be hidden_size / num_attention_heads")
        # Names a hub folder's own code, which is never run. Some clients look into it without asking whether it is there.
        self.auto_map: dict[str, str] = {}
        kwargs.pop("auto_map", None)
        labels = kwargs.get("num_labels")
        if labels is not None and not (type(labels) is int and 1 <= labels <= _MOST_LABELS):
            raise ValueError(f"PldrConfig: num_labels must be an integer from 1 to {_MOST_LABELS}, got {labels!r}")
        before = set(vars(self))
        unknown = sorted(_HUGGING_FACE_REFUSED & set(kwargs))
        if not unknown:
            super().__post_init__(**kwargs)
            # The base class turns any keyword into an attribute; a misspelt field would be ignored without a word.
            unknown = sorted((set(vars(self)) - before) & set(kwargs))
            unknown = [name for name in unknown if not name.startswith("_") and name not in _HUGGING_FACE_EXTRAS]
        if unknown:
            close = get_close_matches(unknown[0], [name for name in before if not name.startswith("_")], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"PldrConfig: unknown field(s) {', '.join(unknown)}{hint}")
        self._check_attention()
        self.validate_architecture()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PldrConfig":
        """The configuration of a published model, by its published name.

        Args:
            name: one of `PRESETS`, for example "v51-110M-1".
            overrides: fields to change.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is not a published model; choose one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        return fields if fields.get("auto_map") else {name: fields[name] for name in fields if name != "auto_map"}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache each layer needs, in transformers' terms: only a learned operator keeps a state."""
        kind = PLGA_LAYER_TYPE if self.operator == "learned" else "full_attention"
        return [kind] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """`layer_types` follows from `operator`; the library's list of types does not know ours."""

    def validate_architecture(self) -> None:
        """Run by the base class whenever the configuration is saved.

        At construction as well, before the base class would wrap the ValueError in an error of its own.
        """
        self._check_sizes()
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"PldrConfig: hidden_size ({self.hidden_size}) must be num_attention_heads "
                f"({self.num_attention_heads}) times an even head dimension"
            )
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype is not None and dtype not in DTYPES:
            raise ValueError(f"PldrConfig: dtype must be one of {DTYPES}, got {dtype}")
        for name, allowed in (("operator", OPERATORS), ("operator_init", OPERATOR_INITS),
                              ("rope_pairing", ROPE_PAIRINGS), ("initialization", INITIALIZATIONS),
                              ("hidden_act", ("silu",)), ("tie_word_embeddings", (False,))):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"PldrConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.operator_trainable and self.operator == "learned":
            raise ValueError("PldrConfig: operator_trainable applies to operator='constant' and 'factored' only")
        if self.operator == "factored" and self.operator_init == "uniform":
            raise ValueError(
                "PldrConfig: operator_init='uniform' applies to operator='constant' only; factor one (pldr compress)"
            )
        if (self.operator == "factored") != (self.operator_ranks is not None):
            raise ValueError("PldrConfig: operator_ranks must be given for operator='factored', and for no other")
        if self.operator_ranks is not None:
            self.check_ranks(self.operator_ranks)
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"PldrConfig: attention_dropout must be in [0, 1), got {self.attention_dropout}")
        for name in ("layer_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"PldrConfig: {name} must be positive and finite, got {getattr(self, name)}")

    def _check_attention(self) -> None:
        name = self._attn_implementation
        if name in FLASH:
            package, is_available = FLASH[name]
            if not is_available():
                raise ValueError(
                    f"PldrConfig: attn_implementation={name!r} needs the package {package} and a CUDA device"
                )
        elif name not in (None, *ATTENTIONS):
            raise ValueError(f"PldrConfig: attn_implementation must be one of {(*ATTENTIONS, *FLASH)}, got {name!r}")

    def check_ranks(self, ranks: list[int]) -> None:
        """
        Raises:
            ValueError: they can not be the ranks of a factored operator's layers.
        """
        if len(ranks) != self.num_hidden_layers:
            raise ValueError(
                f"PldrConfig: operator_ranks must have one rank for each of {self.num_hidden_layers} layers, got {len(ranks)}"
            )
        for rank in ranks:
            if isinstance(rank, bool) or rank % 8 or not 8 <= rank <= self.head_dim:
                raise ValueError(
                    f"PldrConfig: operator_ranks must be multiples of 8, from 8 to head_dim={self.head_dim}, got {rank}"
                )

    def _check_sizes(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"PldrConfig: {name} must be at least 1, got {value}")
            if value is not None and value > most:
                raise ValueError(f"PldrConfig: {name} must be at most {most:,}, got {value:,}")
        if self.max_position_embeddings * self.head_dim > _MOST_ROTARY:
            raise ValueError(
                f"PldrConfig: max_position_embeddings={self.max_position_embeddings:,} with head_dim={self.head_dim:,} makes "
                f"a rotary table of more than {_MOST_ROTARY:,} numbers"
            )


# The most that sizes may be, far above any model: a file that says more would fill the memory, or take for ever, before
# its tensors show that it is wrong.
_MOST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12, "max_position_embeddings": 1 << 24, "metric_learner_units": 1 << 12,
    "metric_learner_glus": 1 << 12, "metric_learner_width": 1 << 20,
}  # fmt: skip
# Numbers of the rotary table, which no stored tensor bounds: 512 MiB.
_MOST_ROTARY = 1 << 27

# Classes of a classifier, each of which gets a name of its own.
_MOST_LABELS = 1 << 16

# Keys of transformers' base class that a PLDR-LLM has no use for: layers of several shapes.
_HUGGING_FACE_REFUSED = frozenset({"per_layer_config"})
# Keys that transformers itself writes into config.json or passes along, beyond PreTrainedConfig's declared fields.
_HUGGING_FACE_EXTRAS = frozenset({"model_type", "transformers_version", "quantization_config", "torch_dtype",
                                  "finetuning_task", "task_specific_params", "is_causal", "num_labels",
                                  "classifier_dropout"})  # fmt: skip
