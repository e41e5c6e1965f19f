"""Training: a recipe through transformers' Trainer."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from pldr.configuration_pldr import PldrConfig
from pldr.data import pack, read_documents
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze
from pldr.recipe import OptimizationRecipe, Recipe
from pldr.saving import check_output, whole_folder
from pldr.tokenizer import load_tokenizer, train_sentencepiece


def train(recipe: Recipe, *, overwrite: bool = False, progress: bool = True) -> dict[str, float]:
    """Train a model and save it, with its tokenizer, in the recipe's output folder.

    Args:
        recipe: what to train, on what, and how.
        overwrite: replace an output folder that is not empty.
        progress: show a progress bar.

    Returns:
        steps, tokens, left_out_tokens (of the last partial sequence), seconds, tokens_per_second, train_loss and, with validation data, validation_loss (nats a token,
        G_LM computed from each full sequence).

    Raises:
        ValueError, OSError: a recipe, data or output folder that can not work; before any training.
        FloatingPointError: the loss became NaN or infinite.
    """
    output = check_output(recipe.output, overwrite=overwrite)
    set_seed(recipe.seed)
    with whole_folder(output, overwrite=overwrite) as folder:
        tokenizer = _tokenizer(recipe, folder)
        model = build_model(recipe, tokenizer)
        length = recipe.data.sequence_length
        if recipe.optimization.gradient_checkpointing:
            # On the model, because the Trainer's own setting has another name in each transformers release.
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        sequences, left_out = pack(read_documents(recipe.data.train), tokenizer, length)
        if len(sequences) < recipe.optimization.batch_size:
            raise ValueError(
                f"data: {len(sequences)} training sequences are less than one batch of {recipe.optimization.batch_size}"
            )
        held_out = (
            pack(read_documents(recipe.data.validation), tokenizer, length)[0] if recipe.data.validation else None
        )
        trainer = PldrTrainer(
            recipe.optimization,
            model=model,
            args=training_arguments(recipe, folder),
            train_dataset=sequences,
            eval_dataset=held_out,
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for results
        bar = ProgressBar(recipe, enabled=progress)
        trainer.add_callback(bar)
        result = trainer.train()
        tokens = recipe.optimization.steps * recipe.optimization.batch_size * recipe.optimization.accumulation * length
        _check_finite(model, result.training_loss)
        summary = {
            "steps": recipe.optimization.steps,
            "tokens": tokens,
            "left_out_tokens": left_out,
            "seconds": result.metrics["train_runtime"],
            "tokens_per_second": tokens / result.metrics["train_runtime"],
            # Of the last logged steps; of all, where there were too few to log.
            "train_loss": result.training_loss if math.isnan(bar.loss) else bar.loss,
        }
        if held_out is not None:
            summary["validation_loss"] = trainer.evaluate()["eval_loss"]
        model.config.use_cache = True  # the Trainer switches it off
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return summary


def _check_finite(model: PldrForCausalLM, loss: float) -> None:
    """
    Raises:
        FloatingPointError: the run diverged after its last log line; the weights are not worth keeping.
    """
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken or not math.isfinite(loss):
        raise FloatingPointError(f"the training diverged ({broken[0] if broken else 'loss'} is not finite); {_ADVICE}")


_ADVICE = "lower optimization.learning_rate or raise optimization.warmup_steps"


def _tokenizer(recipe: Recipe, folder: Path) -> Any:
    if recipe.data.tokenizer is not None:
        return load_tokenizer(recipe.data.tokenizer)
    documents = read_documents(recipe.data.train)
    return load_tokenizer(train_sentencepiece(documents, folder / "tokenizer.model", recipe.data.vocab_size))


def build_model(recipe: Recipe, tokenizer: Any) -> PldrForCausalLM:
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
        raise ValueError(f"recipe: model.config: {' '.join(str(error).split())}") from None
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"recipe: model.config.vocab_size={config.vocab_size}, the tokenizer has {len(tokenizer)}")
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"recipe: data.sequence_length={recipe.data.sequence_length} is longer than "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    model = PldrForCausalLM(config)
    if recipe.model.G_LM is not None:
        from pldr.convert import load_predefined_G

        freeze(model, G_LM=load_predefined_G(recipe.model.G_LM), trainable=config.operator_trainable)
    return model


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    o = recipe.optimization
    return TrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        max_steps=o.steps,
        per_device_train_batch_size=o.batch_size,
        per_device_eval_batch_size=o.batch_size,
        gradient_accumulation_steps=o.accumulation,
        learning_rate=o.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": o.final_rate},
        warmup_steps=o.warmup_steps,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_epsilon=o.epsilon,
        max_grad_norm=o.clip_norm or 0.0,
        bf16=o.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        torch_compile=o.compile,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class PldrTrainer(Trainer):
    """transformers' Trainer with the published optimisation: clipping by value, decay on every parameter."""

    def __init__(self, optimization: OptimizationRecipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optimization = optimization
        if optimization.clip_value is not None:
            self.add_callback(_ClipByValue(optimization.clip_value))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Only the loss is wanted, in training as in evaluation: all logits of a batch would fill gigabytes.
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        loss = logs.get("loss", 0.0)
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"the loss became {loss} by step {self.state.global_step}; {_ADVICE}")
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping by norm the Trainer would compute the norm for the log alone, at every step.
        return grad_norm if self.optimization.clip_norm is not None else None


class _ClipByValue(TrainerCallback):
    def __init__(self, bound: float) -> None:
        self.bound = bound

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), self.bound)


class ProgressBar(TrainerCallback):
    """One line on standard error: steps, loss, learning rate, tokens a second, time left."""

    def __init__(self, recipe: Recipe, *, enabled: bool) -> None:
        self.loss = float("nan")
        self.enabled = enabled
        o = recipe.optimization
        self.tokens_per_step = o.batch_size * o.accumulation * recipe.data.sequence_length
        self._exit = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = self._exit.enter_context(Progress(*columns, console=Console(stderr=True), disable=not self.enabled))
        self.task = self.bar.add_task("", total=state.max_steps)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = self.tokens_per_step * state.global_step * args.world_size / (time.perf_counter() - self.start)
        self.bar.update(
            self.task, completed=state.global_step, description=f"loss {self.loss:.3f} · {speed:,.0f} tokens/s"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._exit.close()
