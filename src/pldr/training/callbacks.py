"""What happens between the steps of a training: progress, clipping, stopping."""

import contextlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from pldr.recipe import Recipe

if TYPE_CHECKING:
    from pldr.training.trainer import PldrTrainer

# Several processes agree on a signal every so many steps; one looks after each.
_SIGNAL_STEPS = 10


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """
    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._start is not None:
            self.trainer.restore_run(self.trainer._start)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.trainer._broken_step:  # without gradients AdamW leaves weights and moments as they are
            for parameter in model.parameters():
                parameter.grad = None
            self.trainer._broken_step = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        step = trainer.recipe.optimization.handoff_step
        trainer.must_hand_off = state.global_step == step and trainer.model.config.operator == "learned"
        stopped = trainer.stop_signal or 0
        if args.world_size > 1:
            if state.global_step % _SIGNAL_STEPS:
                stopped = 0
            else:
                everyone = torch.tensor(stopped, device=args.device)
                torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX)
                stopped = int(everyone)
                if stopped:  # and a signal that came meanwhile is not forgotten
                    trainer.stop_signal = stopped
        trainer.interrupted = bool(stopped)
        if trainer.must_hand_off or stopped:
            control.should_save = control.should_training_stop = True


class ClipByValue(TrainerCallback):
    def __init__(self, bound: float) -> None:
        self.bound = bound

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), self.bound)


class ProgressBar(TrainerCallback):
    """One line on standard error: steps, loss, learning rate, tokens a second, time left. Use it as a context.

    Attributes:
        last: the last logged loss and accuracy.
    """

    def __init__(self, recipe: Recipe, *, enabled: bool) -> None:
        self.last = {"loss": math.nan, "accuracy": math.nan}
        self.enabled = enabled
        o = recipe.optimization
        self.tokens_per_step = o.batch_size * o.accumulation * recipe.data.sequence_length
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()  # also after an error, or the terminal would keep the bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = self._exit.enter_context(Progress(*columns, console=Console(stderr=True), disable=not self.enabled))
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.first, self.start = state.global_step, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.start
        speed = self.tokens_per_step * (state.global_step - self.first) * args.world_size / seconds
        self.bar.update(
            self.task, completed=state.global_step, description=f"loss {self.last['loss']:.3f} · {speed:,.0f} tokens/s"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in self.last:
            self.last[name] = (logs or {}).get(name, self.last[name])
