"""Training: a recipe to a model, in a folder that a stopped run can go on from."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassFieldValidationError
from rich.console import RenderableType
from transformers import PreTrainedTokenizerFast, PrinterCallback, set_seed

from pldr.configuration_pldr import PldrConfig
from pldr.data.rows import TokenRows, TokenStream, cached_rows, collate, source_of
from pldr.data.vocabulary import train_pieces
from pldr.files import one_line, process_mark, read_json, settle, sync
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze
from pldr.recipe import Recipe
from pldr.tables import Printable, numbers_view
from pldr.tokenizer import load_tokenizer
from pldr.training import TrainingInterrupted
from pldr.training.callbacks import ProgressBar
from pldr.training.checkpoint import checkpoints, load_weights, step_of
from pldr.training.folder import run_folder
from pldr.training.trainer import ADVICE, PROBED, PldrTrainer, compile_layers, training_arguments


def train(
    recipe: Recipe, *, overwrite: bool = False, resume: bool | str | os.PathLike[str] = False, progress: bool = True
) -> "TrainingSummary":
    """Train a model into the recipe's output folder.

    The folder holds checkpoints and ``log.jsonl`` during the run; the model and its tokenizer appear at the end. The
    processes of torchrun or accelerate launch share the work.

    Args:
        recipe: what to train, on what, and how.
        overwrite: replace an output folder that is not empty.
        resume: go on from the newest checkpoint in the output folder, or from the one named; "auto": from the newest if
            there is one, else begin (also where a run broke off that had left none).
        progress: show a progress bar.

    Returns:
        output (the folder), steps, tokens, left_out_tokens (of the last partial sequence), seconds and tokens_per_second (of this call),
        train_loss, train_accuracy and, with such data, validation_loss, validation_accuracy, test_loss and
        test_accuracy (nats per token and fractions, with G_LM learned: computed from each full sequence).

    Raises:
        ValueError, OSError: a recipe, data, checkpoint or output folder that can not work, or another run is in that
            folder, before any training; a disk that is full, with the older checkpoints left whole.
        FloatingPointError: the loss became NaN or infinite more often than the recipe allows.
        TrainingInterrupted: SIGTERM, SIGINT or SIGHUP came, and a checkpoint was written.
    """
    # The others wait for as long as the main process tokenises.
    process = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
    _check_distributed(recipe, process.num_processes)
    with run_folder(recipe, process, overwrite=overwrite, resume=resume) as (folder, start):
        set_seed(recipe.seed)
        tokenizer = _tokenizer(recipe, folder, process)
        model = build_model(recipe, tokenizer)
        data = _datasets(recipe, tokenizer, process)
        done = _Done()
        trainer = _trainer(recipe, model, data, folder, start)
        _run(trainer, done, progress=progress and process.is_main_process)
        if trainer.must_hand_off:
            trainer.accelerator.free_memory()
            # The checkpoint that was just written holds all that the second part of the run needs.
            model = build_model(recipe, tokenizer)
            trainer = _trainer(recipe, model, data, folder, checkpoints(folder)[0])
            _run(trainer, done, progress=progress and process.is_main_process)
        return _finish(trainer, done, data, tokenizer)


class TrainingSummary(Printable, dict[str, Any]):
    """What `train` did, by name."""

    def to_json(self) -> dict[str, Any]:
        return dict(self)

    def __rich__(self) -> RenderableType:
        return numbers_view(self)


@dataclass
class _Done:
    """What this call has done, on both sides of a hand-off."""

    sequences: int = 0
    seconds: float = 0.0


def _run(trainer: PldrTrainer, done: _Done, *, progress: bool) -> None:
    """Train until the end, the hand-off or a signal.

    Raises:
        FloatingPointError, OSError, TrainingInterrupted: see `train`.
    """
    start, steps = trainer.start, trainer.recipe.optimization.steps
    if start is not None and step_of(start) >= steps:
        trainer.restore_finished()  # only the model was not written yet
        return
    bar = ProgressBar(trainer.recipe, enabled=progress)
    trainer.add_callback(bar)
    with _stop_on_signals(trainer), bar, trainer.writer:
        result = trainer.train(resume_from_checkpoint=None if start is None else str(start))
    done.sequences += trainer.new_sequences
    done.seconds += result.metrics["train_runtime"]
    if trainer.stopped_by is not None:
        saved = checkpoints(trainer.folder)[0]
        raise TrainingInterrupted(
            f"stopped by {signal.Signals(trainer.stopped_by).name} after step {step_of(saved)} of {steps}; saved in "
            f"{saved}; go on with the same command and --resume",
            trainer.stopped_by,
        )


def _trainer(
    recipe: Recipe, model: PldrForCausalLM, data: "_Datasets", folder: Path, start: Path | None
) -> PldrTrainer:
    """The trainer of what is left of a run: from its beginning, a checkpoint, or its hand-off."""
    if start is not None:
        _restore_model(model, start, recipe, data.validation)
    o = recipe.optimization
    if o.gradient_checkpointing:
        # On the model, because the Trainer's own setting has another name in each transformers release.
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    if o.compile:
        compile_layers(model)
    full = recipe.data.sequence_length if recipe.data.layout == "padded" else None
    trainer = PldrTrainer(
        recipe,
        folder,
        start=start,
        model=model,
        args=training_arguments(recipe, folder),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=partial(collate, pad_token_id=model.config.pad_token_id or 0, length=full),
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for results
    return trainer


def _restore_model(model: PldrForCausalLM, start: Path, recipe: Recipe, held_out: TokenRows | None) -> None:
    """Give a model the weights of a checkpoint, and the operator that it has or, at the hand-off, must get now."""
    operator = read_json(start / "config.json")["operator"]
    if operator != model.config.operator:  # handed off before
        H, D = model.config.num_attention_heads, model.config.head_dim
        freeze(model, G_LM=torch.zeros(model.config.num_hidden_layers, H, D, D), trainable=True)
    load_weights(model, start)
    step = recipe.optimization.handoff_step
    if operator == "learned" and step is not None and step_of(start) >= step:
        assert held_out is not None  # the recipe was checked
        device = "cuda" if torch.cuda.is_available() else "cpu"
        freeze(model.to(device), held_out.full_rows(PROBED)[:, :-1].to(device), trainable=True)
        model.train()


@dataclass
class _Datasets:
    """The parts of a recipe's data."""

    train: TokenRows | TokenStream
    validation: TokenRows | None
    test: TokenRows | None


