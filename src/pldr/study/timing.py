"""How long each kind of cache takes, on the same greedy text; and a step of training."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from pldr.evaluation.modes import OperatorModes
from pldr.generation import Generation, generate_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.recipe import OptimizationRecipe

# What is kept between tokens, for people; where G_LM then comes from; and how `generate_text` calls it.
_CACHES = (("no cache", "learned", "none"), ("KV", "cached", "kv"), ("KV+G", "cached", "kv+g"), ("frozen G", "frozen", "kv"))  # fmt: skip
# The same by the engine: of a model in a mode of its own, keys are kept in fewer dimensions.
_ENGINES = (("engine", "frozen", None), ("engine, fewer dimensions", "compressed", None))

# Steps of training that are timed at once, and how often. The first block must hold the calls before a graph is captured.
_BLOCK, _BLOCKS = 5, 5


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


def seconds_per_step(models: dict[str, PldrForCausalLM], recipe: OptimizationRecipe, length: int) -> dict[str, float]:
    """Of each model a step's seconds (forward, backward, AdamW) as the recipe trains: median of 5 blocks, in turn with the others'.

    Args:
        models: by name, all on the device of the training; their weights change.
        recipe: its batch, precision, compilation and graphs count.
        length: tokens of a sequence.
    """
    steps = {name: _step(model, recipe, length) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_BLOCKS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            losses = [step() for _ in range(_BLOCK)]
            float(losses[-1])  # waits for the device, which runs behind the host till then, as in training
            if turn:  # the first compiles, captures and fills caches
                seconds[name].append((time.perf_counter() - start) / _BLOCK)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(model: PldrForCausalLM, recipe: OptimizationRecipe, length: int) -> Callable[[], torch.Tensor]:
    """A step on tokens that are drawn once."""
    from pldr.training.graph import GraphedStep, may_be_graph
    from pldr.training.optimizer import BoundedAdamW
    from pldr.training.trainer import compile_layers

    model.train()
    device, graphed = model.device, may_be_graph(recipe, model.device)
    if recipe.compile and device.type == "cuda":
        compile_layers(model)
    ids = torch.randint(4, model.config.vocab_size, (recipe.batch_size, length + 1)).to(device)

    def gradients(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        inputs, targets = batch["ids"][:, :-1], batch["ids"][:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = model(inputs, shift_labels=targets, use_cache=False, return_logits=False).loss
        loss.backward()
        return (loss.detach(),)

    forward_and_backward = GraphedStep(gradients, model.parameters())
    optimizer = BoundedAdamW(model.parameters(), recipe, graphed=graphed)
    nothing_infinite = torch.zeros((), device=device)

    def step() -> torch.Tensor:
        model.zero_grad()
        (loss,) = forward_and_backward({"ids": ids}) if graphed else gradients({"ids": ids})
        optimizer.gradients_stay = forward_and_backward.replayed
        optimizer.found_inf = nothing_infinite
        optimizer.step()
        return loss

    return step
