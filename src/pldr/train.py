"""Training: a recipe through transformers' Trainer."""

import contextlib
import copy
import json
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
from pldr.deductive import dag_loss, deductive_outputs, variation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import freeze
from pldr.recipe import OptimizationRecipe, Recipe
from pldr.saving import check_output, whole_folder
from pldr.tokenizer import load_tokenizer, train_sentencepiece


def train(recipe: Recipe, *, overwrite: bool = False, progress: bool = True) -> dict[str, float]:
    """Train a model and save it, with its tokenizer and ``log.jsonl``, in the recipe's output folder.

    Args:
        recipe: what to train, on what, and how.
        overwrite: replace an output folder that is not empty.
        progress: show a progress bar.

    Returns:
        steps, tokens, left_out_tokens (of the last partial sequence), seconds, tokens_per_second, train_loss and, with
        validation data, validation_loss (nats a token, G_LM computed from each full sequence).

    Raises:
        ValueError, OSError: a recipe, data or output folder that can not work, before any training; a disk that is full.
        FloatingPointError: the loss became NaN or infinite.
    """
    output = check_output(recipe.output, overwrite=overwrite)
    set_seed(recipe.seed)
    o, d = recipe.optimization, recipe.data
    with whole_folder(output, overwrite=overwrite) as folder:
        tokenizer = _tokenizer(recipe, folder)
        model = build_model(recipe, tokenizer)
        if o.gradient_checkpointing:
            # On the model, because the Trainer's own setting has another name in each transformers release.
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        if o.compile:
            # Layer by layer: all layers share one graph, where compiling the whole model would unroll them all.
            for layer in model.model.layers:
                layer.compile()
        sequences = pack(read_documents(d.train, d.text_column), tokenizer, d.sequence_length)
        if len(sequences) < o.batch_size * o.accumulation:
            raise ValueError(
                f"data: {len(sequences)} training sequences are less than one step of {o.batch_size} × {o.accumulation}"
            )
        held_out = None
        if d.validation:
            held_out = pack(read_documents(d.validation, d.text_column), tokenizer, d.sequence_length)
        trainer = PldrTrainer(
            o,
            folder / "log.jsonl",
            model=model,
            args=training_arguments(recipe, folder),
            train_dataset=sequences,
            eval_dataset=held_out,
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for results
        bar = ProgressBar(recipe, enabled=progress)
        trainer.add_callback(bar)
        try:
            result = trainer.train()
        finally:
            bar.close()  # also after an error, or the terminal would keep the bar
        # What was done, which a callback may have cut short of what was planned.
        steps, seconds = trainer.state.global_step, result.metrics["train_runtime"]
        tokens = trainer.sequences_seen * d.sequence_length
        _check_finite(model, result.training_loss)
        summary = {
            "steps": steps,
            "tokens": tokens,
            "left_out_tokens": sequences.left_out,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
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


# Held-out passages that an evaluation measures the operator on.
_PROBED = 16
_ADVICE = "lower optimization.learning_rate or raise optimization.warmup_steps"


def _tokenizer(recipe: Recipe, folder: Path) -> Any:
    if recipe.data.tokenizer is not None:
        return load_tokenizer(recipe.data.tokenizer)
    documents = read_documents(recipe.data.train, recipe.data.text_column)
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
    if config.operator != "learned" and recipe.optimization.handoff_step is not None:
        raise ValueError("recipe: optimization.handoff_step needs a learned operator to hand off")
    if config.operator != "learned" and any(_dag_coefficients(recipe.optimization).values()):
        raise ValueError(
            "recipe: optimization.dag_… need a learned operator, which alone has deductive outputs to regularise"
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
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no" if recipe.eval_steps is None else "steps",
        eval_steps=recipe.eval_steps,
        save_strategy="no",
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _dag_coefficients(optimization: OptimizationRecipe) -> dict[str, float]:
    return {name: getattr(optimization, f"dag_{name}") for name in ("A_LM", "A_P", "G_LM")}


class PldrTrainer(Trainer):
    """transformers' Trainer with the published optimisation: clipping by value, decay on every parameter, DAG loss.

    Every log line, evaluations included, also goes to a JSON-lines file.
    """

    def __init__(self, optimization: OptimizationRecipe, log_file: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optimization = optimization
        self.log_file = log_file
        self.sequences_seen = 0  # in training, by all processes
        self.dag_coefficients = {name: value for name, value in _dag_coefficients(optimization).items() if value}
        if optimization.clip_value is not None:
            self.add_callback(_ClipByValue(optimization.clip_value))
        if optimization.handoff_step is not None:
            self.add_callback(_HandOff(optimization.handoff_step, self))

    def hand_off(self) -> None:
        """Make the learned operator a trainable constant, from held-out passages, and go on with what remains.

        The optimiser keeps its state for every parameter that stays; the constants start without one.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        freeze(model, self.eval_dataset.tensor(slice(_PROBED)).to(model.device), trainable=True)
        parameters = list(model.parameters())
        kept = set(parameters)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in kept]
        known = {p for group in self.optimizer.param_groups for p in group["params"]}
        # Every parameter is decayed alike, so that the first group is the place for new ones.
        self.optimizer.param_groups[0]["params"] += [p for p in parameters if p not in known]
        state = self.optimizer.state
        for parameter in [p for p in state if p not in kept]:
            del state[parameter]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Only the loss is wanted, in training as in evaluation: all logits of a batch would fill gigabytes.
        inputs = {**inputs, "return_logits": False}
        regularised = bool(self.dag_coefficients) and model.training
        if model.training:
            self.sequences_seen += len(inputs["input_ids"]) * self.args.world_size
        if regularised:
            inputs["output_deductive_outputs"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if regularised:
            for name, coefficient in self.dag_coefficients.items():
                X = torch.stack([getattr(layer, name) for layer in outputs.deductive_outputs])
                # The cross-entropies of accumulated batches add up to a mean; so must these. The last step of an epoch
                # has fewer batches.
                loss = loss + coefficient * dag_loss(X) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Not compiled: other batch sizes and no gradients would compile everything anew.
        with torch.compiler.set_stance("force_eager"):
            metrics = super().evaluate(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if model.config.operator == "learned" and len(self.eval_dataset) >= 2:
            self.log(operator_metrics(model, self.eval_dataset.tensor(slice(_PROBED)).to(model.device)))
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Training leaves out the last partial batch of an epoch; an evaluation is over everything.
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = True

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        loss = logs.get("loss", 0.0)
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"the loss became {loss} by step {self.state.global_step}; {_ADVICE}")
        super().log(logs, *args, **kwargs)
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping by norm the Trainer would compute the norm for the log alone, at every step.
        return grad_norm if self.optimization.clip_norm is not None else None


@torch.no_grad()
def operator_metrics(model: PldrForCausalLM, passages: torch.Tensor) -> dict[str, Any]:
    """Whether G_LM has become a constant: what an evaluation logs beside the loss.

    Args:
        model: with a learned operator.
        passages: [B, T], B ≥ 2, held out.

    Returns:
        "G_variation", of G_LM over the passages, layer by layer (see `pldr.deductive.variation`); "G_frozen_difference",
        the mean loss of all passages but the first with G_LM frozen from the first, minus that with G_LM computed from
        each, in nats a token.
    """
    was_training = model.training
    model.eval()
    frozen = freeze(copy.deepcopy(model), passages[:1])
    losses = [
        float(running(passages[1:], labels=passages[1:], use_cache=False, return_logits=False).loss)
        for running in (frozen, model)
    ]
    model.train(was_training)
    return {
        "G_variation": variation(deductive_outputs(model, passages).G_LM).tolist(),
        "G_frozen_difference": losses[0] - losses[1],
    }


class _HandOff(TrainerCallback):
    def __init__(self, step: int, trainer: PldrTrainer) -> None:
        self.step = step
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.trainer.model.config.operator == "learned":
            self.trainer.hand_off()


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

    def close(self) -> None:
        self._exit.close()
