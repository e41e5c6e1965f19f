"""How long each kind of cache takes, on the same greedy text; and a step of training."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from pldr.evaluation.modes import OperatorModes
from pldr.generation import Generation, generate_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.training.trainer import compile_layers

# What is kept between tokens, for people; where G_LM then comes from; and how `generate_text` calls it.
_CACHES = (("no cache", "learned", "none"), ("KV", "cached", "kv"), ("KV+G", "cached", "kv+g"), ("frozen G", "frozen", "kv"))  # fmt: skip
# The same by the engine: of a model in a mode of its own, keys are kept in fewer dimensions.
_ENGINES = (("engine", "frozen", None), ("engine, fewer dimensions", "compressed", None))


class TimedText(NamedTuple):
    """A continuation with one kind of cache.

    Attributes:
        cache: what was kept, in words.
        mode: where G_LM came from; or "compressed".
        generation: the first of the repeated runs.
        tokens_per_second: median over them.
    """

    cache: str
    mode: str
    generation: Generation
    tokens_per_second: float


def generations(
    modes: OperatorModes,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    new_tokens: int,
    repeats: int = 3,
    *,
    compressed: PldrForCausalLM | None = None,
) -> list[TimedText]:
    """The same greedy continuation with each kind of cache: its text, and its speed after a warm-up.

    With a compressed form of the model, also by the engine: of the frozen form, and of that.
    """
    models = modes.models if compressed is None else modes.models | {"compressed": compressed}
    rows = []
    for cache, mode, kept in _CACHES if compressed is None else (*_CACHES, *_ENGINES):
        run = partial(generate_text, models[mode], tokenizer, prompt, cache=kept, ignore_end=True)
        run(max_new_tokens=min(4, new_tokens))
        runs = [run(max_new_tokens=new_tokens) for _ in range(repeats)]
        rows.append(TimedText(cache, mode, runs[0], statistics.median(run.tokens_per_second for run in runs)))
    return rows


def seconds_per_step(models: dict[str, PldrForCausalLM], recipe: dict[str, Any], length: int) -> dict[str, float]:
    """Of each model a step's seconds (forward, backward, AdamW), as a recipe trains; median of 9, in turn with the others.

    Args:
        models: by name, all on the device of the training; their weights change.
        recipe: in the terms of a recipe; its batch, precision and compilation count.
        length: tokens of a sequence.
    """
    optimization = recipe["optimization"]
    steps = {name: _step(model, optimization, length) for name, model in models.items()}
    for step in steps.values():
        for _ in range(3):  # compiles, and fills caches
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(9):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(model: PldrForCausalLM, optimization: dict[str, Any], length: int) -> Callable[[], float]:
    model.train()
    if optimization.get("compile", False) and model.device.type == "cuda":
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(4, model.config.vocab_size, (optimization.get("batch_size", 32), length + 1)).to(model.device)
    half = optimization.get("precision", "bf16") == "bf16"

    def step() -> float:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            loss = model(ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return step
