"""How long each kind of cache takes, on the same greedy text."""

import statistics
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from pldr.evaluation.modes import OperatorModes
from pldr.generation import Generation, generate_text

# What is kept between tokens, for people; where G_LM then comes from; and how `generate_text` calls it.
_CACHES = (("no cache", "learned", "none"), ("KV", "cached", "kv"), ("KV+G", "cached", "kv+g"), ("frozen G", "frozen", "kv"))  # fmt: skip


class TimedText(NamedTuple):
    """A continuation with one kind of cache.

    Attributes:
        cache: what was kept, in words.
        mode: where G_LM came from.
        generation: the first of the repeated runs.
        tokens_per_second: median over them.
    """

    cache: str
    mode: str
    generation: Generation
    tokens_per_second: float


def generations(
    modes: OperatorModes, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int, repeats: int = 3
) -> list[TimedText]:
    """The same greedy continuation with each kind of cache: its text, and its speed after a warm-up."""
    rows = []
    for cache, mode, kept in _CACHES:
        run = partial(generate_text, modes.models[mode], tokenizer, prompt, cache=kept, ignore_end=True)
        run(max_new_tokens=min(4, new_tokens))
        runs = [run(max_new_tokens=new_tokens) for _ in range(repeats)]
        rows.append(TimedText(cache, mode, runs[0], statistics.median(run.tokens_per_second for run in runs)))
    return rows
