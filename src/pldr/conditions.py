"""Under what something was measured or written: versions, commit and device."""

import platform
import shutil
import subprocess
from pathlib import Path

import torch
import transformers

from pldr import __version__


def versions() -> dict[str, str]:
    """Of pldr and of what it computes with."""
    return {"pldr": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def commit() -> str | None:
    """That of the checkout which this package is part of, and whether the package was changed since; None where it was
    installed from elsewhere.
    """

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    if shutil.which("git") is None or not git("ls-files", "--", "."):
        return None
    changes = " with changes" if git("status", "--porcelain", "--", ".") else ""
    return git("rev-parse", "--short", "HEAD") + changes


def device_name(device: str) -> str:
    """What "cpu" or "cuda:1" is, in its maker's words where the system tells them."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().partition("model name")[2].splitlines() if cpuinfo.exists() else []
    return names[0].lstrip("\t :") if names else platform.processor() or platform.machine()
