"""The paper's main claim on two CPU cores: cache and freeze the operator that a PLDR-LLM learned, and compare."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.info import model_facts
from pldr.checkpoints.load import load_model
from pldr.data.rows import read_passages, source_of
from pldr.data.sources import Source
from pldr.deductive import deductive_outputs, log_determinant, numerical_rank, variation
from pldr.evaluation.modes import MODES, OperatorModes
from pldr.files import check_output, require, whole_folder, write_json
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT, STORIES
from pldr.plots import plot_operators
from pldr.recipe import Recipe, load_recipe
from pldr.study.compress import factored_copy
from pldr.study.timing import TimedText, generations
from pldr.tables import Printable, demo_view
from pldr.tokenizer import load_tokenizer
from pldr.training.run import train as train_recipe

STORY_PROMPT = "The old man looked out over the sea and"
REFERENCE_PROMPT = "The list of names is a comma-separated list of expressions. An expression"
PASSAGES = 32
STORY_LENGTH = 512  # tokens of a passage, as in its training
NEW_TOKENS = 96
REPEATS = 3
_RECORD = "demo.json"


@dataclass(frozen=True)
class Demo(Printable):
    """What `run_demo` measured.

    Attributes:
        numbers: of the tables: "stories" and, where a recipe was trained, "trained" (see `measure`); "folder", "seconds".
    """

    numbers: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.numbers

    def __rich__(self) -> RenderableType:
        return demo_view(self.numbers)


def run_demo(output: str | os.PathLike[str] = "demo-output", *, train: bool = False, recipe: str | None = None) -> Demo:
    """Measure what caching and freezing its operator changes, of the model that ships with pldr and of a newly trained one.

    Args:
        output: folder; an earlier demo in it is replaced, anything else is not.
        train: also train a small model into ``output/model`` first, and measure that too.
        recipe: of that model (see `pldr.recipe.find_recipe`); "demo-cpu" by default.

    Returns:
        What ``output/demo.json`` holds too.

    Raises:
        FileExistsError: the folder holds something that no demo wrote.
        ValueError: a recipe without validation data or without a learned operator, or one that is not to be trained.
        ModuleNotFoundError: it needs the extra "train".
    """
    require("train", "accelerate", "matplotlib")
    if recipe is not None and not train:
        raise ValueError("recipe: says what train is to train; give both or neither")
    output = Path(output)
    start = time.perf_counter()
    to_train = _checked_recipe(recipe or "demo-cpu", output) if train else None
    check_output(output, overwrite=(output / _RECORD).is_file())
    output.mkdir(parents=True, exist_ok=True)
    (output / _RECORD).touch()  # the mark of a folder that a later demo may replace

    model, tokenizer = load_model(STORIES), load_tokenizer(STORIES)
    passages = read_passages(Source([str(HELD_OUT)]), tokenizer, STORY_LENGTH, PASSAGES)
    # Frozen from one passage, compared on all the others.
    result: dict[str, Any] = {
        "stories": measure(model, tokenizer, passages[1:], passages[:1], STORY_PROMPT, output / "stories")
    }
    if to_train is not None:
        training = train_recipe(to_train, overwrite=True)
        model, tokenizer = load_model(to_train.output), load_tokenizer(to_train.output)
        length = to_train.data.sequence_length
        passages = read_passages(source_of(to_train.data, "validation"), tokenizer, length, PASSAGES)
        calibration = read_passages(source_of(to_train.data, "train"), tokenizer, length, 1)
        measured = measure(model, tokenizer, passages, calibration, REFERENCE_PROMPT, output / "trained")
        result["trained"] = measured | {"training": training}
    result |= {"folder": str(output), "seconds": time.perf_counter() - start}
    write_json(output / _RECORD, result, indent=1)
    return Demo(result)


def _checked_recipe(name: str, output: Path) -> Recipe:
    recipe = load_recipe(name, [f"output={output / 'model'}"])
    if not recipe.data.validation or recipe.optimization.handoff_step is not None:
        raise ValueError("demo: the recipe needs data.validation, and a learned operator to its end (no handoff_step)")
    if recipe.model.G_LM is not None or recipe.model.config.get("operator", "learned") != "learned":
        raise ValueError("demo: the recipe must have a learned operator")
    return recipe


def measure(
    model: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    passages: torch.Tensor,
    calibration: torch.Tensor,
    prompt: str,
    output: Path,
) -> dict[str, Any]:
    """What `run_demo` reports of one model; also writes its frozen form and a picture of its operators.

    Args:
        passages: [B, T], held out.
        calibration: [B, T], what G_LM is frozen from.
        prompt: continued with every kind of cache.
        output: begins the names of what is written: "…-frozen" and "…-G_LM.png".

    Returns:
        "losses" by mode, in nats per token over the second half of each passage; "compression", the dimensions of kept
        keys by layer, and the bytes per token of the cache; "operator", a row a layer; "generation", a row a kind of
        cache; "head_dim" and "prompt".
    """
    modes = OperatorModes(model, calibration)
    with whole_folder(f"{output}-frozen", overwrite=True) as saved:
        modes.models["frozen"].save_pretrained(saved)
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
    compressed = factored_copy(modes.models["frozen"], calibration)
    texts = generations(modes, tokenizer, prompt, NEW_TOKENS, REPEATS, compressed=compressed)
    # G_LM is cached from the first half of each passage; losses are taken over the second, in every mode alike.
    half = passages.shape[1] // 2
    losses = {mode: modes.loss(mode, passages, half) for mode in MODES}
    losses["compressed"] = OperatorModes(model, frozen=compressed).loss("frozen", passages, half)
    return {
        "losses": losses,
        "compression": _compression(modes.models["frozen"], compressed),
        "operator": _operator_rows(G_LM, untrained),
        "head_dim": model.config.head_dim,
        "prompt": prompt,
        "generation": _generation_rows(texts),
    }


def _compression(whole: PldrForCausalLM, compressed: PldrForCausalLM) -> dict[str, Any]:
    before, after = (model_facts(form)["kv_cache_bytes_per_token"] for form in (whole, compressed))
    return {"ranks": compressed.config.operator_ranks, "kv_bytes_whole": before, "kv_bytes_compressed": after}


def _generation_rows(texts: list[TimedText]) -> list[dict[str, Any]]:
    return [
        {
            "cache": row.cache,
            "mode": row.mode,
            "tokens_per_second": row.tokens_per_second,
            "same_text": row.generation.token_ids == texts[0].generation.token_ids,
            "token_ids": row.generation.token_ids,
            "text": row.generation.text,
        }
        for row in texts
    ]


def _operator_rows(G_LM: torch.Tensor, untrained: torch.Tensor) -> list[dict[str, Any]]:
    """Of each layer, from G_LM [L, B, H, D, D] after and before training."""
    varies, varied = variation(G_LM).tolist(), variation(untrained).tolist()
    return [
        {
            "layer": layer,
            "variation": varies[layer],
            "untrained_variation": varied[layer],
            "log10_determinant": float(log_determinant(X)[1].mean()),
            "rank": float(numerical_rank(X).double().mean()),
        }
        for layer, X in enumerate(G_LM)
    ]
