"""The processes of torchrun share an evaluation: each scores some batches, and all get every score."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        group: through which they exchange what they found, on the host; None of a process that works alone.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def share(self, batches: Iterable[T]) -> Iterator[T]:
        """Those of the batches that are this process's. They stay what they are, and so do their numbers."""
        return islice(batches, self.rank, None, self.count)

    def together(self, found: dict[Any, Any]) -> dict[Any, Any]:
        """What all of them found, on each: they must all ask."""
        if self.group is None:
            return found
        parts: list[dict[Any, Any]] = [{}] * self.count
        torch.distributed.all_gather_object(parts, found, group=self.group)
        return {key: value for part in parts for key, value in part.items()}


def join() -> Processes:
    """The processes that torchrun started, each with a GPU of its own where there are some; or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    waits = timedelta(hours=24)  # for whichever has most to do
    if torch.distributed.is_initialized():
        group = torch.distributed.new_group(backend="gloo", timeout=waits)
    else:
        torch.distributed.init_process_group("gloo", timeout=waits)
        group = torch.distributed.group.WORLD
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)
