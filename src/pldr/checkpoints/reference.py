"""Reading files of the published training code as data: nothing in them is ever run.

Weights come through torch's weights-only loader, hyperparameters are parsed, and predefined operators are unpickled by
a reader that knows tensors alone.
"""

import ast
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from pldr.files import one_line

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
    shared = [_common_start(file.name, path.name) for file in beside]
    if shared.count(max(shared)) > 1:
        raise ValueError(f"{path.parent}: {len(beside)} *hyperparameters.py, and none is clearly that of {path.name}")
    return path, beside[shared.index(max(shared))]


def _common_start(one: str, other: str) -> int:
    """How many characters two names share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The ``hpdict`` of a published hyperparameter file, parsed as literals; the file is never run.

    Raises:
        ValueError: no such dictionary, or anything in it but numbers, strings, lists and the activation's name.
    """
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
        ValueError: damaged, or holding anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint of tensors alone ({one_line(error)})") from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        and tensor.device.type == "cpu" for name, tensor in state.items()
    ):  # fmt: skip
        raise ValueError(f"{path}: no model_state_dict of named, dense tensors in it")
    return state


def read_pickled_tensors(path: Path) -> Any:
    """What a pickle of tensors, or of lists and dictionaries of them, holds; tensors of any device come to the CPU.

    Raises:
        OSError: the file can not be read.
        ValueError: damaged, or anything else in it.
    """
    content = path.read_bytes()
    try:
        return _TensorUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # noqa: BLE001 (damaged pickles raise anything; each is the file's fault)
        raise ValueError(f"{path}: not a pickle of tensors alone ({one_line(error)})") from None


class _TensorUnpickler(pickle.Unpickler):
    """Reads pickled tensors and lists of them; any other class or function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        # Methods of ours, so that a pickle gets no hold of a function that lives on after it was read.
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_from_storage,
            # Torch's own function of this name loads with weights_only=False: it would run what the bytes say.
            ("torch.storage", "_load_from_bytes"): self._storage_from_bytes,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused a persistent id")

    def _storage_from_bytes(self, data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def _tensor_from_storage(self, *arguments: Any) -> torch.Tensor:
        return torch._utils._rebuild_tensor_v2(*arguments)
