"""transformers' Trainer for PLDR-LLMs: the published optimisation, what to log, and checkpoints that can be trusted."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.initialization import no_init_weights

from pldr.data.rows import TokenRows, TokenStream
from pldr.deductive import dag_loss, deductive_outputs
from pldr.evaluation.modes import operator_metrics
from pldr.files import read_json, write_json
from pldr.modeling_pldr import PldrForCausalLM
from pldr.recipe import Recipe
from pldr.training.callbacks import Stops, tensorboard_callback
from pldr.training.checkpoint import (
    RECIPE,
    STATE,
    CheckpointWriter,
    SavedTensors,
    checkpoints,
    load_optimizer,
    optimizer_tensors,
    step_of,
)
from pldr.training.folder import add_to_log, described, log_lines
from pldr.training.graph import GraphedStep, may_be_graph
from pldr.training.operators import keep_operator
from pldr.training.optimizer import BoundedAdamW
from pldr.training.parallel import (
    ShardedForward,
    average_gradients,
    clip_by_norm,
    hide_from_ddp,
    local,
    shard,
    whole_parameters,
)
from pldr.training.randomness import random_file, read_random_states, save_random_states, set_random_states
from pldr.training.skipping import StepJudge, largest_gradient

# Held-out passages that an evaluation measures the operator on.
PROBED = 16
ADVICE = "lower optimization.learning_rate or raise optimization.warmup_steps"


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """A recipe in the Trainer's terms."""
    o = recipe.optimization
    arguments = TrainingArguments(
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
        max_grad_norm=o.clip_norm or 0.0,
        bf16=o.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Else each step would begin with waiting for the device to end the one before.
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        # Every parameter takes part in each loss.
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,  # it would wait for each step; see `StepJudge`
        eval_strategy="no" if recipe.eval_steps is None else "steps",
        eval_steps=recipe.eval_steps,
        save_strategy="no" if recipe.save_steps is None else "steps",
        save_steps=recipe.save_steps or 500,
        prediction_loss_only=True,
        report_to=[name for name in recipe.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # Else the Trainer would spread each batch over all devices (DataParallel) without being asked.
        arguments._n_gpu = 1
    return arguments


def compile_layers(model: PldrForCausalLM) -> None:
    """Compile a model's layers, in place: one graph for all, where compiling the whole model would unroll them."""
    # Torch would cut each layer's graph where a bucket of DDP's is full, to send it early. Layers are such pieces already.
    torch._dynamo.config.optimize_ddp = False
    # A layer has up to 150 modules; to check at each call that nobody changed them would take longer than the call.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    for layer in model.model.layers:
        layer.compile(options=options)


class PldrTrainer(Trainer):
    """transformers' Trainer with the published optimisation: clipping by value, decay on every parameter, DAG loss.

    Every log line, evaluations included, also goes to a JSON-lines file.

    Attributes:
        start: the checkpoint that the run goes on from, whose weights the model came with; None at its beginning.
        totals: sums over the run so far: sequences, skipped steps, those skipped since the last that counted; up to the last
            log line: steps, those of them that counted, loss and accuracy (each times those).
        new_sequences: those of this call alone.
        stop_signal: set by a signal handler of this process.
        stopped_by: the signal that all processes have agreed on; the run ended, with a checkpoint.
        must_hand_off: the run ended, with a checkpoint, where the recipe hands the operator over.
    """

    model: PldrForCausalLM  # never wrapped; `model_wrapped` is
    optimizer: Any  # accelerate wraps it

    def __init__(self, recipe: Recipe, folder: Path, *, start: Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.folder = folder
        self.start = start
        counts = ("sequences", "steps", "counted", "skipped", "skipped_in_a_row")
        self.totals: dict[str, Any] = {**dict.fromkeys(counts, 0), "loss": 0.0, "accuracy": 0.0}
        self.new_sequences = 0
        self.stop_signal: int | None = None
        self.stopped_by: int | None = None
        self.must_hand_off = False
        self.dag_coefficients = recipe.optimization.dag_coefficients
        self._parameters: int | None = None
        self._whole: list[torch.nn.Parameter] = []  # those that are averaged by themselves
        self.begun = time.perf_counter()  # where the steps of this call begin
        self.writer = CheckpointWriter(
            folder, PartialState(), keep=recipe.keep_checkpoints, background=recipe.async_save
        )
        self._partial: Path | None = None  # the checkpoint that is being written
        # Sums over batches: accuracy times targets, targets. Those of a full batch are 1, so that both stay exact.
        self._guesses = torch.zeros(2, device=self.args.device)
        self._most_targets = recipe.optimization.batch_size * recipe.data.sequence_length
        self._guesses_before: torch.Tensor | None = None  # those before the step at hand
        self.judge = StepJudge(self.accelerator)
        self._graphed: GraphedStep | None = None
        if may_be_graph(recipe.optimization, self.args.device, self.args.world_size):
            self._graphed = GraphedStep(self._compute_whole_step, self.model.parameters())
        self._last: dict[str, float] | None = None  # loss and accuracy of the last log line
        self.add_callback(Stops(self))
        if "tensorboard" in recipe.report_to and self.is_world_process_zero():
            self.add_callback(tensorboard_callback(folder / "tensorboard"))

    # --- the processes of a run -------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        return self.recipe.distributed.sharding != "none" and self.args.world_size > 1

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW of the recipe; decay on every parameter. The Trainer's own steps them one by one where only some are cut."""
        if self.optimizer is None:
            if self.args.world_size > 1:
                self._whole = whole_parameters(self.model)
                if self.sharded:  # first, because it replaces the parameters that the optimiser is made of
                    shard(self.model, self.recipe.distributed, self.args.device, self._whole)
                else:
                    hide_from_ddp(self.model, self._whole)
            trained = (p for p in self.model.parameters() if p.requires_grad)
            self.optimizer = BoundedAdamW(trained, self.recipe.optimization, graphed=self._graphed is not None)
        return self.optimizer

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if not self.sharded:
            return super()._wrap_model(model, *args, **kwargs)
        return ShardedForward(model, self.accelerator.autocast) if model is self.model else model

    def whole_model(self) -> PldrForCausalLM:
        """The model itself or, of a sharded one, a copy put together (on every process: they must all ask)."""
        if not self.sharded:
            return self.model
        with no_init_weights():
            whole = PldrForCausalLM(self.model.config)
        tensors = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in self.model.state_dict().items()}
        whole.load_state_dict(tensors)
        return whole.to(self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        if self._parameters is None:  # counted once, and not at every step
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters

    # --- one step ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # Only the loss is wanted, in training as in evaluation: all logits of a batch would fill gigabytes.
        inputs = {**inputs, "return_logits": False}
        for name in ("row", "labels"):  # its targets are `shift_labels`
            inputs.pop(name, None)
        regularised = bool(self.dag_coefficients) and model.training
        if regularised:
            inputs["output_deductive_outputs"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        targets = (inputs["shift_labels"] != -100).sum() / self._most_targets
        self._guesses += torch.stack((outputs.accuracy.detach() * targets, targets))
        if regularised:
            # The cross-entropies of accumulated batches add up to a mean; so must these. The last step of an epoch has
            # fewer batches.
            for term in self._dag_terms(outputs):
                loss = loss + term / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _dag_terms(self, outputs: Any) -> Iterator[torch.Tensor]:
        """What DAG regularisation adds to a batch's cross-entropy."""
        for name, coefficient in self.dag_coefficients.items():
            yield coefficient * dag_loss(torch.stack([getattr(layer, name) for layer in outputs.deductive_outputs]))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self._guesses_before is None:
            self._guesses_before = self._guesses.clone()
        self.new_sequences += len(inputs["input_ids"]) * self.args.world_size
        self.totals["sequences"] += len(inputs["input_ids"]) * self.args.world_size
        rows = inputs.pop("row")
        if num_items_in_batch is not None:
            inputs["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        largest = None
        if self._graphed is None:
            loss = self._compute_gradients(inputs)
        else:
            loss, largest = self._graphed(inputs)
        self.judge.add(loss, rows)
        if not self.accelerator.sync_gradients:  # more batches of the step are to come
            return torch.zeros_like(loss)
        average_gradients(self._whole)
        if largest is None:
            largest = largest_gradient(self.model.parameters())
        loss, skipped = self.judge.judge(self.state.global_step + 1, largest)
        # As a gradient scaler tells fused AdamW, which then changes no weight, no moment and no count of steps.
        adamw = getattr(self.optimizer, "optimizer", self.optimizer)
        adamw.gradients_stay = self._graphed is not None and self._graphed.replayed
        adamw.found_inf = skipped.cpu() if self.sharded and self.recipe.distributed.cpu_offload else skipped
        self._guesses.copy_(torch.where(skipped > 0, self._guesses_before, self._guesses))  # where a graph adds to it
        self._guesses_before = None
        return torch.where(skipped > 0, 0.0, loss)

    def _compute_gradients(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of a batch; its gradients are left with the parameters, and its guesses are counted."""
        batch = dict(inputs)
        count = batch.pop("num_items_in_batch", None)
        return super().training_step(self.model_wrapped, batch, count)

    def _compute_whole_step(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a batch that is a step of its own, in one process, and the largest gradient."""
        return self._compute_gradients(inputs), largest_gradient(self.model.parameters())

    def check_losses(self) -> None:
        """Look at the steps since the last look: once in a while, so that the device need not be waited for.

        Each that was skipped gets a line in the log.

        Raises:
            FloatingPointError: more in a row than the recipe allows.
        """
        o = self.recipe.optimization
        limit = min(o.skip_nonfinite, o.steps // 2)  # else a short run could end as if it had learned
        for skipped in self.judge.look():
            if skipped is None:
                self.totals["skipped_in_a_row"] = 0
                continue
            self.totals["skipped"] += 1
            self.totals["skipped_in_a_row"] += 1
            if self.is_world_process_zero():
                line = {"skipped_loss": str(skipped.loss), "skipped_rows": skipped.rows}
                add_to_log(self.folder, {"step": skipped.step, **line})
            if (count := self.totals["skipped_in_a_row"]) > limit:
                many = (
                    f"{count} steps in a row were skipped, and {limit} may be (optimization.skip_nonfinite): "
                    if limit
                    else ""
                )
                raise FloatingPointError(f"{many}{skipped}; {self._last_checkpoint()}; {ADVICE}")

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if not self.sharded:
            return super()._clip_grad_norm(model)
        return clip_by_norm(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | None:
        # Without clipping by norm the Trainer would compute the norm for the log alone, at every step.
        if self.recipe.optimization.clip_norm is None or grad_norm is None:
            return None
        return grad_norm

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not isinstance(self.train_dataset, TokenStream):
            return super().get_train_dataloader()
        # A stream shares itself out among processes and data workers.
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # --- numbers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: TokenRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and accuracy over every target of held-out rows; with a learned operator, `operator_metrics` too.

        With DAG regularisation also the loss with the regulariser, its mean over rows: what is published of such a model.
        The Trainer's own loop would count rows twice to fill the last batches of several processes.
        """
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        # Loss, right guesses, targets; regulariser, rows.
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped
        model.eval()
        # Not compiled: other batch sizes and no gradients would compile everything anew.
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(rows), size * ranks):
                first = start + self.args.process_index * size
                mine = [rows[row] for row in range(first, min(first + size, len(rows)))]
                # A process with nothing left takes part in the forward, which may be a common one, and counts nothing.
                batch = self._prepare_inputs(self.data_collator(mine or [rows[0]]))
                labels = batch["shift_labels"] if mine else torch.full_like(batch["shift_labels"], -100)
                with self.compute_loss_context_manager():
                    outputs = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"),
                                    shift_labels=labels, return_logits=False, num_items_in_batch=1,
                                    output_deductive_outputs=bool(self.dag_coefficients))  # fmt: skip
                targets = (labels != -100).sum()
                sums[:3] += torch.stack((outputs.loss, outputs.accuracy * targets, targets))
                sums[3] += sum(self._dag_terms(outputs)) * len(mine)
                sums[4] += len(mine)
            loss, correct, targets, added, count = self.accelerator.reduce(sums, "sum").tolist()
            if not math.isfinite(loss):
                where = f"step {self.state.global_step}; {self._last_checkpoint()}"
                raise FloatingPointError(f"the held-out loss became {loss} at {where}; {ADVICE}")
            metrics = {
                f"{metric_key_prefix}_loss": loss / max(targets, 1),
                f"{metric_key_prefix}_accuracy": correct / max(targets, 1),
            }
            if self.dag_coefficients:
                regularised = metrics[f"{metric_key_prefix}_loss"] + added / max(count, 1)
                metrics[f"{metric_key_prefix}_regularised_loss"] = regularised
            probed = rows.full_rows(PROBED)
            extra = {}
            if self.model.config.operator == "learned" and len(probed) >= 2:
                whole = self.whole_model()
                extra = operator_metrics(whole, probed.to(self.args.device))
                self._keep_operator(whole, probed[:1, :-1].to(self.args.device))
        model.train()
        self.log(metrics)
        if extra:
            self.log(extra)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_operator(self, model: PldrForCausalLM, ids: torch.Tensor) -> None:
        """Keep what G_LM is for a text [1, T]."""
        was_training = model.training
        G_LM = deductive_outputs(model.eval(), ids).G_LM
        model.train(was_training)
        if self.is_world_process_zero():
            keep_operator(self.folder, self.state.global_step, G_LM[:, 0])

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.check_losses()
        if "loss" in logs:
            self._complete(logs)
        logs.pop("train_loss", None)  # of this call alone, and of a resumed run's in another way in each release
        if "train_runtime" in logs:  # by a clock that may be set back, as are the speeds that the summary has, too
            for name in [name for name in logs if name.endswith("_per_second")]:
                del logs[name]
            logs["train_runtime"] = round(time.perf_counter() - self.begun, 4)
        flat = {k: v for k, v in logs.items() if not isinstance(v, list)}
        flat |= {f"{k}/layer_{i}": x for k, v in logs.items() if isinstance(v, list) for i, x in enumerate(v)}
        # First, because it says in one line where the folder is gone, and TensorBoard's thread in many.
        if self.is_world_process_zero():
            add_to_log(self.folder, {"step": self.state.global_step, **logs})
        super().log(flat, *args, **kwargs)

    def _complete(self, logs: dict[str, Any]) -> None:
        """Make the Trainer's loss, the mean over steps, that over steps that counted; and add what else a log line has."""
        steps = self.state.global_step - self.totals["steps"]
        counted = self.state.global_step - self.totals["skipped"] - self.totals["counted"]
        self.totals["steps"] += steps
        self.totals["counted"] += counted
        logs["loss"] *= steps / max(counted, 1)
        logs["accuracy"] = self.accuracy()
        for name in ("loss", "accuracy"):
            self.totals[name] += logs[name] * counted
            if counted:
                logs[f"global_{name}"] = self.totals[name] / self.totals["counted"]
            else:
                del logs[name]
        if counted:
            self._last = {name: logs[name] for name in ("loss", "accuracy")}
        if self.totals["skipped"]:
            logs["skipped_steps"] = self.totals["skipped"]

    def accuracy(self) -> float:
        """Mean over the targets since the last call, of all processes; 0 where there was none, as the loss is then."""
        summed, count = self.accelerator.reduce(self._guesses, "sum").tolist()
        self._guesses.zero_()
        return summed / count if count else 0.0

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: object) -> str:
        return str(self.folder if self._partial is None else self._partial.parent)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        self.check_losses()
        self._check_weights()
        # The mean over processes, which each then goes on from.
        tr_loss = self.accelerator.reduce(self._tr_loss.clone(), "mean").item()
        guesses = self.accelerator.reduce(self._guesses.clone(), "mean").tolist()
        with self.writer.checkpoint(self.state.global_step) as self._partial:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                state = {"totals": self.totals, "guesses": guesses, "tr_loss": tr_loss, "last": self._last,
                         "last_logged": self._globalstep_last_logged, "log_lines": log_lines(self.folder)}  # fmt: skip
                write_json(self._partial / STATE, state)
                write_json(self._partial / RECIPE, described(self.recipe, self.args.world_size))
        self._partial = None

    def _check_weights(self) -> None:
        """
        Raises:
            FloatingPointError: a weight is NaN or infinite, on whichever process; such a checkpoint would be no good.
        """
        finite = torch.stack(
            [torch.isfinite(local(p)).all().to(self.args.device) for p in self.model.parameters()]
        ).all()
        if self.accelerator.reduce(finite.float(), "mean") < 1:
            raise FloatingPointError(
                f"weights became NaN or infinite by step {self.state.global_step}; {self._last_checkpoint()}; {ADVICE}"
            )

    def _last_checkpoint(self) -> str:
        saved = checkpoints(self.folder)
        return f"last good checkpoint: {saved[0]}" if saved else "no checkpoint was written yet"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's tensors and configuration into the checkpoint that is being written, each rank its own shards."""
        assert self._partial is not None
        self.writer.save(self.model.state_dict(), self._partial, "model")
        if self.is_world_process_zero():
            self.model.config.save_pretrained(self._partial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer alone: the learning rate follows from the recipe and the step."""
        self.writer.save(optimizer_tensors(self._names(), self.optimizer), Path(output_dir), "optimizer")

    def _save_rng_state(self, output_dir: str) -> None:
        save_random_states(Path(output_dir) / random_file(self.args.process_index))

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing: the model came with its weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self._names(), self.optimizer, SavedTensors(Path(checkpoint), "optimizer"))
        schedule = self.lr_scheduler
        schedule.last_epoch = step_of(Path(checkpoint))
        schedule._step_count = schedule.last_epoch + 1
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # A run of fewer processes has left the others nothing.
            file = Path(checkpoint) / random_file(self.args.process_index)
            if file.is_file():
                set_random_states(read_random_states(file))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: no precision of ours needs one."""

    def restore_run(self) -> None:
        """What the Trainer forgets of the checkpoint it goes on from: sums that the next log line continues."""
        assert self.start is not None
        state = read_json(self.start / STATE)
        self.totals, self._last = state["totals"], state["last"]
        self._guesses += torch.tensor(state["guesses"], device=self._guesses.device)
        self._tr_loss += state["tr_loss"]
        self._globalstep_last_logged = state["last_logged"]

    def restore_finished(self) -> None:
        """Stand as after the last step, which the checkpoint was written after."""
        assert self.start is not None
        self.state.global_step = step_of(self.start)
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self.restore_run()

    def last_losses(self) -> dict[str, float]:
        """Loss and accuracy of the last log line; of all steps, where there is none."""
        if self._last is not None:
            return self._last
        counted = self.state.global_step - self.totals["skipped"]
        loss = self.accelerator.reduce(self._tr_loss.clone(), "mean").item() / counted if counted else math.nan
        return {"loss": loss, "accuracy": self.accuracy()}
