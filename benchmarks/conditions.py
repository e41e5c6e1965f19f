"""Under what a benchmark was measured: it belongs to every record."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

from pldr.checkpoints.certificate import commit, versions
from pldr.files import to_json, write_json


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    return {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        **versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def record(result: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and write it to the file that is named, if one is, whole."""
    if output is not None:
        write_json(output, result, indent=1)
    print(to_json(result))


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().partition("model name")[2].splitlines() if cpuinfo.exists() else []
    return names[0].lstrip("\t :") if names else platform.processor() or platform.machine()
