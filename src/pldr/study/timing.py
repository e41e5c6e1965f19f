"""How long each kind of cache takes, on the same greedy text."""

import statistics
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from pldr.evaluation.modes import OperatorModes
from pldr.generation import Generation, generate_text
from pldr.modeling_pldr import PldrForCausalLM

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
