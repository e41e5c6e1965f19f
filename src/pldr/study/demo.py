"""The paper's main claim on two CPU cores: cache and freeze the operator that a PLDR-LLM learned, and compare."""

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pldr.cache import make_cache
from pldr.checkpoints.load import load_model
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.deductive import deductive_outputs, log_determinant, numerical_rank, variation
from pldr.files import check_output, whole_folder, write_json
from pldr.generation import generate_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT, STORIES
from pldr.operator import freeze
from pldr.plots import plot_operators
from pldr.recipe import Recipe, load_recipe
from pldr.tokenizer import load_tokenizer
from pldr.training.run import source_of, train

STORY_PROMPT = "The old man looked out over the sea and"
REFERENCE_PROMPT = "The list of names is a comma-separated list of expressions. An expression"
PASSAGES = 32
STORY_LENGTH = 512  # tokens of a passage, as in its training
NEW_TOKENS = 96
REPEATS = 3
_RECORD = "demo.json"


def run_demo(output: Path, recipe_name: str | None = None) -> dict[str, Any]:
    """Measure what caching and freezing its operator changes, of the model that comes along and of a newly trained one.

    Args:
        output: folder; an earlier demo in it is replaced, anything else is not.
        recipe_name: also train this recipe's model into ``output/model`` first (see `pldr.recipe.find_recipe`).

    Returns:
        The numbers of the tables, as `pldr.tables.demo_view` shows them and ``output/demo.json`` holds them: "stories" and, with a
        recipe, "trained".

    Raises:
        FileExistsError: the folder holds something that no demo wrote.
        ValueError: a recipe without validation data or without a learned operator.
    """
    start = time.perf_counter()
    recipe = None if recipe_name is None else _checked_recipe(recipe_name, output)
    check_output(output, overwrite=(output / _RECORD).is_file())
    output.mkdir(parents=True, exist_ok=True)
    (output / _RECORD).touch()  # the mark of a folder that a later demo may replace

    model, tokenizer = load_model(STORIES), load_tokenizer(STORIES)
    passages = read_passages(Source([str(HELD_OUT)]), tokenizer, STORY_LENGTH, PASSAGES)
    # Frozen from one passage, compared on all the others.
    result: dict[str, Any] = {
        "stories": measure(model, tokenizer, passages[1:], passages[:1], STORY_PROMPT, output / "stories")
    }
    if recipe is not None:
        training = train(recipe, overwrite=True)
        model, tokenizer = load_model(recipe.output), load_tokenizer(recipe.output)
        length = recipe.data.sequence_length
        passages = read_passages(source_of(recipe.data, "validation"), tokenizer, length, PASSAGES)
        calibration = read_passages(source_of(recipe.data, "train"), tokenizer, length, 1)
        measured = measure(model, tokenizer, passages, calibration, REFERENCE_PROMPT, output / "trained")
        result["trained"] = measured | {"training": training}
    result |= {"folder": str(output), "seconds": time.perf_counter() - start}
    write_json(output / _RECORD, result, indent=1)
    return result


def _checked_recipe(name: str, output: Path) -> Recipe:
    recipe = load_recipe(name, [f"output={output / 'model'}"])
    if not recipe.data.validation or recipe.optimization.handoff_step is not None:
        raise ValueError("demo: the recipe needs data.validation, and a learned operator to its end (no handoff_step)")
    if recipe.model.G_LM is not None or recipe.model.config.get("operator", "learned") != "learned":
        raise ValueError("demo: the recipe must have a learned operator")
    return recipe


def measure(
    model: Any, tokenizer: Any, passages: torch.Tensor, calibration: torch.Tensor, prompt: str, output: Path
) -> dict[str, Any]:
    """What `run_demo` reports of one model; also writes its frozen form and a picture of its operators.

    Args:
        model: with a learned operator.
        tokenizer: of the model.
        passages: [B, T], held out.
        calibration: [B, T], what G_LM is frozen from.
        prompt: continued in every mode.
        output: begins the names of what is written: "…-frozen" and "…-G_LM.png".
    """
    frozen = freeze(copy.deepcopy(model), calibration)
    with whole_folder(f"{output}-frozen", overwrite=True) as saved:
        frozen.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    torch.manual_seed(0)
    untrained = deductive_outputs(PldrForCausalLM(model.config), passages).G_LM
    G_LM = deductive_outputs(model, passages).G_LM
    plot_operators(
        {"untrained": untrained[:, 0], "trained": G_LM[:, 0], "trained, other text": G_LM[:, 1]},
        Path(f"{output}-G_LM.png"),
        layers=sorted({0, len(G_LM) // 2, len(G_LM) - 1}),
        title="G_LM before and after training, on two held-out passages",
    )
    return {
        # G_LM is cached from the first half of each passage; losses are taken over the second, in every mode alike.
        "losses": losses(model, frozen, passages, prefix=passages.shape[1] // 2),
        "operator": [
            {
                "layer": layer,
                "variation": float(variation(G_LM)[layer]),
                "untrained_variation": float(variation(untrained)[layer]),
                "log10_determinant": float(log_determinant(G_LM[layer])[1].mean()),
                "rank": float(numerical_rank(G_LM[layer]).double().mean()),
            }
            for layer in range(len(G_LM))
        ],
        "head_dim": model.config.head_dim,
        "prompt": prompt,
        "generation": generations(model, frozen, tokenizer, prompt),
    }


@torch.no_grad()
def losses(model: Any, frozen: Any, passages: torch.Tensor, prefix: int) -> dict[str, float]:
    """Mean cross-entropy (nats a token) of everything after the first `prefix` tokens, by where G_LM comes from.

    Args:
        model: with a learned operator.
        frozen: the same model with a constant one.
        passages: [B, T].

    Returns:
        "full": from the whole passage, later tokens included; "cached": from the prefix alone; "frozen": the constant.
    """
    targets = passages[:, prefix:]

    def loss(logits: torch.Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), targets[:, 1:].flatten()))

    cache = make_cache(model.config)
    model(passages[:, :prefix], past_key_values=cache)
    return {
        "full": loss(model(passages, use_cache=False).logits[:, prefix:]),
        "cached": loss(model(targets, past_key_values=cache).logits),
        "frozen": loss(frozen(passages, use_cache=False).logits[:, prefix:]),
    }


def generations(model: Any, frozen: Any, tokenizer: Any, prompt: str) -> list[dict[str, Any]]:
    """The same greedy continuation in each mode: tokens a second (median of repeats, after a warm-up) and the text."""
    modes = [("no cache", model, "none"), ("KV", model, "kv"), ("KV+G", model, "kv+g"), ("frozen G", frozen, "kv")]
    rows: list[dict[str, Any]] = []
    for name, running, cache in modes:
        settings: dict[str, Any] = {"cache": cache, "max_new_tokens": NEW_TOKENS, "ignore_end": True}
        generate_text(running, tokenizer, prompt, **(settings | {"max_new_tokens": 4}))
        runs = [generate_text(running, tokenizer, prompt, **settings) for _ in range(REPEATS)]
        rows.append(
            {
                "mode": name,
                "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
                "same_text": runs[0].token_ids == rows[0]["token_ids"] if rows else True,
                "token_ids": runs[0].token_ids,
                "text": runs[0].text,
            }
        )
    return rows
