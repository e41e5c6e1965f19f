"""Training recipes: YAML, parsed into typed dataclasses. Every key is checked; a wrong one is named with its place."""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any

from pldr.files import one_line

# The deductive outputs that the DAG loss is about.
DAG_TENSORS = ("A_LM", "A_P", "G_LM")


@dataclass
class ModelRecipe:
    """What to train.

    Attributes:
        preset: a published model's name; its shape is the starting point.
        config: fields of PldrConfig that differ from the preset or the defaults.
        G_LM: a predefined operator for operator="constant": a file (.safetensors or .pkl), or a folder with a model
            that has a constant one.
    """

    preset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    G_LM: str | None = None


@dataclass
class DataRecipe:
    """What to train on.

    Attributes:
        train, validation, test: any of: paths or glob patterns of text files (one document a file), JSON lines
            (``.jsonl``) and Parquet (``.parquet``), the first two also compressed (.gz, .xz, .zst);
            "hub:owner/name" or "hub:owner/name:configuration", a data set of the Hugging Face hub;
            "pydoc-topics:train" and "pydoc-topics:validation", the language reference that every Python carries.
        train_split, validation_split, test_split: splits of hub data sets.
        train_interval, validation_interval, test_interval: which documents, "start:stop" by index or percent
            ("0:16000000", "98%:99%"); "" for all.
        validation_rows: most validation sequences that an evaluation looks at, None for all.
        hold_out: where there is no validation data, the last so many of the training sequences, as a fraction.
        text_column: of JSON lines, Parquet files and hub data sets.
        tokenizer: a model folder or SentencePiece file; None trains one on the training text.
        vocab_size: pieces of a newly trained tokenizer.
        sequence_length: tokens that the model reads at once in training; a full row of data has one more, its last target.
        layout: "packed": documents one after another, [END] between them, sequences cut where they are full.
            "padded": so within groups of 3,200 documents, the last sequence of a group filled with [PAD];
            "unpadded": the same, that sequence left short.
        streaming: tokenise the training data as it is read, again in every pass, rather than once into the cache.
        shuffle_buffer: documents that a streamed pass is mixed through, fewer where they are long (64 million
            characters at most are held); 0 keeps their order. Data that is not streamed is shuffled as a whole.
        workers: processes that load data beside each training process.
        strict: refuse bad rows (no text, empty, not valid UTF-8, longer than 32 MiB) rather than skip and count them.
        cache: folder for tokenised data; None for $PLDR_CACHE or ~/.cache/pldr.
    """

    train: list[str]
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    train_interval: str = ""
    validation_interval: str = ""
    test_interval: str = ""
    validation_rows: int | None = None
    hold_out: float = 0.0
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 32000
    sequence_length: int = 1024
    layout: str = "packed"
    streaming: bool = False
    shuffle_buffer: int = 20000
    workers: int = 0
    strict: bool = False
    cache: str | None = None

    @property
    def row_length(self) -> int:
        """Tokens of a full row: all but the last are read, all but the first are targets."""
        return self.sequence_length + 1


