"""Text to training sequences: documents, their tokens in a memory-mapped cache, or a stream of both."""

import bisect
import codecs
import contextlib
import glob
import hashlib
import itertools
import json
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pldr.recipe import DataRecipe
from pldr.saving import whole_folder
from pldr.tokenizer import check_text

PYDOC_TOPICS = "pydoc-topics:"
HUB = "hub:"
# Every eighth topic of Python's language reference is held out for validation.
_HELD_OUT = 8
# Tokenised at a time: what keeps every core busy and memory small.
_BATCH_CHARACTERS = 1 << 20
# Held at most to mix a stream, whatever data.shuffle_buffer says.
_BUFFER_CHARACTERS = 1 << 26
# A long text file is read and tokenised in pieces of about this many bytes, cut between lines.
_PIECE_BYTES = 1 << 20
_COMPRESSION = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
# Published data preparation: as many documents are laid out together where rows are padded or cut short.
GROUP_DOCUMENTS = 3200


class Piece(NamedTuple):
    """A stretch of a document.

    Attributes:
        text: whole lines, or a whole document.
        ends: whether the document ends here.
    """

    text: str
    ends: bool


@dataclass
class BadRows:
    """What could not be used of the data: counted and skipped, or refused.

    Attributes:
        strict: raise at the first bad row.
        counts: how many rows had which fault.
        notify: told of the first row with each fault at once, where a summary would come too late.
        first: where each fault was first seen.
    """

    strict: bool = False
    notify: Callable[[str], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, fault: str) -> Piece:
        """Count a bad row.

        Returns:
            The empty piece that stands for it, so that the rows behind it keep their index.

        Raises:
            ValueError: `strict` is set.
        """
        if self.strict:
            raise ValueError(f"data: {place}: {fault}")
        if self.notify is not None and fault not in self.counts:
            self.notify(f"data: {place}: skipped, as others like it will be: {fault}")
        self.counts[fault] += 1
        self.first.setdefault(fault, place)
        return Piece("", True)

    def summary(self) -> str:
        """One line for people, empty if every row was good."""
        return "; ".join(
            f"{count:,} skipped: {fault} (first: {self.first[fault]})" for fault, count in self.counts.items()
        )


def read_documents(sources: Iterable[str], text_column: str = "text", *, strict: bool = True) -> Iterator[str]:
    """The documents of local files, of a hub data set, or of Python's own language reference.

    Args:
        sources: see `pldr.recipe.DataRecipe`.
        text_column: of JSON lines, Parquet files and hub data sets.
        strict: refuse bad rows rather than skip them.

    Raises:
        FileNotFoundError, ValueError: see `read_pieces`.
    """
    for pieces in _documents(read_pieces(Source(list(sources), text_column), BadRows(strict))):
        yield "".join(piece.text for piece in pieces)


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        names: see `pldr.recipe.DataRecipe.train`.
        text_column: of JSON lines, Parquet files and hub data sets.
        split: of hub data sets.
        interval: "start:stop" by index or percent ("0:1000", "90%:100%"), over all documents in their order; "" for all.
    """

    names: list[str]
    text_column: str = "text"
    split: str = "train"
    interval: str = ""


class Share(NamedTuple):
    """Which of the documents a consumer gets: those of one data worker of one process."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def number(self) -> int:
        return self.rank * self.workers + self.worker

    @property
    def consumers(self) -> int:
        return self.world_size * self.workers


