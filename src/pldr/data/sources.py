"""Documents from local files, hub data sets and Python's own language reference.

They are read and handed out in pieces, so that memory does not grow with a document or a line, and bad rows are counted or
refused.
"""

import codecs
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pldr.files import one_line, printable, sha256
from pldr.tokenizer import check_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# What the names of sources that are no files begin with.
HUB, PYDOC_TOPICS = "hub:", "pydoc-topics:"
# Every eighth topic of Python's language reference is held out for validation.
_HELD_OUT = 8
# The longest row: bytes of a JSON line, characters of a text in Parquet or of the hub. JSON, parsed, takes up to 50 times as
# much memory.
LONGEST_ROW = 1 << 25
_TOO_LONG = f"longer than {LONGEST_ROW >> 20} MiB"
# A document is handed out in pieces of at most so many characters.
_PIECE_CHARACTERS = 1 << 18
# A piece ends before a space between two words, where a tokenizer of words begins anew; where it has none, before the end of
# a line or several spaces, which are one space to the published tokenizer. Only a word longer than a piece is cut inside:
# there is no better place, and one or two of its tokens may be others.
_PIECE = re.compile(r".*\S(?= \S)|.*\S(?=[ \n])|.+", re.DOTALL)
# What a damaged file raises while it is read.
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)


class Piece(NamedTuple):
    """A stretch of a document.

    Attributes:
        text: of at most 2^18 characters; empty for a bad row alone.
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
        line = "; ".join(
            f"{count:,} skipped: {fault} (first: {self.first[fault]})" for fault, count in self.counts.items()
        )
        return line.encode("utf-8", "backslashreplace").decode("utf-8")  # a file's name need not be UTF-8


def names_of(data: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Data as a user gives it, one name or several, as the names of a `Source`."""
    return [str(name) for name in ([data] if isinstance(data, (str, os.PathLike)) else data)]


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        names: see `pldr.recipe.DataRecipe.train`.
        text_column: of JSON lines, Parquet files and hub data sets.
        split: of hub data sets.
        interval: "start:stop" by index or percent ("0:1000", "90%:100%"), over all documents in order; "" for all.
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