def _datasets(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, process: PartialState) -> _Datasets:
    """Raises ValueError, OSError: see `pldr.data`; or less training data than one step needs."""
    d, o = recipe.data, recipe.optimization
    rank, processes = process.process_index, process.num_processes

    def report(line: str) -> None:
        if process.is_main_process:
            print(line, file=sys.stderr)  # noqa: T201

    def rows(part: str) -> TokenRows:
        return cached_rows(source_of(d, part), tokenizer, d, report=report)

    # Of all processes the main one tokenises; the others then read what it wrote.
    with process.main_process_first():
        train: TokenRows | TokenStream
        if d.streaming:
            source = source_of(d, "train")
            train = TokenStream(source, tokenizer, d, seed=recipe.seed, rank=rank, world_size=processes)
        else:
            train = rows("train")
        validation = rows("validation") if d.validation else None
        test = rows("test") if d.test else None
    if isinstance(train, TokenRows):
        if d.hold_out:
            train, validation = train.split(d.hold_out)
        needed = o.batch_size * o.accumulation * processes
        if len(train) < needed:
            raise ValueError(f"data: {len(train)} training sequences are less than one step of {needed}")
    if validation is not None and d.validation_rows is not None:
        validation = validation.head(d.validation_rows)
    if o.handoff_step is not None and (validation is None or len(validation.full_rows(1)) == 0):
        raise ValueError("data.validation: the hand-off needs one full sequence to evaluate the operator on")
    return _Datasets(train, validation, test)


