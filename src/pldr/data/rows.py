"""Tokens of documents as training rows: cached on disk, streamed, packed or padded."""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from pldr.data.sources import BadRows, Piece, Share, Source, documents_of, read_pieces, source_state
from pldr.files import read_json, sha256, whole_folder, write_json
from pldr.recipe import DataRecipe
from pldr.tokenizer import encode

# Published data preparation: as many documents are laid out together where rows are padded or cut short.
GROUP_DOCUMENTS = 3200
# Tokenised at a time: what keeps every core busy and memory small.
_BATCH_CHARACTERS = 1 << 20
# Tokens of a passage, if nothing else is said.
_PASSAGE_LENGTH = 512
# Held at most to mix a stream, whatever data.shuffle_buffer says.
_BUFFER_CHARACTERS = 1 << 26


def tokenize(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of each piece, [END] after each document, and whether the document ends there.

    A batch of pieces is tokenised at once, on all cores.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or gives an id that is not below its number of tokens.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end-of-text token to put between documents")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    for batch in _batched(pieces):
        encoded = encode(tokenizer, [piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            array = np.array([*ids, tokenizer.eos_token_id] if piece.ends else ids, np.int64)
            if array.max(initial=0) >= len(tokenizer):
                raise ValueError(f"tokenizer: gives the id {array.max()}, but has {len(tokenizer)} tokens")
            yield array.astype(dtype), piece.ends


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def rows_of(tokens: Iterable[tuple[np.ndarray, bool]], length: int, layout: str) -> Iterator[np.ndarray]:
    """Rows of `length` tokens.

    Args:
        tokens: see `tokenize`.
        length: tokens of a full row.
        layout: "packed": documents one after another, rows cut where they are full; the last partial row, too, is
            yielded. "padded" and "unpadded": so within each group of `GROUP_DOCUMENTS`, whose last row is shorter.
    """
    held: list[np.ndarray] = []
    size = documents = 0
    for ids, ends in tokens:
        held.append(ids)
        size += len(ids)
        documents += ends
        close = layout != "packed" and ends and documents % GROUP_DOCUMENTS == 0
        if size < length and not close:
            continue
        joined = np.concatenate(held)
        full = size // length * length
        yield from joined[:full].reshape(-1, length)
        held, size = [joined[full:]], size - full
        if close and size:
            yield held[0]
            held, size = [], 0
    if size:
        yield np.concatenate(held)


def source_of(data: DataRecipe, part: str) -> Source:
    """The documents of a part ("train", "validation" or "test") of a recipe's data."""
    return Source(
        getattr(data, part), data.text_column, getattr(data, f"{part}_split"), getattr(data, f"{part}_interval")
    )


def read_passages(
    source: Source, tokenizer: PreTrainedTokenizerFast, length: int, count: int, *, streaming: bool = False
) -> torch.Tensor:
    """The first full rows of a source, packed: [count or less, length], int64.

    Raises:
        FileNotFoundError, ValueError: see `read_pieces` and `tokenize`; or not even one row.
    """
    pieces = read_pieces(source, BadRows(), streaming=streaming)
    rows = rows_of(tokenize(pieces, tokenizer), length, "packed")
    picked = [row for row in itertools.islice(rows, count) if len(row) == length]
    if not picked:
        raise ValueError(f"data: {', '.join(source.names)}: less than one sequence of {length} tokens")
    return torch.from_numpy(np.stack(picked).astype(np.int64))


def choose_passages(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    *,
    length: int | None,
    count: int,
    needed: int = 1,
    shortest: int = 1,
) -> torch.Tensor:
    """The first passages of a source that a model can read: [needed to count, length], int64.

    Args:
        context: tokens of the longest one.
        length: of each, from `shortest` on; by default 512, or the context if that is less.
        others: the documents, their tokenizer, and how many passages at most and at least.

    Raises:
        FileNotFoundError, ValueError: see `read_passages`; a length outside its range, or too little text.
    """
    length = min(_PASSAGE_LENGTH, context) if length is None else length
    if not shortest <= length <= context:
        raise ValueError(f"length: must be between {shortest} and the context of {context}, got {length}")
    found = read_passages(source, tokenizer, length, count)
    if len(found) < needed:
        raise ValueError(
            f"data: {len(found)} passages of {length} tokens, {needed} are asked for; give more text, or ask for fewer or "
            "shorter passages"
        )
    return found


class TokenRows(Dataset[dict[str, Any]]):
    """Tokenised rows in a folder, memory-mapped: host memory does not grow with the data.

    Each item has `input_ids` (int64, [length or less]) and `row`, its index.

    Attributes:
        facts: documents, tokens, rows, left_out_tokens (of the last partial row, when packed), bad_rows and sha256.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 0, last: int | None = None) -> None:
        """The rows from `first` up to `last` of a folder that `write_rows` has left.

        Raises:
            OSError: a file can not be read.
            ValueError: there are more or fewer ids than the facts say, or an earlier version wrote them.
        """
        folder = Path(folder)
        self._folder = folder
        self.facts: dict[str, Any] = read_json(folder / "facts.json")
        if "row_length" not in self.facts:
            raise ValueError(
                f"{folder}: facts.json has no row_length, as those of earlier versions; remove this folder"
            )
        self.length: int = self.facts["row_length"]
        self._ids = np.memmap(folder / "tokens.bin", np.dtype(self.facts["dtype"]), mode="r")
        # Where each row that is not full ends; all others follow from the length.
        self._short: list[list[int]] = self.facts["short_rows"]
        self._short_rows = [row for row, _ in self._short]
        self._missing = list(itertools.accumulate((self.length - size for _, size in self._short), initial=0))
        expected = self.facts["rows"] * self.length - self._missing[-1]
        if len(self._ids) != expected:
            raise ValueError(f"{folder}: tokens.bin has {len(self._ids)} ids, facts.json says {expected}")
        self._first = first
        self._count: int = (self.facts["rows"] if last is None else last) - first

    def __len__(self) -> int:
        return self._count

    def head(self, count: int) -> "TokenRows":
        """The first rows, at most so many."""
        return TokenRows(self._folder, self._first, self._first + min(count, len(self)))

    def split(self, fraction: float) -> tuple["TokenRows", "TokenRows"]:
        """All rows but the last `fraction` of them, and those.

        Raises:
            ValueError: one of the two would be empty.
        """
        first = round(len(self) * (1 - fraction))
        if not 0 < first < len(self):
            raise ValueError(f"data.hold_out={fraction}: {len(self)} sequences can not be split so; give more text")
        return TokenRows(self._folder, 0, first), TokenRows(self._folder, first)

    def ids(self, row: int) -> np.ndarray:
        """Of a row of the whole folder."""
        before = bisect.bisect_left(self._short_rows, row)
        size = self.length
        if before < len(self._short) and self._short_rows[before] == row:
            size = self._short[before][1]
        start = row * self.length - self._missing[before]
        return self._ids[start : start + size]

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        row += self._first
        return {"input_ids": torch.from_numpy(self.ids(row).astype(np.int64)), "row": row}

    def full_rows(self, count: int) -> torch.Tensor:
        """The first rows that are full, at most `count` of them: [rows, length], int64."""
        short = set(self._short_rows)
        picked = itertools.islice((row for row in range(len(self)) if row + self._first not in short), count)
        rows = [self[row]["input_ids"] for row in picked]
        return torch.stack(rows) if rows else torch.empty(0, self.length, dtype=torch.int64)


def write_rows(
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    folder: Path,
    layout: str = "packed",
    bad: BadRows | None = None,
) -> TokenRows:
    """Tokenise into a folder that exists (tokens.bin and facts.json), and open it.

    Length and layout: see `rows_of`; `bad` is where the pieces' reader counts bad rows, for the facts.

    Raises:
        ValueError: less than one row; see `tokenize`.
    """
    facts: dict[str, Any] = {"documents": 0, "tokens": 0, "rows": 0, "left_out_tokens": 0, "row_length": length,
                             "layout": layout, "dtype": "uint16", "short_rows": []}  # fmt: skip

    def counted() -> Iterator[tuple[np.ndarray, bool]]:
        for ids, ends in tokenize(pieces, tokenizer):
            facts["documents"] += ends
            facts["tokens"] += len(ids)
            facts["dtype"] = ids.dtype.name
            yield ids, ends

    with (folder / "tokens.bin").open("wb") as stream:
        for row in rows_of(counted(), length, layout):
            if len(row) < length and layout == "packed":
                facts["left_out_tokens"] = len(row)
                continue
            if len(row) < length:
                facts["short_rows"].append([facts["rows"], len(row)])
            stream.write(row.tobytes())
            facts["rows"] += 1
    skipped = facts["bad_rows"] = bad.summary() if bad else ""
    if facts["rows"] == 0:
        because = f" ({skipped})" if skipped else ""
        raise ValueError(f"data: {facts['tokens']} tokens are less than one row of {length}{because}")
    write_json(folder / "facts.json", facts | {"sha256": _sum(folder, facts)})
    return TokenRows(folder)


def _sum(folder: Path, facts: dict[str, Any]) -> str:
    """Of the ids, and of what is said of them."""
    return hashlib.sha256((sha256(folder / "tokens.bin") + json.dumps(facts)).encode("utf-8")).hexdigest()


def _check_sum(folder: Path) -> None:
    """Raises ValueError: a file of the cache is not as it was written."""
    try:
        facts = read_json(folder / "facts.json")
        whole = isinstance(facts, dict) and facts.pop("sha256", None) == _sum(folder, facts)
    except (FileNotFoundError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"data: {folder}: cached tokens are not as they were written; remove this folder")


def cached_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    recipe: DataRecipe,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> TokenRows:
    """The rows of a source, tokenised once and kept in a folder named by everything that they depend on.

    The contents of local files are hashed, and so are the kept rows: about a second per GB, at every call. `report`
    takes a line about bad rows, if there are any.

    Raises:
        FileNotFoundError, ValueError: see `read_pieces` and `write_rows`; or the data changed while it was read, or
            what was kept is not as it was written.
    """
    key = _fingerprint(source, tokenizer, recipe)
    folder = cache_folder(recipe.cache) / key
    if not folder.is_dir():
        bad = BadRows(recipe.strict)
        # Of processes that come to this at the same time, the first one's rows are kept.
        with contextlib.suppress(FileExistsError), whole_folder(folder, keep=False) as partial:
            pieces = read_pieces(source, bad, streaming=recipe.streaming)
            write_rows(pieces, tokenizer, recipe.row_length, partial, recipe.layout, bad)
            if _fingerprint(source, tokenizer, recipe) != key:
                raise ValueError(f"data: {', '.join(source.names)}: changed while it was read; start again")
    _check_sum(folder)
    rows = TokenRows(folder)
    if summary := rows.facts["bad_rows"]:
        report(f"data: {summary}")
    return rows


def cache_folder(cache: str | None = None) -> Path:
    """Where tokenised data is kept: `cache`, else $PLDR_CACHE, else ~/.cache/pldr."""
    chosen = cache or os.environ.get("PLDR_CACHE") or Path.home() / ".cache" / "pldr"
    return Path(chosen) / "tokens"


def _fingerprint(source: Source, tokenizer: PreTrainedTokenizerFast, recipe: DataRecipe) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8"))
    # By name, so that no rows of an earlier version, which were as long as what is read, are taken for these.
    length = {"row_length": recipe.row_length}
    facts = [source.text_column, source.split, source.interval, length, recipe.layout, recipe.strict,
             tokenizer.eos_token_id, GROUP_DOCUMENTS, *source_state(source, recipe.streaming)]  # fmt: skip
    digest.update(json.dumps(facts).encode("utf-8"))
    return digest.hexdigest()[:32]


@dataclass(eq=False)
class TokenStream(IterableDataset[dict[str, Any]]):
    """Rows without end, tokenised as they are read, so that data larger than the disk can be trained on.

    Every pass reads the documents in the order of the source, mixed through a buffer whose seed is the recipe's and the
    pass's number. Each consumer (process × data worker) takes every n-th document; what does not fill a row begins the
    next pass, so that nothing is left out. The same arguments give the same rows: a resumed run reads again what it had
    read, and goes on from there.
    """

    source: Source
    tokenizer: PreTrainedTokenizerFast
    recipe: DataRecipe
    _: KW_ONLY
    seed: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        if worker:  # a forked process has lost the threads of the tokenizer, which would wait for them for ever
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        share = Share(self.rank, self.world_size, worker_id, workers)
        tokens = tokenize(self._pieces(share), self.tokenizer)
        for number, row in enumerate(rows_of(tokens, self.recipe.row_length, self.recipe.layout)):
            yield {"input_ids": torch.from_numpy(row.astype(np.int64)), "row": number * share.consumers + share.number}

    def _pieces(self, share: Share) -> Iterator[Piece]:
        for number in itertools.count():
            bad = BadRows(self.recipe.strict, notify=warnings.warn if number == 0 else None)
            pieces = read_pieces(self.source, bad, streaming=True, share=share)
            # Kept in order, a document need not be held as a whole.
            documents = documents_of(pieces) if self.recipe.shuffle_buffer > 1 else ([piece] for piece in pieces)
            empty = True
            generator = random.Random(f"{self.seed}:{number}:{share.number}")
            size = lambda document: sum(len(piece.text) for piece in document)  # noqa: E731
            for document in shuffled(documents, self.recipe.shuffle_buffer, generator, size):
                empty = False
                yield from document
            if empty:
                raise ValueError(
                    f"data: no document for consumer {share.number + 1} of {share.consumers}; use fewer processes "
                    "or data.workers"
                )


def shuffled(
    items: Iterator[Any], buffer_size: int, generator: random.Random, size_of: Callable[[Any], int] = lambda item: 0
) -> Iterator[Any]:
    """Items in random order within a buffer of so many; a size of 0 or 1 keeps the order.

    Fewer are held where together they are larger than `_BUFFER_CHARACTERS`, each of `size_of` characters.
    """
    buffer: list[Any] = []
    held = 0
    for item in items:
        buffer.append(item)
        held += size_of(item)
        while len(buffer) > max(buffer_size, 1) or (held > _BUFFER_CHARACTERS and len(buffer) > 1):
            # Never the one that has just come, as long as there are others: so the oldest do not stay for ever.
            place = generator.randrange(len(buffer) - 1)
            buffer[place], buffer[-2] = buffer[-2], buffer[place]
            picked = buffer.pop(-2)
            held -= size_of(picked)
            yield picked
    if buffer_size > 1:
        generator.shuffle(buffer)
    yield from buffer


def collate(items: list[dict[str, Any]], *, pad_token_id: int, length: int | None) -> dict[str, Any]:
    """A batch of rows for a causal language model that is to see no row's last target.

    Args:
        items: of `TokenRows` or `TokenStream`.
        pad_token_id: stands behind short rows; its targets are -100.
        length: width of the batch, or None for that of its longest row.

    Returns:
        `input_ids`, each row but its last token; `shift_labels`, each but its first: the target of each position;
        `labels`, the inputs once more, beside which transformers counts targets; `row`; and where rows are short an
        `attention_mask`. A row of one token is an input without a target.
    """
    rows = [item["input_ids"] for item in items]
    numbers = torch.tensor([item["row"] for item in items])
    sizes = torch.tensor([max(len(row) - 1, 1) for row in rows])
    width = length or int(sizes.max())
    if all(len(row) == width + 1 for row in rows):
        ids, targets = (torch.stack([row[part] for row in rows]) for part in (slice(-1), slice(1, None)))
        return {"input_ids": ids, "labels": ids, "shift_labels": targets, "row": numbers}
    mask = (torch.arange(width) < sizes[:, None]).long()
    ids, targets = (torch.full((len(rows), width), value) for value in (pad_token_id, -100))
    for row, size, place, target in zip(rows, sizes, ids, targets, strict=True):
        place[:size] = row[:size]
        target[: len(row) - 1] = row[1:]
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels, "shift_labels": targets, "attention_mask": mask, "row": numbers}
