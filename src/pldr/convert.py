"""Reading and writing checkpoints: this library's layout and the two published ones.

Files from elsewhere are data. Weights are read from safetensors, or from a ``.pth`` through torch's weights-only loader;
hyperparameter files are parsed, never run; predefined operators are unpickled by a reader that knows tensors alone.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.initialization import no_init_weights

from pldr import checkpoint as files
from pldr import layouts
from pldr.certificate import warn_unless_certified_weights
from pldr.configuration_pldr import PldrConfig
from pldr.modeling_pldr import CHECKSUMS, PldrForCausalLM
from pldr.operator import ConstantOperator, check_operator_tensor
from pldr.saving import check_output, whole_folder
from pldr.tokenizer import check_vocabulary, load_tokenizer

LAYOUTS = ("pldr", "hub", "reference")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REFERENCE_WEIGHTS, _REFERENCE_G = "model-checkpoint.pth", "predefined_G_LM.pkl"
# The spellings of the one activation that published hyperparameter files name.
_SILU = ("F.silu", "torch.nn.functional.silu", "nn.functional.silu")


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    rope_pairing: str | None = None,
    G_LM: str | os.PathLike[str] | None = None,
) -> PldrForCausalLM:
    """A model in evaluation mode from a folder in any of the three layouts, or not at all.

    Unlike `from_pretrained`, which warns and goes on with random weights, every problem is an error here. A frozen model
    whose weights are no longer those of its certificate is loaded with a warning.

    Args:
        path: a folder in this library's or the hub's layout, a folder in the reference layout, or a ``.pth`` file with
            its ``*hyperparameters.py`` beside it.
        dtype: of the weights; "auto" keeps the stored one.
        device: where to put the model.
        rope_pairing: for a reference checkpoint of a v52 model, "halves"; that layout does not say. Others say so
            themselves.
        G_LM: for a reference v51G checkpoint, the file of its predefined operator, where it is not
            ``predefined_G_LM.pkl`` in the same folder.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: damaged files; unknown, missing or mis-shaped tensors, listed; values that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model folder")
    if path.is_dir() and (path / "config.json").is_file():
        if rope_pairing is not None or G_LM is not None:
            raise ValueError(
                "rope_pairing and G_LM apply to the reference layout only; this folder's config.json decides"
            )
        config = _read_config(path)
        _check_tensors(_read_shapes(path), config, str(path))
        _check_sums(path)
        model, report = PldrForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", output_loading_info=True
        )
        # _check_tensors has looked at the same files.
        assert report["missing_keys"] <= _optional(config), report
        assert not report["unexpected_keys"], report
    elif path.suffix == ".pth" or (path.is_dir() and any(path.glob("*.pth"))):
        model = _load_reference(path, dtype, rope_pairing, G_LM)
    else:
        raise FileNotFoundError(f"{path}: neither config.json nor a .pth file; this is not a model folder")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values; the file is damaged")
    if path.is_dir() and dtype == "auto":
        warn_unless_certified_weights(path, model.state_dict())
    return model.to(device).eval()


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "pldr",
    rope_pairing: str | None = None,
    G_LM: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> PldrForCausalLM:
    """Rewrite a checkpoint of any layout in another one. Tensors are copied bit for bit.

    Args:
        source, rope_pairing, G_LM: see `load_model`.
        destination: folder to write; it appears only when whole.
        to: "pldr" (this library), "hub" (the published Hugging Face layout) or "reference" (the published framework's).
        tokenizer: tokenizer to put beside the weights; by default the source folder's, where it has one.
        overwrite: replace a destination that is not empty.

    Returns:
        The model that was written.

    Raises:
        ValueError, OSError: see `load_model`; then nothing is written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"--to: must be one of {', '.join(LAYOUTS)}, got {to!r}")
    check_output(destination, overwrite=overwrite)
    model = load_model(source, rope_pairing=rope_pairing, G_LM=G_LM)
    found = _find_tokenizer(Path(source), tokenizer)
    if found is not None:
        check_vocabulary(found[0], model.config.vocab_size)
    if to == "reference":
        # Refuses what that layout can not say, before anything is written.
        layouts.ours_to_hyperparameters(model.config)
    with whole_folder(destination, overwrite=overwrite) as folder:
        if to == "pldr":
            model.save_pretrained(folder)
        elif to == "hub":
            _write_hub(model, folder)
        else:
            _write_reference(model, folder)
        if found is not None:
            loaded, sentencepiece_file = found
            loaded.save_pretrained(folder)
            if sentencepiece_file is not None:
                shutil.copyfile(sentencepiece_file, folder / "tokenizer.model")
    return model


def merge_checkpoint(
    checkpoint: str | os.PathLike[str], destination: str | os.PathLike[str], *, overwrite: bool = False
) -> PldrForCausalLM:
    """Make a model folder of a training checkpoint, whose tensors may be cut into one file a rank.

    Args:
        checkpoint: a folder `checkpoint-STEP` of a training run; the run's tokenizer, where it has one, comes along.
        destination: folder to write.
        overwrite: replace a folder that is not empty.

    Returns:
        The model.

    Raises:
        ValueError: the checkpoint is damaged, or files are missing.
        FileExistsError, OSError: the destination can not be written.
    """
    checkpoint = Path(checkpoint)
    check_output(destination, overwrite=overwrite)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint}: no config.json; this is not a training checkpoint")
    files.check(checkpoint)
    config = _read_config(checkpoint)
    saved = files.SavedTensors(checkpoint, "model")
    _check_tensors({name: tuple(saved[name].shape) for name in saved.names()}, config, str(checkpoint))
    with no_init_weights():
        model = PldrForCausalLM(config)
    for name, tensor in model.state_dict().items():
        files.copy_into(tensor, saved[name])
    with whole_folder(destination, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        for place in (checkpoint.parent / "tokenizer.json", checkpoint.parent / "tokenizer.model"):
            if place.is_file():
                load_tokenizer(place if place.suffix == ".model" else place.parent).save_pretrained(folder)
                break
    return model.eval()


def load_predefined_G(path: str | os.PathLike[str]) -> torch.Tensor:
    """A predefined operator from a file or a model: safetensors, or the published pickle of tensors (of any device).

    Args:
        path: a model folder whose operator is constant; ``.safetensors`` with one tensor or one called "G_LM"; else a pickle of one tensor a layer, or one
            (A_LM, G_LM) pair a layer.

    Returns:
        [L, H, D, D], on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything but tensors in the file, or tensors of other dimensions. Nothing in it is ever executed.
    """
    path = Path(path)
    if path.is_dir():
        model = load_model(path)
        if model.config.operator != "constant":
            raise ValueError(f"{path}: this model computes its G_LM; freeze it first (pldr freeze)")
        return _constant_operator(model)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged safetensors file ({error})") from None
        if "G_LM" not in tensors and len(tensors) != 1:
            raise ValueError(f"{path}: holds no tensor G_LM, but {', '.join(tensors)}")
        layers: Any = tensors.get("G_LM", next(iter(tensors.values())))
    else:
        try:
            layers = _TensorUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # noqa: BLE001 (damaged pickles raise anything; each is the file's fault)
            raise ValueError(f"{path}: not a pickle of tensors alone ({_one_line(error)})") from None
    rows = isinstance(layers, (list, tuple)) or (isinstance(layers, torch.Tensor) and layers.dim() > 0)
    if not rows or not all(isinstance(row, (torch.Tensor, list, tuple)) for row in layers):
        raise ValueError(f"{path}: not one tensor a layer")
    picked = [layer[-1] if isinstance(layer, (tuple, list)) and layer else layer for layer in layers]
    if not picked or not all(isinstance(layer, torch.Tensor) for layer in picked):
        raise ValueError(f"{path}: not one tensor a layer")
    squeezed = [layer[0] if layer.dim() == 4 and layer.shape[0] == 1 else layer for layer in picked]
    if any(layer.dim() != 3 or layer.shape != squeezed[0].shape for layer in squeezed):
        raise ValueError(f"{path}: G_LM must be [layers, heads, head_dim, head_dim]")
    return torch.stack(squeezed)


# --- this library's and the hub's layout ----------------------------------------------------------------------------


def _read_config(folder: Path) -> PldrConfig:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "pldrllm":
        raise ValueError(f"{folder / 'config.json'}: model_type must be 'pldrllm'")
    # Settings that make transformers fetch and run more code (attention kernels, quantisation backends) are no part of a
    # PLDR-LLM; whoever wants them passes them to `from_pretrained` in person.
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    refused = sorted({"attn_implementation", "experts_implementation", "quantization_config"} & fields.keys())
    if refused:
        raise ValueError(f"{folder / 'config.json'}: {refused[0]} is not read from a file; remove it")
    try:
        return PldrConfig.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'}: {_one_line(error)}") from None


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the weights, in a folder of one file or of shards with an index."""
    if not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    if (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder}: holds both {_WEIGHTS} and {_INDEX}; remove the one that does not belong")
    try:
        files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in files if Path(name).name != name]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / _INDEX}: damaged index ({_one_line(error)})") from None
    if outside:
        raise ValueError(f"{folder / _INDEX}: names a file outside the folder: {outside[0]}")
    return files


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()
    for name in _weight_files(folder):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing")
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
                    if key != layouts.HUB_G_STATUS:
                        dtypes.add(tensors.get_slice(key).get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged safetensors file ({_one_line(error)})") from None
    _check_one_dtype(dtypes, str(folder))
    return shapes


def _check_one_dtype(dtypes: Iterable[Any], where: str) -> None:
    """
    Raises:
        ValueError: tensors of several dtypes, which one model can not hold without rounding some of them.
    """
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    if len(names) != 1:
        raise ValueError(f"{where}: the tensors must have one dtype, found {', '.join(names) or 'none'}")


def _check_tensors(stored: Mapping[str, tuple[int, ...]], config: PldrConfig, where: str) -> None:
    """
    Raises:
        ValueError: the stored tensors are not exactly those of the model, by name and shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in PldrForCausalLM(config).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    renamed = layouts.published_to_ours(stored)
    for name, shape in stored.items():
        if name == layouts.HUB_G_STATUS:
            continue
        if name == layouts.HUB_G:
            if shape[1:3] != (3, 1):
                raise ValueError(f"{where}: {name} must be [layers, 3, 1, heads, head_dim, head_dim], got {shape}")
            found |= {layouts.OUR_G.format(layer): shape[3:] for layer in range(shape[0])}
        else:
            found[renamed.get(name, name)] = shape
    problems = [
        *_listed("missing", expected.keys() - found.keys() - _optional(config)),
        *_listed("unknown", found.keys() - expected.keys()),
        *_listed(
            "mis-shaped",
            (f"{name} {found[name]} instead of {expected[name]}"
             for name in expected.keys() & found.keys() if found[name] != expected[name]),
        ),
    ]  # fmt: skip
    if problems:
        raise ValueError(f"{where}: weights do not fit the configuration: {'; '.join(problems)}")


def _optional(config: PldrConfig) -> set[str]:
    """Tensors that need not be stored: an identity is an identity."""
    identity = config.operator == "constant" and config.operator_init == "identity"
    return {layouts.OUR_G.format(layer) for layer in range(config.num_hidden_layers)} if identity else set()


def _listed(what: str, names: Iterable[str], limit: int = 8) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{len(names)} {what} ({', '.join(names[:limit])}{more})"] if names else []


def _check_sums(folder: Path) -> None:
    """
    Raises:
        ValueError: a weight file differs from what this library wrote. Published folders carry no sums to compare.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    sums = {}  # name → digest
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    unlisted = [name for name in _weight_files(folder) if name not in sums]
    if unlisted:
        raise ValueError(f"{folder / CHECKSUMS}: does not list {unlisted[0]}; the folder was changed")
    for name, digest in sums.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / CHECKSUMS}: names {name!r}, which is not in the folder")
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise ValueError(
                    f"{folder / name}: does not match {CHECKSUMS}: the file is damaged or was changed; fetch it again, "
                    f"or delete {CHECKSUMS} if the change was meant"
                )


