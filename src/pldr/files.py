"""Writing results so that a folder or file is there whole or not at all."""

import glob
import hashlib
import json
import math
import os
import platform
import re
import reprlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

_WINDOWS = os.name == "nt"


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder to write, checked before any work is done for it.

    Raises:
        FileExistsError: it exists and holds something, and `overwrite` is False.
        OSError: it can not be created or written.
        ValueError: its name is not valid UTF-8.
    """
    path = Path(path)
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:  # it could be written, but safetensors would not read it
        raise ValueError(f"{path}: is not valid UTF-8; choose another output folder") from None
    if path.resolve() == Path.cwd() or path.is_mount():
        raise FileExistsError(
            f"{path}: is the current folder or a mount point, which can not be replaced; name one inside"
        )
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file; choose another output folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path}: exists and is not empty; choose another folder, or overwrite it")
    try:  # which tells more than permissions do
        os.rmdir(_hidden(path, "partial", _nearest_folder(path)))
    except OSError as error:
        reason = f"{_nearest_folder(path)} is not writable ({error.strerror})"
        raise PermissionError(f"{path}: {reason}; choose another output folder") from None
    return path


def _hidden(path: Path, kind: str, place: Path) -> Path:
    """A new folder that `sweep` knows, for what is to come to `path` or was there."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{kind}-{process_mark()}-", dir=place))


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Errors name the place that was meant, not the hidden one near it."""
    try:
        yield
    except OSError as error:
        if f".{path.name}.partial-" in str(error.filename):
            error.filename = str(path)
        raise


def _nearest_folder(path: Path) -> Path:
    """The folder that `path` is in or will be made under."""
    return next(folder for folder in path.absolute().parents if folder.exists())


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False, keep: bool = True) -> Iterator[Path]:
    """A temporary folder near `path` that takes its place when the block ends well, and vanishes when it does not.

    A link to a folder stays a link: what it points to is replaced. What a killed process left of an earlier attempt is
    removed first, and what it had set aside brought back.

    Args:
        path: the place.
        overwrite: replace what is there.
        keep: where something has come to the place meanwhile, leave the result beside it.

    Raises:
        FileExistsError: see `check_output`; or something has come to the place meanwhile: the message says where the
            result is then.
        OSError: see `check_output`.
    """
    path = _behind_links(check_output(path, overwrite=overwrite))
    sweep(path)
    # Beside its place or, where that is still to be made, above it: on the same disk, and nothing else is left behind.
    partial = _hidden(path, "partial", _nearest_folder(path))
    try:
        with _errors_of(path):
            yield partial
            settle(partial)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and overwrite:
                with set_aside(path):
                    os.replace(partial, path)
            else:
                _put(partial, path, keep)
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """What is at a place is out of the way within the block, and gone after it; back, if an error leaves the place free."""
    aside = _hidden(path, "old", path.parent)
    os.replace(path, aside / path.name)
    try:
        yield
    except BaseException:
        if not path.exists():
            os.replace(aside / path.name, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(partial: Path, path: Path, keep: bool) -> None:
    """Move a folder to a place that is free or empty.

    Raises:
        FileExistsError: it no longer is; with `keep`, the folder is then beside it.
    """
    try:
        if _WINDOWS and path.is_dir() and not any(path.iterdir()):  # no folder takes the place of an empty one there
            path.rmdir()
        os.rename(partial, path)
    except OSError:
        if not path.exists():
            raise
        if not keep:
            raise FileExistsError(f"{path}: something has come there meanwhile") from None
        beside = next(name for n in count(1) if not (name := path.with_name(f"{path.name}-{n}")).exists())
        os.rename(partial, beside)
        raise FileExistsError(f"{path}: something has come there meanwhile; the result is in {beside}") from None


def settle(folder: Path) -> None:
    """Ordinary permissions, where temporary files have private ones, and everything on the disk."""
    probe = folder / ".ordinary"  # what a folder gets here; to ask for the umask is to set it, for every thread
    probe.mkdir()
    ordinary = probe.stat().st_mode & 0o777
    probe.rmdir()
    for place in (*folder.rglob("*"), folder):
        if not place.is_symlink():
            os.chmod(place, ordinary if place.is_dir() else ordinary & 0o666)
            sync(place)


def sync(place: Path) -> None:
    """Make sure that a file, or the names in a folder, survive a loss of power."""
    if _WINDOWS and place.is_dir():  # folders can not be opened there, and what is opened to be read can not be synced
        return
    handle = os.open(place, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _behind_links(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to write to: it takes the file's place when the block ends well, and vanishes if not.

    Raises:
        OSError: it can not be written.
    """
    path = _behind_links(Path(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    partial = path.with_name(f".{path.name}.partial-{process_mark()}-{threading.get_ident()}")
    try:
        with _errors_of(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


# --- processes that were killed -------------------------------------------------------------------------------------


def process_mark() -> str:
    """What tells this process from others, also of other machines that share the disk: "host-pid"."""
    return f"{_host()}-{os.getpid()}"


def is_running(mark: str) -> bool:
    """Whether the process of a `process_mark` runs; of another machine's, which can not be asked, True."""
    host, _, number = mark.rpartition("-")
    if host != _host():
        return True
    import psutil  # not with a model's own code, which asks for transformers alone

    return psutil.pid_exists(int(number))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """A file beside the folder says that it is this process's, for as long as the process runs.

    Raises:
        FileExistsError: it is another one's.
    """
    made = [folder for folder in output.parents if not folder.exists()]  # innermost first
    lock = f".{output.name}.lock-"
    mine = output.with_name(lock + process_mark())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_text(mine, f"process {os.getpid()} on {platform.node()}, since {started}\n")
        # Its own first, then the others': of two that start at once, none overlooks the other.
        for other in output.parent.glob(f"{glob.escape(lock)}*"):
            if other == mine:
                continue
            if not is_running(other.name.removeprefix(lock)):
                other.unlink(missing_ok=True)
                continue
            with suppress(FileNotFoundError):  # it has just ended
                raise FileExistsError(
                    f"{output}: another run is in it ({read_text(other).strip()}); wait for it, stop it, or choose another "
                    f"output; if there is no such process any more, delete {other}"
                )
        yield
    finally:
        mine.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # it is not empty, as a rule; other runs may be in it
                folder.rmdir()


def _host() -> str:
    return re.sub(r"\W", "_", platform.node()) or "here"


def sweep(path: Path) -> None:
    """Remove what killed processes left of attempts at a file or folder; what they had set aside comes back if it is gone."""
    for left in _nearest_folder(path).glob(f".{glob.escape(path.name)}.*-*"):
        found = re.fullmatch(rf"\.{re.escape(path.name)}\.(partial|old)-(.+-\d+)-\w+", left.name)
        if found is None or is_running(found[2]):
            continue
        if found[1] == "old" and (left / path.name).exists() and not path.exists():
            os.replace(left / path.name, path)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


# --- text -----------------------------------------------------------------------------------------------------------


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Whole or not at all, as UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: infinities and NaN, which it has no number for, become null.

    Bytes that are not UTF-8, in names of files, become the escapes that JSON has for them.
    """
    text = json.dumps(json_safe(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_safe(value: Any) -> Any:
    """Nested dictionaries and lists with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: json_safe(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Whole or not at all."""
    write_text(path, to_json(value, indent=indent) + "\n")


def read_json(path: str | os.PathLike[str], shape: Any = Any) -> Any:
    """
    Raises:
        OSError: the file can not be read.
        ValueError: it is not valid JSON in UTF-8, or not of the shape.
    """
    return parse_json(read_text(path), path, shape)


def parse_json(text: str, name: object, shape: Any = Any) -> Any:
    """
    Args:
        text: JSON.
        name: where it is from, for the error.
        shape: see `check_shape`.

    Raises:
        ValueError: it is not valid JSON, or more than Python reads: too deep, or with a number of too many digits; or it
            is not of the shape.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({one_line(error)})") from None
    try:
        check_shape(value, shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return value


# What a type in a shape says of a value.
_TYPES: dict[object, tuple[str, Callable[[Any], bool]]] = {
    Any: ("anything", lambda value: True),
    dict: ("an object", lambda value: type(value) is dict),
    list: ("a list", lambda value: type(value) is list),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a text", lambda value: type(value) is str),
    int: ("a count", lambda value: type(value) is int and 0 <= value < 1 << 53),
    float: ("a finite number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max),
}


def check_shape(value: Any, shape: Any, place: str = "") -> None:
    """
    Args:
        value: what was read from JSON.
        shape: what it should be: `bool`, `str`, `int` (a count), `float` (a finite number), `dict`, `list` or `Any`;
            {name: shape}, an object with these fields at least; [shape], a list of such; (shape,), such or none; or the
            value itself.
        place: of the value in others, for the error.

    Raises:
        ValueError: it is something else; the first field that is missing or wrong is named.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check_shape(value, shape[0], place)
    elif isinstance(shape, dict) and isinstance(value, dict):
        for name, part in shape.items():
            check_shape(value.get(name), part, f"{place}.{name}" if place else name)
    elif isinstance(shape, list) and isinstance(value, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{place}[{index}]")
    else:
        type_of = type(shape) if isinstance(shape, (dict, list)) else shape
        kind, fits = _TYPES.get(type_of, (repr(shape), lambda value: value == shape))
        if not fits(value):
            wrong = "is missing" if value is None else f"must be {kind}, got {reprlib.repr(value)}"
            raise ValueError(f"{place or 'it'} {wrong}")


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Each line of a file that is not blank: where it stands, for errors, and what it holds.

    Raises:
        OSError: the file can not be read.
        ValueError: it is not UTF-8, or a line (named) is not valid JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield (where := f"{path}, line {number}"), parse_json(line, where)


def check_regular(path: Path) -> None:
    """
    Raises:
        FileNotFoundError: there is nothing at `path`.
        OSError: it, or something one or two levels down in a folder, is neither file nor folder: a pipe or a device,
            which can keep its reader waiting or never end. A link counts as what it points to.
    """
    places = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    for place in places:
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise OSError(f"{place}: is a pipe or a device; only files are read")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")


# --- sums -----------------------------------------------------------------------------------------------------------

CHECKSUMS = "SHA256SUMS"


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, in hexadecimal."""
    check_regular(Path(path))
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path, files: Iterable[Path], name: str = CHECKSUMS) -> None:
    """The sums of files in a folder, as ``sha256sum -c`` reads them."""
    write_text(folder / name, "".join(f"{sha256(file)}  {file.relative_to(folder)}\n" for file in sorted(files)))


def read_sums(folder: Path, name: str = CHECKSUMS) -> dict[str, str]:
    """Name → sum, as `write_sums` left them."""
    lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return {file: digest for digest, _, file in (line.partition("  ") for line in lines)}


# --- errors ---------------------------------------------------------------------------------------------------------


def one_line(said: BaseException | str, limit: int = 200) -> str:
    """A text, or what an error says, in one printable line of at most `limit` characters; an error's kind, where it says nothing."""
    text = printable(" ".join(str(said).split()))
    if not text and isinstance(said, BaseException):
        text = type(said).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text with every character that a terminal would obey or could not show as its Python escape, but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def require(extra: str, *packages: str) -> None:
    """Raises ModuleNotFoundError: a package of one of the extras of this library is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"needs {', '.join(missing)}: pip install 'pldr[{extra}]'")