@dataclass
class OptimizationRecipe:
    """How to train: AdamW with linear warm-up and a cosine to a floor. The defaults are the published framework's.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per step on each process, before accumulation.
        accumulation: batches that one step sums over.
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up.
        final_rate: floor of the cosine, as a fraction of the peak.
        weight_decay, beta1, beta2, epsilon: AdamW's; decay is applied to every parameter, as published.
        clip_value: bound on every element of the gradient (published), or None.
        clip_norm: bound on the gradient's norm, or None.
        precision: "fp32" or "bf16" (autocast).
        compile: run the decoder layers through torch.compile, all with the same graph.
        cuda_graph: "auto": a step's forward, backward and optimiser run as CUDA graphs where there is one process with a GPU, and
            neither accumulation, gradient checkpointing nor a DAG loss; or "never".
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        dag_A_LM, dag_A_P, dag_G_LM: coefficients of the DAG loss of each deductive output, added to the cross-entropy
            (0.05 each in v51-DAG); they need a learned operator.
        handoff_step: after this many steps the learned operator, evaluated on held-out passages, becomes a trainable
            constant and its network is dropped; None keeps the network.
        skip_nonfinite: how many steps in a row whose loss or gradients are NaN or infinite are left out, before the run
            stops; they change neither weights nor moments. At most half of a run.
    """

    steps: int = 250000
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 2000
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5
    clip_value: float | None = 1.0
    clip_norm: float | None = None
    precision: str = "bf16"
    compile: bool = False
    cuda_graph: str = "auto"
    gradient_checkpointing: bool = False
    dag_A_LM: float = 0.0
    dag_A_P: float = 0.0
    dag_G_LM: float = 0.0
    handoff_step: int | None = None
    skip_nonfinite: int = 10

    @property
    def dag_coefficients(self) -> dict[str, float]:
        """Of the DAG loss, by tensor; those that are not 0."""
        found = {name: getattr(self, f"dag_{name}") for name in DAG_TENSORS}
        return {name: value for name, value in found.items() if value}


@dataclass
class DistributedRecipe:
    """How several processes share a run (started by torchrun or accelerate launch). One process ignores it.

    Attributes:
        sharding: "none": every process holds the whole model (DDP); "full": weights, gradients and optimiser are cut
            among all processes (FSDP2), but for those of the operators; "hybrid": cut within each of `replicas` groups.
        replicas: groups of hybrid sharding; as many as there are machines, usually.
        reshard: gather a layer's sharded weights for its forward, and again for its backward; false gathers all at once and
            keeps them in between, for speed, where they fit.
        cpu_offload: keep sharded weights and optimiser in host memory.
    """

    sharding: str = "none"
    replicas: int = 2
    reshard: bool = True
    cpu_offload: bool = False


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        output: folder of the trained model.
        seed: of initialisation and data order.
        log_steps: steps between two log lines.
        eval_steps: steps between two evaluations on the validation data, None for one at the end. With a learned
            operator each also measures how far G_LM varies over passages, the loss with G_LM frozen, and the DAG losses.
        save_steps: steps between two checkpoints, None for none but that of an interruption or a hand-off.
        keep_checkpoints: how many of the newest are kept.
        async_save: write checkpoints in the background while training goes on. Host memory then holds, besides what the
            run needs, one copy of weights and optimiser, which each process has its share of.
        report_to: where else numbers go: any of tensorboard, wandb, trackio.
    """

    output: str
    data: DataRecipe
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimization: OptimizationRecipe = field(default_factory=OptimizationRecipe)
    distributed: DistributedRecipe = field(default_factory=DistributedRecipe)
    seed: int = 1234
    log_steps: int = 50
    eval_steps: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int = 2
    async_save: bool = False
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for rule, holds, names in _RULES:
            for name in names:
                value = attrgetter(name)(self)
                if value is not None and not holds(value):
                    raise ValueError(f"recipe: {name} must be {rule}, got {value!r}")
        for message in _contradictions(self):
            raise ValueError(f"recipe: {message}")


# Of a recipe: in lists, and lists in lists, as many as an alias (*a) names are counted again.
_MOST_VALUES = 100_000

# What a value must be by itself. None, where a type allows it, means "not set" and is not checked.
_RULES: list[tuple[str, Callable[[Any], bool], list[str]]] = [
    ("a list of at least one name", bool, ["data.train"]),
    ("at least 0", lambda x: x >= 0, [
        "optimization.warmup_steps", "optimization.skip_nonfinite", "data.shuffle_buffer", "data.workers",
    ]),
    ("at least 1", lambda x: x >= 1, [
        "log_steps", "eval_steps", "save_steps", "keep_checkpoints", "data.validation_rows", "data.vocab_size",
        "optimization.steps", "optimization.batch_size", "optimization.accumulation", "distributed.replicas",
    ]),
    ("at least 2", lambda x: x >= 2, ["data.sequence_length"]),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, [
        "optimization.beta1", "optimization.beta2", "data.hold_out",
    ]),
    ("between 0 and 1", lambda x: 0 <= x <= 1, ["optimization.final_rate"]),
    ("finite and at least 0", lambda x: 0 <= x < math.inf, [
        "optimization.weight_decay", "optimization.dag_A_LM", "optimization.dag_A_P", "optimization.dag_G_LM",
    ]),
    ("finite and above 0", lambda x: 0 < x < math.inf, [
        "optimization.learning_rate", "optimization.epsilon", "optimization.clip_value", "optimization.clip_norm",
    ]),
    ("fp32 or bf16", lambda x: x in ("fp32", "bf16"), ["optimization.precision"]),
    ("auto or never", lambda x: x in ("auto", "never"), ["optimization.cuda_graph"]),
    ("packed, padded or unpadded", lambda x: x in ("packed", "padded", "unpadded"), ["data.layout"]),
    ("none, full or hybrid", lambda x: x in ("none", "full", "hybrid"), ["distributed.sharding"]),
    ("any of tensorboard, wandb, trackio", lambda x: {*x} <= {"tensorboard", "wandb", "trackio"}, ["report_to"]),
]  # fmt: skip


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What is wrong between the values of a recipe."""
    o, d = recipe.optimization, recipe.data
    if o.warmup_steps > o.steps:
        yield f"optimization.warmup_steps must be between 0 and optimization.steps={o.steps}, got {o.warmup_steps}"
    if o.clip_value is not None and o.clip_norm is not None:
        bounds = f"optimization.clip_value={o.clip_value} or optimization.clip_norm={o.clip_norm}"
        yield f"set {bounds} to null, not both to a bound"
    if d.hold_out and (d.validation or d.streaming):
        yield f"data.hold_out={d.hold_out} splits training data that is not streamed, without data.validation"
    if recipe.eval_steps is not None and not (d.validation or d.hold_out):
        yield f"eval_steps={recipe.eval_steps} needs data.validation (or data.hold_out)"
    if o.handoff_step is None:
        return
    handoff = f"optimization.handoff_step={o.handoff_step}"
    if not 0 < o.handoff_step < o.steps:
        yield f"{handoff} must be between 1 and steps - 1 = {o.steps - 1}"
    if not (d.validation or d.hold_out):
        yield f"{handoff} needs data.validation (or data.hold_out), to evaluate the operator on"
    for name, coefficient in o.dag_coefficients.items():
        yield f"optimization.dag_{name}={coefficient} regularises a learned operator, which {handoff} drops"


