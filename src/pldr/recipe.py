"""Training recipes: YAML, parsed into typed dataclasses. Every key is checked; a wrong one is named with its place."""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any


@dataclass
class ModelRecipe:
    """What to train.

    Attributes:
        preset: a published model's name; its shape is the starting point.
        config: fields of PldrConfig that differ from the preset or the defaults.
        G_LM: a predefined operator for operator="constant": a file (.safetensors or .pkl), or a folder with a model that
            has a constant one.
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
        sequence_length: tokens of a full training sequence.
        layout: "packed": documents one after another, [END] between them, sequences cut where they are full.
            "padded": so within groups of 3,200 documents, the last sequence of a group filled with [PAD];
            "unpadded": the same, that sequence left short.
        streaming: tokenise the training data as it is read, again in every pass, rather than once into the cache.
        shuffle_buffer: documents that a streamed pass is mixed through, fewer where they are long (64 million characters at
            most are held); 0 keeps their order. Data that is not streamed is shuffled as a whole.
        workers: processes that load data beside each training process.
        strict: refuse bad rows (no text, empty, not valid UTF-8) rather than skip and count them.
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


@dataclass
class OptimizationRecipe:
    """How to train: AdamW with linear warm-up and a cosine to a floor. The defaults are the published framework's.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step on each process, before accumulation.
        accumulation: batches that one step sums over.
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up.
        final_rate: floor of the cosine, as a fraction of the peak.
        weight_decay, beta1, beta2, epsilon: AdamW's; decay is applied to every parameter, as published.
        clip_value: bound on every element of the gradient (published), or None.
        clip_norm: bound on the gradient's norm, or None.
        precision: "fp32" or "bf16" (autocast).
        compile: run the decoder layers through torch.compile, all with the same graph.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        dag_A_LM, dag_A_P, dag_G_LM: coefficients of the DAG loss of each deductive output, added to the cross-entropy
            (0.05 each in v51-DAG); they need a learned operator.
        handoff_step: after this many steps the learned operator, evaluated on held-out passages, becomes a trainable
            constant and its network is dropped; None keeps the network.
        skip_nonfinite: how many steps whose loss is NaN or infinite are left out before the run stops. Above 0 every
            step waits for its loss.
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
    gradient_checkpointing: bool = False
    dag_A_LM: float = 0.0
    dag_A_P: float = 0.0
    dag_G_LM: float = 0.0
    handoff_step: int | None = None
    skip_nonfinite: int = 0


