"""What happens between the steps of a training: progress, stopping."""

import contextlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pldr.recipe import Recipe

if TYPE_CHECKING:
    from pldr.training.trainer import PldrTrainer

# Several processes agree on a signal every so many steps; one looks after each.
_SIGNAL_STEPS = 10


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Raises ModuleNotFoundError: TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "report_to: needs tensorboard: pip install 'pldr[train]', or set report_to=[] in the recipe"
        ) from None
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(tb_writer=SummaryWriter(log_dir=str(folder)))


class Stops(TrainerCallback):
    """Ends the run, with a checkpoint, at a signal and at the hand-off; restores its sums where it goes on."""

    def __init__(self, trainer: "PldrTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, *event: object, **more: object) -> None:
        self.trainer.begun = time.perf_counter()
        if self.trainer.start is not None:
            self.trainer.restore_run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.writer.check()
        at_handoff = step == trainer.recipe.optimization.handoff_step
        trainer.must_hand_off = at_handoff and trainer.model.config.operator == "learned"
        trainer.stopped_by = self._agreed_signal(args, step)
        if trainer.must_hand_off or trainer.stopped_by:
            control.should_save = control.should_training_stop = True

    def _agreed_signal(self, args: TrainingArguments, step: int) -> int | None:
        """The signal that ends the run after this step: of several processes, all give the same."""
        if args.world_size == 1:
            return self.trainer.stop_signal
        if step % _SIGNAL_STEPS:
            return None
        highest = torch.tensor(self.trainer.stop_signal or 0, device=args.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest) or None


class ProgressBar(TrainerCallback):
    """One line on standard error: steps, loss, tokens per second, time left. Use it as a context."""

    def __init__(self, recipe: Recipe, *, enabled: bool) -> None:
        self.enabled = enabled
        o = recipe.optimization
        self.tokens_per_step = o.batch_size * o.accumulation * recipe.data.sequence_length
        self.loss = math.nan  # of the last log line
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # of a terminal that has hung up
            self._exit.close()  # also after an error, or the terminal would keep the bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *event: object, **more: object) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = self._exit.enter_context(Progress(*columns, console=Console(stderr=True), disable=not self.enabled))
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.first, self.start = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *event: object, **more: object) -> None:
        seconds = time.perf_counter() - self.start
        tokens = self.tokens_per_step * (state.global_step - self.first) * args.world_size
        speed = tokens / seconds if seconds else 0.0  # of a coarse clock
        self.bar.update(
            self.task, completed=state.global_step, description=f"loss {self.loss:.3f} · {speed:,.0f} tokens/s"
        )

    def on_log(self, *event: object, logs: dict[str, float], **more: object) -> None:
        self.loss = logs.get("loss", self.loss)
