"""The operator while it is learned: G_LM of a held-out text, kept at each evaluation of a run."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pldr.files import whole_file

OPERATORS = "operators"


def keep_operator(folder: Path, step: int, G_LM: torch.Tensor) -> None:
    """Keep G_LM [L, H, D, D] of an evaluation, in bfloat16, which has its range; `pldr.load_predefined_G` reads it.

    Raises OSError: the disk is full, or the folder is gone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: is gone")
    with whole_file(folder / OPERATORS / f"step-{step}.safetensors") as partial:
        save_file({"G_LM": G_LM.to("cpu", torch.bfloat16).contiguous()}, partial)


def operators(folder: Path) -> dict[int, Path]:
    """Files of `keep_operator`, by their steps, in order."""
    found = {path.stem.removeprefix("step-"): path for path in (folder / OPERATORS).glob("step-*.safetensors")}
    steps = {int(step): path for step, path in found.items() if step.isascii() and step.isdigit()}
    return dict(sorted(steps.items()))
