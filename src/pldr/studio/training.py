"""A training run while it goes on and afterwards: its curves, and its operator at each evaluation."""

from pathlib import Path
from typing import Any

from pldr.files import read_json, read_json_lines


def curves(run: Path) -> dict[str, Any]:
    """Log lines of a run's folder.

    Returns:
        steps: those with a training loss; evaluations: those with a validation loss, and those with what was measured of the operator;
        operators: the steps whose G_LM is kept; recipe; ended: whether the model is there.

    Raises:
        FileNotFoundError, ValueError: no log, or not one of a training.
    """
    from pldr.training.operators import operators

    lines: list[dict[str, Any]] = [line for _, line in read_json_lines(run / "log.jsonl") if isinstance(line, dict)]
    recipe = run / "recipe.json"
    return {
        "steps": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line or "G_variation" in line],
        "operators": list(operators(run)),
        "recipe": read_json(recipe) if recipe.is_file() else None,
        "ended": (run / "config.json").is_file(),
    }


def operator(run: Path, step: int) -> dict[str, Any]:
    """G_LM of every head at an evaluation, as of `Workbench.grid`. Raises ValueError: none is kept of this step, or it is damaged."""
    from pldr.checkpoints.load import load_predefined_G
    from pldr.studio.workbench import all_heads
    from pldr.training.operators import operators

    files = operators(run)
    if step not in files:
        raise ValueError(f"step: {run.name} has kept no operator of step {step}")
    return all_heads(load_predefined_G(files[step]))
