"""What the processes of a run do together."""

from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(process: PartialState, work: Callable[[], T]) -> T:
    """What the main process's work returns, on every process; they wait for it. What it raises is raised on all.

    Raises:
        ValueError, OSError: the work's.
    """
    shared: list[object] = [None, None]  # result, error
    if process.is_main_process:
        try:
            shared[0] = work()
        except (ValueError, OSError) as error:
            shared[1] = error
    broadcast_object_list(shared)
    result, fault = shared
    if isinstance(fault, Exception):
        raise fault
    return cast(T, result)