# --- reading --------------------------------------------------------------------------------------------------------


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """A recipe by path, or by the name of one that ships with pldr ("recipes/demo-cpu.yaml" or "demo-cpu").

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    # A name, not a place: a path that does not exist must not silently mean another file.
    by_name = path.suffix in ("", ".yaml") and str(path.parent) in (".", "recipes")
    here = Path(__file__).parent
    shipped = [folder for folder in (here / "recipes", here.parents[1] / "recipes") if folder.is_dir()]
    for folder in shipped:
        candidate = (folder / path.name).with_suffix(".yaml")
        if by_name and candidate.is_file():
            return candidate
    # What begins with "_" is a base of others, and no whole recipe.
    known = sorted(file.stem for folder in shipped for file in folder.glob("[!_]*.yaml"))
    raise FileNotFoundError(f"recipe: no file {path} and no recipe of that name; there are {', '.join(known)}")


def load_recipe(name: str | os.PathLike[str], overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    A recipe may say ``base: NAME``, a file beside it or a recipe by name: its sections are then merged over those of
    its base, key by key; lists are replaced.

    Args:
        name: see `find_recipe`.
        overrides: "key=value" pairs with dotted keys, such as "optimization.steps=100"; values are YAML.

    Raises:
        ValueError: not YAML, an unknown key, a missing key, a value of the wrong type or one that can not be, named
            with its place; a recipe that is its own base.
        FileNotFoundError: there is no such recipe, or no such base.
    """
    sections = _read_over_bases(find_recipe(name))
    for override in overrides or []:
        _override(sections, override)
    return _parse(Recipe, sections, "")