def documents_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each document."""
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if piece.ends:
            yield document
            document = []


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
    share = share or Share()
    with_hub = any(name.startswith(HUB) for name in source.names)
    if source.interval and share.consumers > 1 and len(source.names) > 1 and with_hub:
        raise ValueError("data: an interval over several sources, one of the hub, can not be shared among processes")
    count = sum(_count(name, source, streaming) for name in source.names) if "%" in source.interval else None
    start, stop = parse_interval(source.interval, count)
    index = 0
    for name in source.names:
        own = 0  # rows of this name; those of a hub data set are shared out before they come here
        if name.startswith(HUB):
            rows = _load_hub(name, source, streaming)
            if source.interval and len(source.names) == 1:
                # Without reading what comes before.
                rows = rows.skip(start)
                if stop != float("inf"):
                    rows = rows.take(int(stop) - start)
                start, stop = 0, float("inf")
            pieces, mine = _read_hub(name, rows, source.text_column, bad, share), Share()
        else:
            pieces, mine = _read(name, source.text_column, bad), share
        for piece in pieces:
            if start <= index < stop and own % mine.consumers == mine.number and piece.text:
                yield piece
            index += piece.ends
            own += piece.ends
            if index >= stop:
                return


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


def source_state(source: Source, streaming: bool) -> list[list[Any]]:
    """What shows that a source's documents have changed, name by name: hashes of contents; and how they are read.

    Raises:
        FileNotFoundError, ValueError: see `read_pieces`.
    """
    state: list[list[Any]] = [[_PIECE_CHARACTERS, LONGEST_ROW]]
    for name in source.names:
        if name.startswith(HUB):
            # What is streamed is not looked at before it is read.
            rows = None if streaming else _load_hub(name, source, streaming=False)
            state.append([name, getattr(rows, "_fingerprint", "")])
        elif name.startswith(PYDOC_TOPICS):
            state.append(
                [name, hashlib.sha256("".join(piece.text for piece in _read(name, "", BadRows())).encode()).hexdigest()]
            )
        else:
            state += [[str(file.resolve()), sha256(file)] for file in _files(name)]
    return state


def _count(name: str, source: Source, streaming: bool) -> int:
    """How many documents a name has, bad rows with them.

    Raises:
        ValueError: a streamed hub data set that does not tell how many rows it has.
    """
    if not name.startswith(HUB):
        return sum(piece.ends for piece in _read(name, source.text_column, BadRows()))
    rows = _load_hub(name, source, streaming)
    if not streaming:
        return len(rows)
    splits = rows.info.splits or {}
    if source.split not in splits or not splits[source.split].num_examples:
        raise ValueError(f"data: {name}: does not tell its number of rows; give the interval by index, not percent")
    return splits[source.split].num_examples


# --- local files ----------------------------------------------------------------------------------------------------


def _read(name: str, column: str, bad: BadRows) -> Iterator[Piece]:
    """The pieces of local files or of pydoc-topics; one empty piece for each bad row."""
    if name.startswith(PYDOC_TOPICS):
        yield from _pydoc_topics(name.removeprefix(PYDOC_TOPICS))
        return
    for file in _files(name):
        kind = file.with_suffix("").suffix if file.suffix in _OPENERS else file.suffix
        read = {".jsonl": _read_json_lines, ".parquet": _read_parquet}.get(kind, _read_text)
        try:
            yield from read(file, column, bad)
        except _UNREADABLE as error:
            raise ValueError(f"data: {file}: damaged or unreadable file ({one_line(error)})") from None


def _files(name: str) -> list[Path]:
    """The files that a name or glob pattern matches, sorted.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there is something that can not be read twice, or at all.
    """
    files = sorted(Path(path) for path in glob.glob(name, recursive=True) if not Path(path).is_dir())
    if not files:
        raise FileNotFoundError(f"data: {name} matches no file")
    for file in files:
        if not file.is_file():
            raise ValueError(f"data: {file}: is a pipe, socket, device or broken link; copy its data to a file")
    return files


def _read_text(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    """One document."""
    # It is used whole or not at all, so that its bytes are checked before the first piece is handed out.
    try:
        characters = sum(len(text.strip()) for text in _decoded(file))
    except UnicodeDecodeError:
        yield bad.add(str(file), "not valid UTF-8")
        return
    if not characters:
        yield bad.add(str(file), "empty")
        return
    yield from _cut(_decoded(file))


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(file) as stream:
        while block := stream.read(_PIECE_CHARACTERS):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _cut(blocks: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > _PIECE_CHARACTERS:
            piece = _PIECE.match(held, 0, _PIECE_CHARACTERS)
            assert piece is not None
            yield Piece(piece[0], False)
            held = held[piece.end() :]
    yield Piece(held, True)


def _read_json_lines(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    with _open(file) as stream:
        for number, line in enumerate(_lines(stream), 1):
            place = f"{file}: line {number}"
            if len(line) > LONGEST_ROW:
                yield bad.add(place, _TOO_LONG)
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield bad.add(place, "not valid UTF-8")
            except json.JSONDecodeError:
                yield bad.add(place, "not JSON")
            except (ValueError, RecursionError):
                yield bad.add(place, "JSON with too long a number, or too deep")
            else:
                if isinstance(row, dict) and column in row:
                    yield from _checked(row[column], place, column, bad)
                else:
                    yield bad.add(f"{place}{_names(row)}", f"no JSON object with {column!r}")


def _names(row: Any) -> str:
    """The columns that there are."""
    return f" (with {reprlib.repr(sorted(row)).strip('[]')})" if isinstance(row, dict) and row else ""


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Lines; one that is longer than `LONGEST_ROW` is cut behind its next byte."""
    while line := stream.readline(LONGEST_ROW + 1):
        yield line
        while not line.endswith(b"\n") and (line := stream.readline(_PIECE_CHARACTERS)):
            pass