def _finish(trainer: PldrTrainer, done: _Done, data: _Datasets, tokenizer: PreTrainedTokenizerFast) -> TrainingSummary:
    """Write the model, then evaluate it; the summary of `train`."""
    model, recipe = trainer.whole_model(), trainer.recipe
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise FloatingPointError(f"the training diverged ({broken[0]} is not finite); {ADVICE}")
    last = trainer.last_losses()
    # First of all, so that nothing that happens to an evaluation can cost the model.
    if trainer.is_world_process_zero():
        model.config.use_cache = True  # the Trainer switches it off
        _write_model(model, tokenizer, trainer.folder)
    trainer.accelerator.wait_for_everyone()
    length = recipe.data.sequence_length
    result: dict[str, Any] = {
        "output": recipe.output,
        # What was done, which a callback may have cut short of what was planned.
        "steps": trainer.state.global_step,
        "tokens": trainer.totals["sequences"] * length,
        "left_out_tokens": data.train.facts["left_out_tokens"] if isinstance(data.train, TokenRows) else 0,
        "seconds": done.seconds,
        "tokens_per_second": done.sequences * length / done.seconds if done.seconds else 0.0,
        "train_loss": last["loss"],
        "train_accuracy": last["accuracy"],
    }
    for part, rows, name in (("validation", data.validation, "eval"), ("test", data.test, "test")):
        if rows is not None:
            metrics = trainer.evaluate(rows, metric_key_prefix=name)
            result |= {f"{part}_{key}": metrics[f"{name}_{key}"] for key in ("loss", "accuracy")}
    return TrainingSummary(result)


def _write_model(model: PldrForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Into a run's folder: files move to their places one by one, the configuration last.

    Until then nothing takes the folder for a model.
    """
    # A name that `pldr.files.sweep` knows, where the process is killed.
    with tempfile.TemporaryDirectory(prefix=f".model.partial-{process_mark()}-", dir=folder) as partial_folder:
        model.save_pretrained(partial_folder)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(partial_folder)
        settle(Path(partial_folder))
        for file in sorted(Path(partial_folder).iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    sync(folder)


def _tokenizer(recipe: Recipe, folder: Path, process: PartialState) -> PreTrainedTokenizerFast:
    d = recipe.data
    if d.tokenizer is not None:
        return load_tokenizer(d.tokenizer)
    model_file = folder / "tokenizer.model"
    with process.main_process_first():
        if not model_file.is_file():
            # What it skips of the data is reported where that becomes sequences.
            train_pieces(source_of(d, "train"), model_file, d.vocab_size, strict=d.strict, streaming=d.streaming)
    return load_tokenizer(model_file)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PldrForCausalLM:
    """The untrained model of a recipe, for this tokenizer's vocabulary.

    Raises:
        ValueError: unsupported configuration, or a G_LM that does not fit it.
    """
    fields = dict(recipe.model.config)
    fields.setdefault("vocab_size", len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    if recipe.model.G_LM is not None:
        fields.setdefault("operator", "constant")
        fields["operator_init"] = "identity"  # replaced below
    try:
        config = PldrConfig.preset(recipe.model.preset, **fields) if recipe.model.preset else PldrConfig(**fields)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"recipe: model.config: {one_line(error)}") from None
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"recipe: model.config.vocab_size={config.vocab_size}, the tokenizer has {len(tokenizer)}")
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"recipe: data.sequence_length={recipe.data.sequence_length} is longer than "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    if config.operator != "learned" and recipe.optimization.handoff_step is not None:
        raise ValueError("recipe: optimization.handoff_step needs a learned operator to hand off")
    if config.operator != "learned" and recipe.optimization.dag_coefficients:
        raise ValueError(
            "recipe: optimization.dag_… need a learned operator, which alone has deductive outputs to regularise"
        )
    set_seed(recipe.seed)
    model = PldrForCausalLM(config)
    if recipe.model.G_LM is not None:
        from pldr.checkpoints.load import load_predefined_G

        freeze(model, G_LM=load_predefined_G(recipe.model.G_LM), trainable=config.operator_trainable)
    return model


# --- processes and signals ------------------------------------------------------------------------------------------


def _check_distributed(recipe: Recipe, processes: int) -> None:
    d = recipe.distributed
    if processes > 1 and d.sharding == "hybrid" and processes % d.replicas:
        raise ValueError(f"recipe: distributed.replicas={d.replicas} does not divide {processes} processes")
    if processes > 1 and d.sharding != "none" and d.cpu_offload and not torch.cuda.is_available():
        raise ValueError("recipe: distributed.cpu_offload needs GPUs to offload from")


@contextlib.contextmanager
def _stop_on_signals(trainer: PldrTrainer) -> Iterator[None]:
    """SIGTERM, SIGHUP and the first SIGINT end the run after a checkpoint; the second SIGINT ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may listen
        return

    def note(number: int, frame: FrameType | None) -> None:
        if trainer.stop_signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        trainer.stop_signal = number

    numbers = [signal.SIGTERM, signal.SIGINT]
    # Windows has none, and under nohup it stays ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