@dataclass
class DistributedRecipe:
    """How several processes share a run (started by torchrun or accelerate launch). One process ignores it.

    Attributes:
        sharding: "none": every process holds the whole model (DDP); "full": weights, gradients and optimiser are cut among
            all processes (FSDP2); "hybrid": cut within each of `replicas` groups.
        replicas: groups of hybrid sharding; as many as there are machines, usually.
        cpu_offload: keep sharded weights and optimiser in host memory.
    """

    sharding: str = "none"
    replicas: int = 2
    cpu_offload: bool = False


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        output: folder of the trained model.
        seed: of initialisation and data order.
        log_steps: steps between two log lines.
        eval_steps: steps between two evaluations on the validation data, None for one at the end. With a learned operator
            each also measures how far G_LM varies over passages, the loss with G_LM frozen, and the DAG losses.
        save_steps: steps between two checkpoints, None for none but that of an interruption or a hand-off.
        keep_checkpoints: how many of the newest are kept.
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
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        o, d = self.optimization, self.data
        positive = {
            "optimization.steps": o.steps, "optimization.batch_size": o.batch_size,
            "optimization.accumulation": o.accumulation, "optimization.learning_rate": o.learning_rate,
            "optimization.epsilon": o.epsilon, "data.sequence_length": d.sequence_length - 1,
            "data.vocab_size": d.vocab_size,
            "data.validation_rows": 1 if d.validation_rows is None else d.validation_rows, "log_steps": self.log_steps, "data.train": len(d.train),
            "eval_steps": 1 if self.eval_steps is None else self.eval_steps,
            "save_steps": 1 if self.save_steps is None else self.save_steps,
            "keep_checkpoints": self.keep_checkpoints, "distributed.replicas": self.distributed.replicas,
        }  # fmt: skip
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"recipe: {name} is too small")
        if o.handoff_step is not None and not 0 < o.handoff_step < o.steps:
            raise ValueError(f"recipe: optimization.handoff_step must be between 1 and steps - 1, got {o.handoff_step}")
        for name, coefficient in (("dag_A_LM", o.dag_A_LM), ("dag_A_P", o.dag_A_P), ("dag_G_LM", o.dag_G_LM)):
            if coefficient and o.handoff_step is not None:
                raise ValueError(
                    f"recipe: optimization.{name} regularises a learned operator, which handoff_step drops"
                )
        if not 0 <= d.hold_out < 1:
            raise ValueError(f"recipe: data.hold_out must be a fraction between 0 and 1, got {d.hold_out}")
        if d.hold_out and (d.validation or d.streaming):
            raise ValueError("recipe: data.hold_out splits training data that is not streamed, without data.validation")
        held_out = bool(d.validation or d.hold_out)
        if o.handoff_step is not None and not held_out:
            raise ValueError("recipe: optimization.handoff_step needs data.validation, to evaluate the operator on")
        if self.eval_steps is not None and not held_out:
            raise ValueError("recipe: eval_steps needs data.validation (or data.hold_out)")
        for name in ("learning_rate", "weight_decay", "epsilon", "dag_A_LM", "dag_A_P", "dag_G_LM"):
            if not 0 <= getattr(o, name) < math.inf:
                raise ValueError(f"recipe: optimization.{name} must be a finite number ≥ 0, got {getattr(o, name)}")
        if o.clip_value is not None and o.clip_norm is not None:
            raise ValueError(
                "recipe: set optimization.clip_value or optimization.clip_norm to null, not both to a bound"
            )
        for name, bound in (("clip_value", o.clip_value), ("clip_norm", o.clip_norm)):
            if bound is not None and not 0 < bound < math.inf:
                raise ValueError(f"recipe: optimization.{name} must be positive and finite, or null, got {bound}")
        if not 0 <= o.final_rate <= 1:
            raise ValueError(f"recipe: optimization.final_rate must be between 0 and 1, got {o.final_rate}")
        for name, beta in (("beta1", o.beta1), ("beta2", o.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"recipe: optimization.{name} must be at least 0 and less than 1, got {beta}")
        if not 0 <= o.warmup_steps <= o.steps:
            raise ValueError(f"recipe: optimization.warmup_steps must be between 0 and steps, got {o.warmup_steps}")
        choices: list[tuple[str, str, tuple[str, ...]]] = [
            ("optimization.precision", o.precision, ("fp32", "bf16")),
            ("data.layout", d.layout, ("packed", "padded", "unpadded")),
            ("distributed.sharding", self.distributed.sharding, ("none", "full", "hybrid")),
            *(("report_to", name, ("tensorboard", "wandb", "trackio")) for name in self.report_to),
        ]
        for name, choice, allowed in choices:
            if choice not in allowed:
                raise ValueError(f"recipe: {name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {choice!r}")
        for name, count in [
            ("optimization.skip_nonfinite", o.skip_nonfinite),
            ("data.shuffle_buffer", d.shuffle_buffer),
            ("data.workers", d.workers),
        ]:
            if count < 0:
                raise ValueError(f"recipe: {name} must be at least 0, got {count}")


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """A recipe by path, or by the name of one that comes with the package ("recipes/demo-cpu.yaml" or "demo-cpu").

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
    known = sorted(file.stem for folder in shipped for file in folder.glob("*.yaml"))
    raise FileNotFoundError(f"recipe: no file {path} and no recipe of that name; there are {', '.join(known)}")


def load_recipe(name: str | os.PathLike[str], overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: see `find_recipe`.
        overrides: "key=value" pairs with dotted keys, such as "optimization.steps=100"; values are YAML.

    Raises:
        ValueError: not YAML, an unknown key, a missing key or a value of the wrong type, named with its place.
        FileNotFoundError: there is no such recipe.
    """
    import yaml

    path = find_recipe(name)
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(mapping, dict):
            raise ValueError(f"recipe {path}: must be a section with keys, got {mapping!r}")
        for override in overrides or []:
            _override(mapping, override, yaml.safe_load)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())})") from None
    return _parse(Recipe, mapping, "")


def _override(mapping: Any, override: str, parse: Any) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"recipe: override {override!r} is not of the form key=value")
    *parents, last = key.split(".")
    for name in parents:
        mapping = mapping.setdefault(name, {}) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict):
            raise ValueError(f"recipe: {key}: {name} is not a section")
    mapping[last] = parse(value)


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
        return kind(**{key: _parse(hints[key], item, prefix + key) for key, item in value.items()})  # type: ignore[operator]
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