def _write_hub(model: PldrForCausalLM, folder: Path) -> None:
    """The hub layout: published tensor names, config.json in the remote code's terms."""
    state = {name: tensor.contiguous() for name, tensor in _published_state(model).items()}
    if model.config.operator == "constant":
        G_LM = _constant_operator(model)
        packed = G_LM.new_zeros(len(G_LM), 3, 1, *G_LM.shape[1:])
        packed[:, layouts.HUB_G_SLOT, 0] = G_LM
        state |= {layouts.HUB_G: packed, layouts.HUB_G_STATUS: torch.ones(len(G_LM), dtype=torch.bool)}
    try:
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / _WEIGHTS}: could not be written ({error})") from None
    fields = layouts.ours_to_hub_fields(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _published_state(model: PldrForCausalLM) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {theirs: state[ours].detach().cpu() for ours, theirs in layouts.ours_to_published(state).items()}


def _constant_operator(model: PldrForCausalLM) -> torch.Tensor:
    """[L, H, D, D], on the CPU."""
    operators = (module for module in model.modules() if isinstance(module, ConstantOperator))
    return torch.stack([operator.G_LM.detach().cpu() for operator in operators])


# --- the reference layout -------------------------------------------------------------------------------------------


def _write_reference(model: PldrForCausalLM, folder: Path) -> None:
    """The reference layout: a .pth, its hyperparameters as a Python file, and a predefined operator as a pickle."""
    # The published loader looks these two up; what they were at the end of training is not known here.
    unknown = {"loss": float("nan"), "accuracy": float("nan")}
    try:
        torch.save({"model_state_dict": _published_state(model), **unknown}, folder / _REFERENCE_WEIGHTS)
    except RuntimeError as error:  # torch's writer wraps the system's error
        raise OSError(f"{folder / _REFERENCE_WEIGHTS}: could not be written ({_one_line(error)})") from None
    fields = layouts.ours_to_hyperparameters(model.config)
    literals = "".join(f"{name!r}: {value!r}, " for name, value in fields.items())
    text = f"import torch.nn.functional as F\n\nhpdict={{{literals}'activation': F.silu}}\n"
    (folder / "hyperparameters.py").write_text(text, encoding="utf-8")
    if model.config.operator == "constant":
        with (folder / _REFERENCE_G).open("wb") as stream:
            pickle.dump([layer[None].clone() for layer in _constant_operator(model)], stream)


def _load_reference(
    path: Path, dtype: str | torch.dtype, rope_pairing: str | None, G_LM: str | os.PathLike[str] | None
) -> PldrForCausalLM:
    weights, hyperparameters = _find_reference_files(path)
    fields = layouts.hyperparameters_to_ours(_read_hyperparameters(hyperparameters))
    if rope_pairing is not None:
        fields["rope_pairing"] = rope_pairing
    try:
        config = PldrConfig(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{hyperparameters}: {_one_line(error)}") from None
    published = _read_pth(weights)
    renamed = layouts.published_to_ours(published)
    state = {renamed.get(name, name): tensor for name, tensor in published.items()}
    if config.operator == "constant":
        file = Path(G_LM) if G_LM is not None else weights.with_name(_REFERENCE_G)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: a v51G checkpoint needs its predefined operator; name its file with --g-lm"
            )
        stored = next(iter(state.values())).dtype
        for index, layer in enumerate(check_operator_tensor(load_predefined_G(file), config)):
            state[layouts.OUR_G.format(index)] = layer.to(stored)
    elif G_LM is not None:
        raise ValueError("G_LM: this checkpoint has a learned operator; convert it first, then use pldr freeze --g-lm")
    _check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, config, str(weights))
    if dtype == "auto":
        dtype = next(iter(state.values())).dtype
    return PldrForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _find_reference_files(path: Path) -> tuple[Path, Path]:
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


