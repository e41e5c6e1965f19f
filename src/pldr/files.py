"""Writing results so that a folder or file is there whole or not at all."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder to write, checked before any work is done for it.

    Raises:
        FileExistsError: it exists and holds something, and `overwrite` is False.
        OSError: it can not be created or written.
    """
    path = Path(path)
    if path.resolve() == Path.cwd() or path.is_mount():
        raise FileExistsError(
            f"{path}: is the current folder or a mount point, which can not be replaced; name one inside"
        )
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file; choose another output folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path}: exists and is not empty; choose another folder, or pass --overwrite")
    parent = _nearest_folder(path)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{path}: {parent} is not writable; choose another output folder")
    return path


def _nearest_folder(path: Path) -> Path:
    """The folder that `path` is in or will be made under."""
    return next(folder for folder in path.absolute().parents if folder.exists())


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder near `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError, OSError: see `check_output`.
    """
    path = check_output(path, overwrite=overwrite)
    # Beside its place or, where that is still to be made, above it: on the same disk, and nothing else is left behind.
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=_nearest_folder(path)))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(partial, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it; mkdtemp makes folders private."""
    value = os.umask(0)
    os.umask(value)
    return value


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to write to: it takes the file's place when the block ends well, and vanishes if not.

    Raises:
        OSError: it can not be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    """JSON that every reader takes: infinities and NaN, which it has no number for, become null."""
    return json.dumps(json_safe(value), indent=indent, ensure_ascii=False, allow_nan=False)


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


def read_json(path: str | os.PathLike[str]) -> Any:
    """
    Raises:
        OSError: the file can not be read.
        ValueError: it is not valid JSON in UTF-8.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from None


# --- sums -----------------------------------------------------------------------------------------------------------

CHECKSUMS = "SHA256SUMS"


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, in hexadecimal."""
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


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, in one line of at most `limit` characters; its kind, where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def require(extra: str, *packages: str) -> None:
    """
    Raises:
        ModuleNotFoundError: a package of one of the extras of this library is not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"needs {', '.join(missing)}: pip install 'pldr[{extra}]'")
