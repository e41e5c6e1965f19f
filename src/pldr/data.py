"""Text to packed training sequences."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PYDOC_TOPICS = "pydoc-topics:"
# Every eighth topic of Python's language reference is held out for validation.
_HELD_OUT = 8


def read_documents(sources: Iterable[str]) -> Iterator[str]:
    """The documents of local text files, one a file, or of Python's own language reference.

    Args:
        sources: paths, glob patterns, "pydoc-topics:train" or "pydoc-topics:validation".

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file is not valid UTF-8, or an unknown part of pydoc-topics is asked for.
    """
    for source in sources:
        if source.startswith(PYDOC_TOPICS):
            yield from _pydoc_topics(source.removeprefix(PYDOC_TOPICS))
            continue
        files = sorted(path for path in glob.glob(source, recursive=True) if Path(path).is_file())
        if not files:
            raise FileNotFoundError(f"data: {source} matches no file")
        for file in files:
            try:
                yield Path(file).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"data: {file}: not valid UTF-8 at byte {error.start}") from None


def _pydoc_topics(part: str) -> Iterator[str]:
    from pydoc_data.topics import topics

    if part not in ("train", "validation"):
        raise ValueError(f"data: {PYDOC_TOPICS}{part}: the parts are train and validation")
    for index, name in enumerate(sorted(topics)):
        if (index % _HELD_OUT == _HELD_OUT - 1) == (part == "validation"):
            yield topics[name]


def pack(documents: Iterable[str], tokenizer: Any, sequence_length: int) -> tuple[Any, int]:
    """Token ids of all documents, [END] after each, cut into sequences of one length.

    Args:
        documents: texts.
        tokenizer: a fast tokenizer with an end-of-text token.
        sequence_length: tokens of a sequence.

    Returns:
        A dataset with `input_ids` and `labels` (the same ids), and how many tokens of the last partial sequence were
        left out.

    Raises:
        ValueError: the documents hold less than one sequence; the tokenizer has no end-of-text token.
    """
    from datasets import Dataset

    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end-of-text token to put between documents")
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    count, left_out = divmod(len(ids), sequence_length)
    if count == 0:
        raise ValueError(f"data: {len(ids)} tokens are less than one sequence of {sequence_length}")
    rows = [ids[i * sequence_length : (i + 1) * sequence_length] for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows}), left_out