def read_pieces(
    source: Source, bad: BadRows, *, streaming: bool = False, share: Share | None = None
) -> Iterator[Piece]:
    """Every document of a source, long text files in pieces, bad rows left out.

    Args:
        source: what to read.
        bad: takes note of bad rows.
        streaming: read hub data sets as they are downloaded.
        share: which documents to yield. Of a hub data set the library shares out whole shards where it can.

    Raises:
        FileNotFoundError: a name matches no file.
        ValueError: a damaged file; an unknown part, split or column; with `bad.strict`, a bad row.
    """
    count = sum(_count(name, source, streaming) for name in source.names) if "%" in source.interval else None
    start, stop = parse_interval(source.interval, count)
    share = share or Share()
    index = 0
    if (
        source.interval
        and share.consumers > 1
        and len(source.names) > 1
        and any(n.startswith(HUB) for n in source.names)
    ):
        raise ValueError("data: an interval over several sources, one of the hub, can not be shared among processes")
    for name in source.names:
        own = 0  # rows of this name; those of a hub data set are shared out before they come here
        if name.startswith(HUB):
            rows = load_hub(name.removeprefix(HUB), source, streaming)
            if source.interval and len(source.names) == 1:
                # Without reading what comes before.
                rows = rows.skip(start)
                if stop != float("inf"):
                    rows = rows.take(int(stop) - start)
                start, stop = 0, float("inf")
            pieces = _read_hub(name, rows, source.text_column, bad, share)
            mine = Share()
        else:
            pieces, mine = _read(name, source.text_column, bad), share
        for piece in pieces:
            if start <= index < stop and own % mine.consumers == mine.number and piece.text:
                yield piece
            index += piece.ends
            own += piece.ends
            if index >= stop:
                return


def _count(name: str, source: Source, streaming: bool) -> int:
    """
    Raises:
        ValueError: a streamed hub data set that does not tell how many rows it has.
    """
    if not name.startswith(HUB):
        return sum(piece.ends for piece in _read(name, source.text_column, BadRows()))
    rows = load_hub(name.removeprefix(HUB), source, streaming)
    if not streaming:
        return len(rows)
    splits = rows.info.splits or {}
    if source.split not in splits or not splits[source.split].num_examples:
        raise ValueError(f"data: {name}: does not tell its number of rows; give the interval by index, not percent")
    return splits[source.split].num_examples


def parse_interval(interval: str, count: int | None) -> tuple[int, float]:
    """First and one-past-last index of "start:stop", each an index or a percentage of `count`, or empty.

    Raises:
        ValueError: not of that form, or start is not before stop.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?%|\d+)?:(\d+(?:\.\d+)?%|\d+)?)?", interval)
    if match is None:
        raise ValueError(f"data: interval {interval!r} must be start:stop, by index (0:1000) or percent (90%:100%)")

    def bound(text: str | None, default: float) -> float:
        if text is None:
            return default
        if not text.endswith("%"):
            return int(text)
        if float(text[:-1]) > 100:
            raise ValueError(f"data: interval {interval!r}: more than 100%")
        return 0 if count is None else round(float(text[:-1]) * count / 100)

    start, stop = bound(match[1], 0), bound(match[2], float("inf"))
    if start >= stop and not ("%" in interval and count is None):
        raise ValueError(
            f"data: interval {interval!r} holds no document" + (f" of {count}" if count is not None else "")
        )
    return int(start), stop


def source_files(name: str) -> list[Path]:
    """The files that a name or glob pattern matches, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(Path(path) for path in glob.glob(name, recursive=True) if Path(path).is_file())
    if not files:
        raise FileNotFoundError(f"data: {name} matches no file")
    return files


def _read(name: str, column: str, bad: BadRows) -> Iterator[Piece]:
    """The pieces of local files or of pydoc-topics; one empty piece for each bad row."""
    if name.startswith(PYDOC_TOPICS):
        yield from _pydoc_topics(name.removeprefix(PYDOC_TOPICS))
        return
    for file in source_files(name):
        kind = file.with_suffix("").suffix if file.suffix in _COMPRESSION else file.suffix
        read = {".jsonl": _read_json_lines, ".parquet": _read_parquet}.get(kind, _read_text)
        try:
            yield from read(file, column, bad)
        except _damaged() as error:
            raise ValueError(f"data: {file}: damaged file ({error})") from None