def _read_hyperparameters(path: Path) -> dict[str, Any]:
    """The ``hpdict`` of a published hyperparameter file, parsed as literals; the file is never run.

    Raises:
        ValueError: no such dictionary, or anything in it but numbers, strings, lists and the activation's name.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a Python file ({_one_line(error)})") from None
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


def _read_pth(path: Path) -> dict[str, torch.Tensor]:
    """
    Raises:
        ValueError: damaged, or holding anything but tensors and plain values. Nothing in it is ever executed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint of tensors alone ({_one_line(error)})") from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        and tensor.device.type == "cpu" for name, tensor in state.items()
    ):  # fmt: skip
        raise ValueError(f"{path}: no model_state_dict of named, dense tensors in it")
    _check_one_dtype((tensor.dtype for tensor in state.values()), str(path))
    return state


class _TensorUnpickler(pickle.Unpickler):
    """Reads pickled tensors and lists of them; any other class or function is refused before it is looked up."""

    # Methods, so that a pickle gets no hold of a function that lives on after it was read.

    def _storage_from_bytes(self, data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def _tensor_from_storage(self, *arguments: Any) -> torch.Tensor:
        return torch._utils._rebuild_tensor_v2(*arguments)

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_from_storage,
            # The original unpickles without restriction.
            ("torch.storage", "_load_from_bytes"): self._storage_from_bytes,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused a persistent id")


# --- helpers --------------------------------------------------------------------------------------------------------


def _find_tokenizer(source: Path, tokenizer: str | os.PathLike[str] | None) -> tuple[Any, Path | None] | None:
    """The tokenizer to put beside the weights and its SentencePiece file, where there is one."""
    place = Path(tokenizer) if tokenizer is not None else source if source.is_dir() else source.parent
    models = [place] if place.is_file() else sorted(place.glob("*.model"))
    if tokenizer is None and not models and not (place / "tokenizer.json").is_file():
        return None
    return load_tokenizer(place), models[0] if len(models) == 1 else None


def _common_start(one: str, other: str) -> int:
    """How many characters two names share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
