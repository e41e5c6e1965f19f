"""Under what a benchmark was measured: it belongs to every record."""

import time
from pathlib import Path
from typing import Any

import torch

from pldr.conditions import commit, device_name, versions
from pldr.files import to_json, write_json


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    return {
        "device": device_name(device),
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
