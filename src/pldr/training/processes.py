"""What the processes of a run do together."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(process: PartialState, work: Callable[[], T]) -> T:
    """What the main process's work returns, on every process; they wait for it. What it raises is raised on all.

    Raises:
        ValueError, OSError: the work's.
    """
    outcome: list[T | None] = [None]
    error: list[Exception | None] = [None]
    if process.is_main_process:
        try:
            outcome = [work()]
        except (ValueError, OSError) as raised:
            error = [raised]
    if process.num_processes > 1:
        broadcast_object_list(error)
        broadcast_object_list(outcome)
    if error[0] is not None:
        raise error[0]
    return outcome[0]  # type: ignore[return-value]
