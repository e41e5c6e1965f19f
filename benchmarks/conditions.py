"""Under what a benchmark was measured: it belongs to every record."""

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import pldr


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(), "pldr": pldr.__version__, "commit": commit.stdout.strip(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().partition("model name")[2].splitlines() if cpuinfo.exists() else []
    return names[0].lstrip("\t :") if names else platform.processor() or platform.machine()
