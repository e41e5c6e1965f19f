"""Steps whose loss or gradients are NaN or infinite: left out on the device, which is not waited for, and counted later."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from pldr.training.parallel import local


@dataclass(frozen=True)
class SkippedStep:
    """A step that left weights and moments as they were.

    Attributes:
        step: its number, from 1.
        loss: the first one of a process that is not finite; its own where a gradient alone is not.
        rows: of the data, those of all processes.
    """

    step: int
    loss: float
    rows: list[int]

    def __str__(self) -> str:
        what = "a gradient" if math.isfinite(self.loss) else "the loss"
        became = "NaN or infinite" if math.isfinite(self.loss) else str(self.loss)
        return f"{what} became {became} at step {self.step} (data rows {', '.join(map(str, self.rows))})"


def largest_gradient(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The largest element of all gradients, regardless of sign: a scalar, NaN or infinite if one is."""
    return torch.nn.utils.get_total_norm([local(p.grad) for p in parameters if p.grad is not None], math.inf)


class StepJudge:
    """Decides for all processes of a run alike which steps count."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []  # loss and rows, of the step at hand
        # Not looked at yet: step, 1 where it is skipped, loss, rows.
        self._judged: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """A batch of the step at hand."""
        self._batches.append((loss, rows))

    @torch.no_grad()
    def judge(self, step: int, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the step that ends here is skipped.

        Args:
            step: its number.
            largest: see `largest_gradient`, of gradients that are complete and not yet bounded.

        Returns:
            The step's loss on this process, the sum over its batches; and 1 if it or a gradient is NaN or infinite on any
            process, else 0: float32 scalars on the device of the loss.
        """
        losses, rows = zip(*self._batches, strict=True)
        self._batches = []
        loss = torch.stack(losses).sum()
        skipped = (~(torch.isfinite(loss) & torch.isfinite(largest.to(loss.device)))).float()
        if self._accelerator.num_processes > 1:
            torch.distributed.all_reduce(skipped, torch.distributed.ReduceOp.MAX)
        self._judged.append((step, skipped, loss, torch.cat(rows)))
        return loss, skipped

    def look(self) -> Iterator[SkippedStep | None]:
        """Each step judged since the last look, None where it counted. Waits for the device; all processes look at once."""
        judged, self._judged = self._judged, []
        verdicts = torch.stack([skipped for _, skipped, _, _ in judged]).tolist() if judged else []
        for (step, _, loss, rows), skipped in zip(judged, verdicts, strict=True):
            yield self._skipped(step, loss, rows) if skipped else None

    def _skipped(self, step: int, loss: torch.Tensor, rows: torch.Tensor) -> SkippedStep:
        losses: Any = self._accelerator.gather(loss[None])
        of_all: Any = self._accelerator.gather(rows)
        broken = [value for value in losses.tolist() if not math.isfinite(value)]
        return SkippedStep(step, broken[0] if broken else loss.item(), of_all.tolist())
