"""Under what a benchmark was measured: it belongs to every record."""

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from pldr.checkpoints.certificate import versions


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        **versions(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().partition("model name")[2].splitlines() if cpuinfo.exists() else []
    return names[0].lstrip("\t :") if names else platform.processor() or platform.machine()
