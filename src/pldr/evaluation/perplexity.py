"""Perplexity of texts under a sliding window."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from pldr.evaluation.scoring import Scorer, progress
from pldr.tokenizer import encode


class Perplexity(NamedTuple):
    """Of a text.

    Attributes:
        tokens: that were scored, all but none.
        nats_per_token: mean negative log-likelihood.
        perplexity: exp of that.
        bits_per_byte: total over the UTF-8 bytes of the text.
        word_perplexity: exp of the total over `words`; None where that is beyond a float, as for text without spaces.
        words: separated by white space, and one more a line for its end, as WikiText counts.
        is_lossless: the tokens spell the text out. If not, what the tokenizer drops (ends of lines, say) costs nothing and
            yet is counted among bytes and words, so that these two compare with no model whose tokenizer keeps it.
    """

    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    word_perplexity: float | None
    words: int
    is_lossless: bool


def windows(ids: Sequence[int], prefix: int, length: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Contexts and continuations of a sliding window: every token is scored once.

    Args:
        ids: of the text.
        prefix: token that stands before the text.
        length: most tokens that the model reads at once, L.
        stride: tokens scored a window S, in [1, L]: after the first window, which scores L tokens behind `prefix`, each
            has L + 1 - S tokens of context, or more where the last one scores fewer.
    """
    if ids:
        yield [prefix], ids[:length]
    for start in range(length, len(ids), stride):
        scored = ids[start : start + stride]
        yield ids[max(0, start + len(scored) - 1 - length) : start], scored


def check_window(context: int, length: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride, by default the model's context and half the window.

    Raises:
        ValueError: one of them is outside its range.
    """
    length = context if length is None else length
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= length <= context:
        raise ValueError(f"window: must be between 1 and the context of {context} tokens, got {length}")
    if not 1 <= stride <= length:
        raise ValueError(f"stride: must be between 1 and the window of {length} tokens, got {stride}")
    return length, stride


def perplexity(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    length: int | None = None,
    stride: int | None = None,
    title: str | None = None,
) -> Perplexity:
    """Perplexity of a text under a sliding window. [END], which ends a document in training, stands before it.

    Args:
        length: of the window, tokens; the model's context by default.
        stride: tokens by which it moves; half the window by default.
        title: of a progress bar on standard error; none by default.

    Raises:
        ValueError: an empty text, or a window or stride outside its range.
    """
    length, stride = check_window(scorer.max_length, length, stride)
    ids = encode(tokenizer, text)
    if not ids:
        raise ValueError("perplexity: the text is empty")
    pairs = list(windows(ids, tokenizer.eos_token_id, length, stride))
    with progress(title or "", len(pairs), disable=title is None) as done:
        scores = scorer.score(pairs, done=done)
    nats = -math.fsum(score.log_likelihood for score in scores)
    words = len(text.split()) + text.count("\n")
    return Perplexity(
        tokens=len(ids),
        nats_per_token=nats / len(ids),
        perplexity=math.exp(nats / len(ids)),
        bits_per_byte=nats / math.log(2) / len(text.encode()),
        word_perplexity=math.exp(nats / words) if words and nats / words < 700 else None,
        words=words,
        is_lossless=tokenizer.decode(ids, skip_special_tokens=True) == text,
    )


def evaluate_texts(
    scorers: dict[str, Scorer],
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, str],
    *,
    length: int | None = None,
    stride: int | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Perplexity of texts (by name) in each mode, with a progress bar; by text and mode the fields of `Perplexity`.

    Raises:
        ValueError: see `perplexity`; a text without tokens is named, before any is scored.
    """
    for name, text in texts.items():
        if not encode(tokenizer, text):
            raise ValueError(f"{name}: is empty, or nothing that the tokenizer keeps")
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in texts}
    for mode, scorer in scorers.items():
        for name, text in texts.items():
            title = f"perplexity of {name}, {mode}"
            found[name][mode] = perplexity(scorer, tokenizer, text, length=length, stride=stride, title=title)._asdict()
    return found
