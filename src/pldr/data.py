"""Text to packed training sequences."""

import glob
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pldr.tokenizer import check_text

PYDOC_TOPICS = "pydoc-topics:"
# Every eighth topic of Python's language reference is held out for validation.
_HELD_OUT = 8
# Documents that are tokenised at a time.
_BATCH = 64


def read_documents(sources: Iterable[str], text_column: str = "text") -> Iterator[str]:
    """The documents of local files, or of Python's own language reference.

    Args:
        sources: paths or glob patterns of text files (one document a file) and of JSON lines (``.jsonl``, one object a
            line), either also as ``.gz`` or ``.xz``; "pydoc-topics:train" or "pydoc-topics:validation".
        text_column: key of the text in a JSON line.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file is damaged or not valid UTF-8, or a line is not an object with a text (file and line named);
            an unknown part of pydoc-topics is asked for.
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
                yield from _read_file(Path(file), text_column)
            except UnicodeDecodeError as error:
                raise ValueError(f"data: {file}: not valid UTF-8 at byte {error.start}") from None
            except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise ValueError(f"data: {file}: damaged compressed file ({error})") from None


def _read_file(file: Path, text_column: str) -> Iterator[str]:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    name = file.with_suffix("") if file.suffix in (".gz", ".xz") else file
    with opener(file, "rt", encoding="utf-8") as stream:  # type: ignore[operator]
        if name.suffix != ".jsonl":
            yield stream.read()
            return
        for number, line in enumerate(stream, 1):
            try:
                text = json.loads(line)[text_column]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"data: {file}: line {number}: no JSON object with {text_column!r} ({error})"
                ) from None
            if not isinstance(text, str):
                raise ValueError(f"data: {file}: line {number}: {text_column!r} is not a text but {text!r:.40}")
            yield check_text(text, f"data: {file}: line {number}")


def _pydoc_topics(part: str) -> Iterator[str]:
    from pydoc_data.topics import topics

    if part not in ("train", "validation"):
        raise ValueError(f"data: {PYDOC_TOPICS}{part}: the parts are train and validation")
    for index, name in enumerate(sorted(topics)):
        if (index % _HELD_OUT == _HELD_OUT - 1) == (part == "validation"):
            yield topics[name]


class PackedSequences(Dataset[dict[str, torch.Tensor]]):
    """Token ids in rows of one length, as a map-style dataset of `input_ids` and `labels` (the same ids).

    Attributes:
        ids: [rows, sequence_length], uint16 where the vocabulary allows it, else int32.
        left_out: tokens of the last partial sequence, which is no row.
    """

    def __init__(self, ids: np.ndarray, left_out: int) -> None:
        self.ids = ids
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tensor(slice(index, index + 1))[0]
        return {"input_ids": row, "labels": row}

    def tensor(self, rows: slice) -> torch.Tensor:
        """[rows, sequence_length], int64."""
        return torch.from_numpy(self.ids[rows].astype(np.int64))


def pack(documents: Iterable[str], tokenizer: Any, sequence_length: int) -> PackedSequences:
    """Token ids of all documents, [END] after each, cut into sequences of one length.

    Args:
        documents: texts; they are tokenised a few at a time, in parallel.
        tokenizer: a fast tokenizer with an end-of-text token.
        sequence_length: tokens of a sequence.

    Raises:
        ValueError: the documents hold less than one sequence; the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end-of-text token to put between documents")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    parts = [np.empty(0, dtype)]
    for batch in _batched(documents, _BATCH):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype))
    stream = np.concatenate(parts)
    count, left_out = divmod(len(stream), sequence_length)
    if count == 0:
        raise ValueError(f"data: {len(stream)} tokens are less than one sequence of {sequence_length}")
    return PackedSequences(stream[: count * sequence_length].reshape(count, sequence_length), left_out)


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