def _read_parquet(file: Path, column: str, bad: BadRows) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Buffered, so that a group of rows is not held, and row by row, since many can be one long text, stored once.
        opened = parquet.ParquetFile(file, buffer_size=_PIECE_CHARACTERS)
        if column not in opened.schema_arrow.names:
            names = printable(", ".join(opened.schema_arrow.names))
            raise ValueError(f"data: {file}: no column {column!r}; it has {names}")
        for number, batch in enumerate(opened.iter_batches(batch_size=1, columns=[column]), 1):
            place = f"{file}: row {number}"
            try:
                value = batch.column(0)[0].as_py()
            except UnicodeDecodeError:
                yield bad.add(place, "not valid UTF-8")
            except (ValueError, OverflowError):  # a date that Python has not
                yield bad.add(place, f"{column!r} is not a text")
            else:
                yield from _checked(value, place, column, bad)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _checked(text: Any, place: str, column: str, bad: BadRows) -> Iterator[Piece]:
    """What one row's column holds, as a document, where it is a text."""
    if not isinstance(text, str):
        yield bad.add(place, f"{column!r} is not a text")
    elif len(text) > LONGEST_ROW:
        yield bad.add(place, _TOO_LONG)
    elif not text.strip():
        yield bad.add(place, "empty")
    else:
        try:
            check_text(text, place)
        except ValueError:
            yield bad.add(place, "not valid UTF-8")
        else:
            yield from _cut(text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS))


def _open_zstd(file: Path, mode: str) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


# By the ending of a file's name.
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstd}


def _open(file: Path) -> io.BufferedReader:
    """Its bytes, decompressed."""
    if file.suffix in _OPENERS and file.stat().st_size == 0:  # for gzip, and for it alone, that is no error
        raise EOFError("it is empty")
    opened: io.BufferedReader = _OPENERS.get(file.suffix, open)(file, "rb")
    return opened


# --- hub data sets and the language reference -----------------------------------------------------------------------


def _load_hub(name: str, source: Source, streaming: bool) -> "Dataset | IterableDataset":
    """A hub data set, "hub:owner/name" or "hub:owner/name:configuration", or a local folder of one, through `datasets`.

    Raises:
        ValueError: no such data set, split or column.
    """
    import datasets

    path, _, configuration = name.removeprefix(HUB).partition(":")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(path, configuration or None, split=source.split, streaming=streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data: {name}: split {source.split!r}: {one_line(error)}") from None
    if rows.column_names is not None and source.text_column not in rows.column_names:
        raise ValueError(
            f"data: {name}: no column {source.text_column!r} (data.text_column); it has {', '.join(rows.column_names)}"
        )
    return rows


def _read_hub(name: str, rows: "Dataset | IterableDataset", column: str, bad: BadRows, share: Share) -> Iterator[Piece]:
    """The pieces of this consumer's rows."""
    from datasets.distributed import split_dataset_by_node

    if share.world_size > 1:
        rows = split_dataset_by_node(rows, share.rank, share.world_size)
    if share.workers > 1:
        # A streamed data set shares its own shards among data workers.
        if not hasattr(rows, "num_shards") or hasattr(rows, "select"):
            rows = rows.shard(share.workers, share.worker)
        elif rows.num_shards < share.workers:
            raise ValueError(f"data.workers={share.workers}: {name} has {rows.num_shards} shards for each process")
    mine = iter(rows)
    for number in itertools.count(1):
        try:
            row = next(mine)
        except StopIteration:
            return
        except (ValueError, OSError, OverflowError) as error:  # pyarrow's are among them
            raise ValueError(f"data: {name}: row {number}: {one_line(error)}") from None
        yield from _checked(row.get(column), f"{name}: row {number}", column, bad)


def _pydoc_topics(part: str) -> Iterator[Piece]:
    """The train or the validation part of Python's language reference, one document a topic."""
    from pydoc_data.topics import topics

    if part not in ("train", "validation"):
        raise ValueError(f"data: {PYDOC_TOPICS}{part}: the parts are train and validation")
    for index, name in enumerate(sorted(topics)):
        if (index % _HELD_OUT == _HELD_OUT - 1) == (part == "validation"):
            yield Piece(topics[name], True)
