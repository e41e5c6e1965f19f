"""The curves of a training run, while it goes on and afterwards."""

from pathlib import Path
from typing import Any

from pldr.files import read_json, read_json_lines


def curves(run: Path) -> dict[str, Any]:
    """Log lines of a run's folder.

    Returns:
        steps: those with a training loss; evaluations: those with a validation loss, and what was measured of the operator;
        recipe; ended: whether the model is there.

    Raises:
        FileNotFoundError, ValueError: no log, or not one of a training.
    """
    lines: list[dict[str, Any]] = [line for _, line in read_json_lines(run / "log.jsonl") if isinstance(line, dict)]
    recipe = run / "recipe.json"
    return {
        "steps": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line],
        "recipe": read_json(recipe) if recipe.is_file() else None,
        "ended": (run / "config.json").is_file(),
    }