def _read_over_bases(path: Path) -> dict[str, Any]:
    """The sections of a recipe file over those of its base, and of the base's base."""
    read = [path]
    sections = _read_sections(path)
    while (base := sections.pop("base", None)) is not None:
        path = _find_base(read[-1], base)
        if any(path.samefile(file) for file in read):
            raise ValueError(f"recipe {read[-1]}: base: {base} leads back to {path}")
        read.append(path)
        sections = _merged(_read_sections(path), sections)
    return sections


def _find_base(path: Path, base: object) -> Path:
    """The file that a recipe file names as its base."""
    if not isinstance(base, str):
        raise ValueError(f"recipe {path}: base must be the name of a recipe, got {base!r}")
    beside = path.parent / (base if base.endswith(".yaml") else f"{base}.yaml")
    try:
        return beside if beside.is_file() else find_recipe(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"recipe {path}: base: no file {beside}; {error}") from None


def _read_sections(path: Path) -> dict[str, Any]:
    sections = _parse_yaml(path.read_bytes(), f"recipe {path}")
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {path}: must be a section with keys, got {sections!r}")
    return sections


def _parse_yaml(text: str | bytes, name: str) -> Any:
    """Raises ValueError: not YAML, too deep, an integer of too many digits, or more than a recipe holds; `name` says where."""
    import yaml

    try:
        value = yaml.safe_load(text if isinstance(text, str) else text.decode("utf-8"))
        if _values(value, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases make more than {_MOST_VALUES:,} values of it")
    except Exception as error:  # noqa: BLE001 (values that are not of their tag raise anything)
        raise ValueError(f"{name}: not valid YAML ({one_line(error)})") from None
    return value


def _values(value: Any, known: dict[int, float]) -> float:
    """How many values there are in lists and sections, each as often as YAML's aliases name it; of one in itself, infinity."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        known[id(value)] = 1 + sum(
            _values(item, known) for item in (value.values() if isinstance(value, dict) else value)
        )
    return known[id(value)]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections over others: the values of `above` count, where both have one."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return below | above | {key: _merged(below[key], above[key]) for key in both}


def _override(mapping: Any, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"recipe: override {override!r} is not of the form key=value")
    *parents, last = key.split(".")
    for name in parents:
        mapping = mapping.setdefault(name, {}) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict):
            raise ValueError(f"recipe: {key}: {name} is not a section")
    mapping[last] = _parse_yaml(value, f"recipe: override {override!r}")


def _parse(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind` (a dataclass, a union, a list, a dict or a scalar), or a ValueError that names `place`."""
    where = f"recipe: {place}" if place else "recipe"
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: must be a section with keys, got {value!r}")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in fields:
                close = get_close_matches(str(key), fields, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(fields)}"
                raise ValueError(f"{where}: unknown key {key!r}{hint}")
        for name, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in value:
                raise ValueError(f"{where}: missing key {name!r}")
        prefix = f"{place}." if place else ""
        parsed = {key: _parse(hints[key], item, prefix + key) for key, item in value.items()}
        return kind(**parsed)  # type: ignore[operator]
    if isinstance(kind, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _parse(options[0], value, place)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        (item_kind,) = typing.get_args(kind)
        return [_parse(item_kind, item, f"{place}[{index}]") for index, item in enumerate(value)]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where}: must be a section with keys, got {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where}: must be a number, got {value!r}") from None
    if type(value) is not kind:
        raise ValueError(f"{where}: must be of type {kind.__name__}, got {value!r}")
    return value