def _damaged() -> tuple[type[Exception], ...]:
    import gzip
    import lzma
    import zlib

    return EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    compression = _COMPRESSION.get(file.suffix)
    if compression == "zstd":
        import pyarrow

        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            try:
                yield _lines_of(stream)
            except OSError as error:
                raise EOFError(str(error)) from None
        return
    import gzip
    import lzma

    openers: dict[str | None, Callable[..., Any]] = {"gzip": gzip.open, "xz": lzma.open, None: open}
    with openers[compression](file, "rb") as stream:
        yield stream


def _lines_of(stream: Any) -> Iterator[bytes]:
    """Lines of a stream that can only be read."""
    rest = b""
    while block := stream.read(_PIECE_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _read_text(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    # A document is used whole or not at all, so that its bytes are checked before the first piece is handed out.
    empty, decoder = True, codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(file) as lines:
            for line in lines:
                text = decoder.decode(line)
                empty = empty and not text.strip()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        yield bad.add(str(file), "not valid UTF-8")
        return
    if empty:
        yield bad.add(str(file), "empty")
        return
    with _open(file) as lines:
        held: str | None = None
        for text in _grouped_lines(lines):
            if held is not None:
                yield Piece(held, False)
            held = text
        assert held is not None
        yield Piece(held, True)


def _grouped_lines(lines: Iterable[bytes]) -> Iterator[str]:
    group: list[bytes] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= _PIECE_BYTES:
            yield b"".join(group).decode("utf-8")
            group, size = [], 0
    if group:
        yield b"".join(group).decode("utf-8")


def _read_json_lines(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}: line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield bad.add(place, "not valid UTF-8")
            except (json.JSONDecodeError, RecursionError):
                yield bad.add(place, "not JSON")
            else:
                if isinstance(row, dict) and column in row:
                    yield _checked(row[column], place, column, bad)
                else:
                    yield bad.add(place, f"no JSON object with {column!r}")


def _read_parquet(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        if column not in opened.schema_arrow.names:
            raise ValueError(f"data: {file}: no column {column!r}; it has {', '.join(opened.schema_arrow.names)}")
        number = 0
        for batch in opened.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _checked(value, f"{file}: row {number}", column, bad)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {file}: damaged Parquet file ({' '.join(str(error).split())})") from None


def _read_hub(name: str, rows: Any, column: str, bad: BadRows, share: Share) -> Iterator[Piece]:
    from datasets.distributed import split_dataset_by_node

    if share.world_size > 1:
        rows = split_dataset_by_node(rows, share.rank, share.world_size)
    if share.workers > 1:
        # A streamed data set shares its own shards among data workers.
        if not hasattr(rows, "num_shards") or hasattr(rows, "select"):
            rows = rows.shard(share.workers, share.worker)
        elif rows.num_shards < share.workers:
            raise ValueError(f"data.workers={share.workers}: {name} has {rows.num_shards} shards for each process")
    for number, row in enumerate(rows, 1):
        yield _checked(row.get(column), f"{name}: row {number}", column, bad)


def load_hub(name: str, source: Source, streaming: bool) -> Any:
    """A hub data set, "owner/name" or "owner/name:configuration", or a local folder of one, through `datasets`.

    Raises:
        ValueError: no such data set, split or column.
    """
    import datasets

    path, _, configuration = name.partition(":")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(path, configuration or None, split=source.split, streaming=streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data: {HUB}{name}: split {source.split!r}: {' '.join(str(error).split())}") from None
    if rows.column_names is not None and source.text_column not in rows.column_names:
        raise ValueError(
            f"data: {HUB}{name}: no column {source.text_column!r} (data.text_column); it has "
            f"{', '.join(rows.column_names)}"
        )
    return rows


def _checked(text: Any, place: str, column: str, bad: BadRows) -> Piece:
    if not isinstance(text, str):
        return bad.add(place, f"{column!r} is not a text")
    if not text.strip():
        return bad.add(place, "empty")
    try:
        return Piece(check_text(text, place), True)
    except ValueError:
        return bad.add(place, "not valid UTF-8")


def _pydoc_topics(part: str) -> Iterator[Piece]:
    from pydoc_data.topics import topics

    if part not in ("train", "validation"):
        raise ValueError(f"data: {PYDOC_TOPICS}{part}: the parts are train and validation")
    for index, name in enumerate(sorted(topics)):
        if (index % _HELD_OUT == _HELD_OUT - 1) == (part == "validation"):
            yield Piece(topics[name], True)


def _characters(document: list[Piece]) -> int:
    return sum(len(piece.text) for piece in document)


def _documents(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if piece.ends:
            yield document
            document = []


def tokenize(pieces: Iterable[Piece], tokenizer: Any) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of each piece, [END] after each document, and whether the document ends there.

    A batch of pieces is tokenised at once, on all cores.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end-of-text token to put between documents")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    for batch in _batched(pieces):
        encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, ids in zip(batch, encoded, strict=True):
            yield np.array([*ids, tokenizer.eos_token_id] if piece.ends else ids, dtype), piece.ends


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


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of one file.

    Raises:
        OSError: it can not be read.
        ValueError: it is not valid UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8 at byte {error.start}") from None


def read_passages(source: Source, tokenizer: Any, length: int, count: int, *, streaming: bool = False) -> torch.Tensor:
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


class TokenRows(Dataset[dict[str, Any]]):
    """Tokenised rows in a folder, memory-mapped: host memory does not grow with the data.

    Each item has `input_ids` (int64, [length or less]) and `row`, its index.

    Attributes:
        facts: documents, tokens, rows, left_out_tokens (of the last partial row, when packed) and bad_rows.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int = 0, last: int | None = None) -> None:
        """
        Args:
            folder: as `write_rows` leaves it.
            first, last: the rows to show, all by default.
        """
        folder = Path(folder)
        self._folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.length: int = self.facts["sequence_length"]
        self._ids = np.memmap(folder / "tokens.bin", np.dtype(self.facts["dtype"]), mode="r")
        # Where each row that is not full ends; all others follow from the length.
        self._short: list[list[int]] = self.facts["short_rows"]
        self._short_rows = [row for row, _ in self._short]
        self._missing = list(itertools.accumulate((self.length - size for _, size in self._short), initial=0))
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


def write_rows(pieces: Iterable[Piece], tokenizer: Any, length: int, folder: Path, layout: str = "packed") -> TokenRows:
    """Tokenise into a folder that exists, and open it.

    Raises:
        ValueError: less than one row; see `tokenize`.
    """
    facts: dict[str, Any] = {"documents": 0, "tokens": 0, "rows": 0, "left_out_tokens": 0, "sequence_length": length,
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
    if facts["rows"] == 0:
        raise ValueError(f"data: {facts['tokens']} tokens are less than one sequence of {length}")
    (folder / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return TokenRows(folder)


def cached_rows(
    source: Source, tokenizer: Any, recipe: DataRecipe, *, report: Callable[[str], None] = lambda line: None
) -> TokenRows:
    """The rows of a source, tokenised once and kept in a folder named by everything that they depend on.

    Args:
        source: the documents.
        tokenizer: a fast tokenizer.
        recipe: sequence_length, layout, strict and cache.
        report: takes a line about bad rows, if there are any.

    Raises:
        FileNotFoundError, ValueError: see `read_pieces` and `write_rows`.
    """
    key = _fingerprint(source, tokenizer, recipe)
    folder = cache_folder(recipe.cache) / key
    if not (folder / "facts.json").is_file():
        bad = BadRows(recipe.strict)
        with whole_folder(folder, overwrite=True) as partial:
            pieces = read_pieces(source, bad, streaming=recipe.streaming)
            rows = write_rows(pieces, tokenizer, recipe.sequence_length, partial, recipe.layout)
            rows.facts["bad_rows"] = bad.summary()
            (partial / "facts.json").write_text(json.dumps(rows.facts) + "\n", encoding="utf-8")
    rows = TokenRows(folder)
    if summary := rows.facts["bad_rows"]:
        report(f"data: {summary}")
    return rows


def cache_folder(cache: str | None = None) -> Path:
    """Where tokenised data is kept: `cache`, else $PLDR_CACHE, else ~/.cache/pldr."""
    chosen = cache or os.environ.get("PLDR_CACHE") or Path.home() / ".cache" / "pldr"
    return Path(chosen) / "tokens"


def _fingerprint(source: Source, tokenizer: Any, recipe: DataRecipe) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8"))
    facts: list[Any] = [source.text_column, source.split, source.interval, recipe.sequence_length, recipe.layout,
                        recipe.strict, tokenizer.eos_token_id, GROUP_DOCUMENTS]  # fmt: skip
    for name in source.names:
        if name.startswith(HUB):
            # What is streamed is not looked at before it is read.
            rows = None if recipe.streaming else load_hub(name.removeprefix(HUB), source, streaming=False)
            facts.append([name, getattr(rows, "_fingerprint", "")])
        elif name.startswith(PYDOC_TOPICS):
            facts.append([name, hashlib.sha256("".join(read_documents([name])).encode()).hexdigest()])
        else:
            for file in source_files(name):
                status = file.stat()
                facts.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    digest.update(json.dumps(facts).encode("utf-8"))
    return digest.hexdigest()[:32]


class TokenStream(IterableDataset[dict[str, Any]]):
    """Rows without end, tokenised as they are read, so that data larger than the disk can be trained on.

    Every pass reads the documents in the order of the source, mixed through a buffer whose seed is the recipe's and the
    pass's number. Each consumer (process × data worker) takes every n-th document; what does not fill a row begins the
    next pass, so that nothing is left out. The same arguments give the same rows: a resumed run reads again what it had
    read, and goes on from there.
    """

    def __init__(
        self, source: Source, tokenizer: Any, recipe: DataRecipe, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        if worker:  # a forked process has lost the threads of the tokenizer, which would wait for them for ever
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        share = Share(self.rank, self.world_size, worker_id, workers)
        tokens = tokenize(self._pieces(share), self.tokenizer)
        for number, row in enumerate(rows_of(tokens, self.recipe.sequence_length, self.recipe.layout)):
            yield {"input_ids": torch.from_numpy(row.astype(np.int64)), "row": number * share.consumers + share.number}

    def _pieces(self, share: Share) -> Iterator[Piece]:
        for number in itertools.count():
            bad = BadRows(self.recipe.strict, notify=_warn if number == 0 else None)
            documents = _documents(read_pieces(self.source, bad, streaming=True, share=share))
            empty = True
            generator = random.Random(f"{self.seed}:{number}:{share.number}")
            for document in shuffled(documents, self.recipe.shuffle_buffer, generator, _characters):
                empty = False
                yield from document
            if empty:
                raise ValueError(
                    f"data: no document for consumer {share.number + 1} of {share.consumers}; use fewer processes "
                    "or data.workers"
                )


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def shuffled(
    items: Iterator[Any], buffer_size: int, generator: random.Random, size_of: Callable[[Any], int] = lambda item: 0
) -> Iterator[Any]:
    """Items in random order within a buffer; a size of 0 or 1 keeps the order.

    Args:
        items: to be mixed.
        buffer_size: most items that are held at once; fewer where together they are larger than `_BUFFER_CHARACTERS`.
        generator: of the random numbers.
        size_of: of an item, in characters.
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
    """A batch of rows: `input_ids`, `labels` and `row`; where rows are short, padding and an `attention_mask` too.

    Args:
        items: of `TokenRows` or `TokenStream`.
        pad_token_id: fills the end of short rows; its labels are -100.
        length: width of the batch, or None for that of its longest row.
    """
    rows = [item["input_ids"] for item in items]
    numbers = torch.tensor([item["row"] for item in items])
    width = length or max(len(row) for row in rows)
    if all(len(row) == width for row in rows):
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids, "row": numbers}
    sizes = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) < sizes[:, None]).long()
    ids = torch.full((len(rows), width), pad_token_id)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask, "row": numbers}
