"""Reading files of the published training code as data: nothing in them is ever run.

Hyperparameters are parsed. Weights and predefined operators are pickles, read by a reader that knows tensors and plain
containers alone: a tensor is made here, of bytes that are in the file, and all together hold no more than the file does.
"""

import ast
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from pldr.files import check_regular, one_line

# The spellings of the one activation that published hyperparameter files name.
_SILU = ("F.silu", "torch.nn.functional.silu", "nn.functional.silu")


def find_reference_files(path: Path) -> tuple[Path, Path]:
    """The weights and the hyperparameters of a checkpoint, given as its folder or as its ``.pth``.

    Raises:
        FileNotFoundError: no hyperparameters beside the weights.
        ValueError: several files that could be meant.
    """
    if path.is_dir():
        candidates = sorted(path.glob("*.pth"))
        if len(candidates) != 1:
            raise ValueError(f"{path}: {len(candidates)} .pth files; name the one to read")
        path = candidates[0]
    beside = sorted(path.parent.glob("*hyperparameters.py"))
    if not beside:
        raise FileNotFoundError(f"{path.parent}: no *hyperparameters.py beside {path.name}")
    # Several checkpoints in one folder: the file that shares the longest beginning of the name, if one does.
    shared = [len(os.path.commonprefix((file.name, path.name))) for file in beside]  # noqa: RUF071 (of characters)
    if shared.count(max(shared)) > 1:
        raise ValueError(f"{path.parent}: {len(beside)} *hyperparameters.py, and none is clearly that of {path.name}")
    return path, beside[shared.index(max(shared))]


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The ``hpdict`` of a published hyperparameter file, parsed as literals; the file is never run.

    Raises:
        OSError: the file can not be read.
        ValueError: no such dictionary, or anything in it but numbers, strings, lists and the activation's name.
    """
    check_regular(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a Python file ({one_line(error)})") from None
    if sum(isinstance(node, ast.Name) and node.id == "hpdict" for node in ast.walk(tree)) > 1:
        raise ValueError(f"{path}: hpdict is used more than once; the file is read as data, write one dictionary")
    for statement in tree.body:
        named = isinstance(statement, ast.Assign) and [getattr(target, "id", None) for target in statement.targets]
        if named != ["hpdict"]:
            continue
        assert isinstance(statement, ast.Assign)
        if not isinstance(statement.value, ast.Dict):
            break
        result = {}
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            try:
                name = ast.literal_eval(key) if key is not None else None
                if not isinstance(name, str):
                    raise ValueError
                result[name] = "silu" if ast.unparse(value) in _SILU else ast.literal_eval(value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                shown = ast.unparse(key) if key is not None else "**"
                raise ValueError(
                    f"{path}: line {value.lineno}: {shown}: {ast.unparse(value)} is not a literal; the file is read as "
                    "data, write the value itself"
                ) from None
        return result
    raise ValueError(f"{path}: no dictionary 'hpdict = {{...}}' in it")


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """The ``model_state_dict`` of a published ``.pth``, on the CPU.

    Raises:
        OSError: the file can not be read.
        ValueError: damaged, or holding anything but tensors and plain values.
    """
    with path.open("rb") as stream:
        try:
            content = _read_archive(stream)
        except Exception as error:  # noqa: BLE001 (damaged pickles raise anything; each is the file's fault)
            raise ValueError(f"{path}: damaged, or not a checkpoint of tensors alone ({one_line(error)})") from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):  # fmt: skip
        raise ValueError(f"{path}: no model_state_dict of named tensors in it")
    return dict(state)


def read_pickled_tensors(path: Path) -> Any:
    """What a pickle of tensors, or of lists and dictionaries of them, holds; tensors of any device come to the CPU.

    Raises:
        OSError: the file can not be read.
        ValueError: damaged, or anything else in it.
    """
    with path.open("rb") as stream:
        try:
            return _TensorUnpickler(stream, room=_size(stream)).load()
        except Exception as error:  # noqa: BLE001 (as above)
            raise ValueError(f"{path}: not a pickle of tensors alone ({one_line(error)})") from None


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size


# --- pickles of tensors ---------------------------------------------------------------------------------------------

# Kinds of storage, which tensors are pieces of. They name a dtype here; those of CUDA tensors have the same names.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
    "CharStorage": torch.int8, "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16,
}  # fmt: skip
# What torch's format before its zip files begins with.
_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    """`length` bytes of a stream, from `start` on."""

    stream: BinaryIO
    start: int
    length: int
    dtype: torch.dtype


def _no_storage(key: Any, dtype: torch.dtype, count: int) -> Any:
    raise pickle.UnpicklingError("refused a persistent id")


# The reader in Python: the one in C makes room for as many objects as a pickle says that it will refer to.
class _TensorUnpickler(pickle._Unpickler):
    """Reads pickled tensors and plain containers; any other class or function is refused before it is looked up.

    Args:
        stream: what to read, from where it is.
        room: bytes that all tensors together may hold.
        storage: what stands for a storage, given its key, its dtype and how many values it has.
    """

    def __init__(
        self, stream: BinaryIO, room: int = 0, storage: Callable[[Any, torch.dtype, int], Any] = _no_storage
    ) -> None:
        super().__init__(stream)
        self._room = room
        self._storage = storage

    def load(self) -> Any:
        try:
            return super().load()
        finally:  # tensors that it remembers, and methods of this object, would keep each other
            self.memo.clear()  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        # Methods of ours, so that a pickle gets no hold of a function that lives on after it was read.
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            # Torch's own function of this name runs what the bytes say.
            ("torch.storage", "_load_from_bytes"): self._storage_from_bytes,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _device, count, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("refused a persistent id")
        return self._storage(key, dtype, count)

    def _storage_from_bytes(self, data: bytes) -> _Storage:
        """A storage in torch's format before its zip files: five pickles, a number of values, and their bytes."""
        stream = io.BytesIO(data)
        parts = [_TensorUnpickler(stream, storage=lambda *storage: storage).load() for _ in range(5)]
        magic, _version, system, (key, dtype, count), keys = parts
        if magic != _MAGIC or not system["little_endian"] or keys != [key]:
            raise ValueError("not a storage in a format that is read here")
        (found,) = struct.unpack("<q", stream.read(8))
        start = stream.tell()
        if not found == count == (len(data) - start) / dtype.itemsize:
            raise ValueError(f"a storage of {count} values has {len(data) - start} bytes")
        return _Storage(stream, start, len(data) - start, dtype)

    def _tensor(self, storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
        """A tensor that holds a copy of its part of the storage.

        Raises:
            ValueError: it is not contiguous, not all in its storage, or there is no room left for it.
        """
        if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
            raise ValueError("sizes of a tensor that are no sizes")
        count, step = math.prod(size), 1
        for length, found in zip(reversed(size), reversed(stride), strict=True):
            if found != step and length != 1 and count:
                raise ValueError(f"a tensor of {tuple(size)} that is not contiguous")
            step *= length
        begin, length = offset * storage.dtype.itemsize, count * storage.dtype.itemsize
        self._room -= length
        if begin + length > storage.length or self._room < 0:
            raise ValueError(f"a tensor of {tuple(size)} that is larger than what the file holds for it")
        tensor = torch.empty(tuple(size), dtype=storage.dtype)
        storage.stream.seek(storage.start + begin)
        if storage.stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy()) != length:  # type: ignore[attr-defined]
            raise EOFError("the file ends before its tensors do")
        return tensor

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data


def _read_archive(stream: BinaryIO) -> Any:
    """What `torch.save` put into a zip file, whose members it leaves uncompressed."""
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
    folder = next(name for name in members if name.endswith("data.pkl")).removesuffix("data.pkl")

    def member(name: str) -> tuple[int, int]:
        """Where it starts, and its length."""
        info = members[folder + name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        stream.seek(info.header_offset + 26)
        return stream.tell() + 4 + sum(struct.unpack("<HH", stream.read(4))), info.file_size

    def content(name: str) -> bytes:
        start, length = member(name)
        stream.seek(start)
        return stream.read(length)

    def storage(key: Any, dtype: torch.dtype, count: int) -> _Storage:
        start, length = member(f"data/{key}")
        if length != count * dtype.itemsize:
            raise ValueError(f"a storage of {count} values has {length} bytes")
        return _Storage(stream, start, length, dtype)

    if f"{folder}byteorder" in members and content("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    return _TensorUnpickler(io.BytesIO(content("data.pkl")), _size(stream), storage).load()
