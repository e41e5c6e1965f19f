"""Texts as the page gets them: token by token, with what else was likely."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pldr.engine.text import TokenTexts

# Tokens that are shown at a place, beside the one that was taken.
ALTERNATIVES = 8
# Ranks of factored operators are multiples of it.
RANK_STEP = 8
# Operators that any model can be given by name, and those that one with a learned operator has before them.
CONSTANTS = ["identity", "uniform", "normal"]
OWN = ["learned", "cached", "frozen"]


def given(texts: TokenTexts, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens of a prompt."""
    named = [texts.first(token) if place == 0 else texts.of(token)[0] for place, token in enumerate(ids)]
    return [{"id": token, "text": text} for token, text in zip(ids, named, strict=True)]


def written(texts: TokenTexts, steps: Iterable[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One token after the other, with the most probable ones at its place; last, why it ended.

    Args:
        steps: token, its log-probability, those of the most probable, and why it is the last ("end" is not part of the text).
    """
    begun, count, reason = time.perf_counter(), 0, "length"
    for token, logprob, top, ended in steps:
        if ended == "end":
            reason = "end"
            break
        count += 1
        others = [{"id": t, "text": texts.of(t)[0], "logprob": p} for t, p in top]
        yield {"id": token, "text": texts.of(token)[0], "logprob": logprob, "top": others}
    seconds = time.perf_counter() - begun
    yield {"finish_reason": reason, "seconds": seconds, "tokens_per_second": count / seconds if seconds else 0.0}
