"""Reading checkpoints, strictly: a model is loaded whole and as it was written, or not at all.

Three layouts are read: this library's and the hub's, which are folders with a config.json and safetensors, and the
reference layout of the published training code. Files from elsewhere are data: nothing in them is ever run.
"""

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from pldr import heads, layouts
from pldr.checkpoints import quantized
from pldr.checkpoints.certificate import warn_unless_certified_weights
from pldr.checkpoints.hub import local_path
from pldr.checkpoints.reference import find_reference_files, read_hyperparameters, read_pickled_tensors, read_pth
from pldr.configuration_pldr import DTYPES, PldrConfig
from pldr.files import CHECKSUMS, check_regular, one_line, read_json, read_sums, sha256
from pldr.modeling_pldr import PldrForCausalLM, PldrPreTrainedModel
from pldr.operator import check_operator_tensor, stored_operator
from pldr.tokenizer import check_vocabulary, load_tokenizer

# What says that an adapter of the peft library lies beside the weights.
_ADAPTER = "adapter_config.json"


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
) -> PldrForCausalLM:
    """A model in evaluation mode from a folder in any of the three layouts, or not at all.

    Weights that are quantised in files (`pldr quantize`) are read as the numbers that they stand for, in floating point.

    Unlike `from_pretrained`, which warns and goes on with random weights, every problem is an error here. A frozen
    model whose weights are no longer those of its certificate is loaded with a warning.

    Args:
        path: a folder in this library's or the hub's layout, a folder in the reference layout, or a ``.pth`` file with
            its ``*hyperparameters.py`` beside it; or the name of a model on the hub, OWNER/NAME or OWNER/NAME@REVISION.
        dtype: of the weights; "auto": what config.json says, or as they are stored.
        device: where to put the model.
        rope: for a reference checkpoint of a v52 model, "halves"; that layout does not say. Others say so themselves.
        g_lm: for a reference v51G checkpoint, the file of its predefined operator, where it is not
            ``predefined_G_LM.pkl`` in the same folder.

    Raises:
        OSError: the folder or a file in it is missing, or is no file: see `pldr.files.check_regular`.
        ValueError: damaged files; unknown, missing or mis-shaped tensors, listed; values that are not finite, or no
            floating-point numbers; an adapter beside the weights; a model with a head of another kind.
    """
    model = load_with_head(path, dtype=dtype, device=device, rope=rope, g_lm=g_lm)
    if not isinstance(model, PldrForCausalLM):
        name = type(model).__name__
        raise ValueError(f"{path}: is a {name}, not a language model; load it with pldr.{name}.from_pretrained")
    return model


def load_with_head(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
) -> PldrPreTrainedModel:
    """As `load_model`, whatever head the model has: the class that its config.json names."""
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model folder")
    check_regular(path)
    if path.is_dir() and (path / "config.json").is_file():
        if rope is not None or g_lm is not None:
            raise ValueError("rope, g_lm: apply to the reference layout only; this folder's config.json decides")
        config, state = read_folder(path)
    elif path.suffix == ".pth" or (path.is_dir() and any(path.glob("*.pth"))):
        config, state = _read_reference(path, rope, g_lm)
    elif path.is_dir() and (path / _ADAPTER).is_file():
        base = read_json(path / _ADAPTER, {}).get("base_model_name_or_path")
        raise ValueError(
            f"{path}: is an adapter alone, of {base}; load that model, and the adapter with peft's PeftModel.from_pretrained; "
            "what its merge_and_unload gives can be saved and read here"
        )
    else:
        raise FileNotFoundError(f"{path}: neither config.json nor a .pth file; this is not a model folder")
    model = _model_of(config, state, dtype, path)
    if path.is_dir() and dtype == "auto":
        warn_unless_certified_weights(path, model.state_dict())
    return model.to(device).eval()


def _model_of(
    config: PldrConfig, state: dict[str, torch.Tensor], dtype: str | torch.dtype, path: Path
) -> PldrPreTrainedModel:
    """The model of tensors that `check_tensors` has found to be its own.

    Raises:
        ValueError: values that are not finite.
    """
    stored = _check_one_dtype(state.values(), str(path))
    wanted = (config.dtype or stored) if dtype == "auto" else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    with torch.device("meta"), no_init_weights():
        model = class_of(config)._from_config(config, dtype=wanted, attn_implementation="sdpa")
    # `from_pretrained` matches every name with every rule of conversion, a second for the thousand small tensors of a metric
    # learner; ours have their names already.
    absent, unknown = model.load_state_dict(
        {name: tensor.to(wanted) for name, tensor in state.items()}, strict=False, assign=True
    )
    assert _optional(config) >= set(absent), absent
    assert not unknown, unknown
    for module in model.modules():
        if any(tensor.is_meta for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values; the file is damaged")
    model.name_or_path = model.config.name_or_path = str(path)
    return model


def load_with_tokenizer(
    model: str | os.PathLike[str] | PldrForCausalLM,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
) -> tuple[PldrForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer, from files or as they are: what every function that takes both begins with.

    Args:
        model: see `load_model`; or a model, which is left as it is: where `device` or `dtype` differ, a copy is given.
        tokenizer: a tokenizer, or where one is; by default the one beside the model's files.
        device: where to put the model; by default the CPU, or where a loaded model is.
        dtype: "float32", "bfloat16", or "auto": as the model is stored or loaded.
        rope, g_lm: see `load_model`; not for a loaded model.

    Raises:
        FileNotFoundError: the model or a tokenizer is missing.
        ValueError: see `load_model` and `load_tokenizer`; a device that can not be used here; another `dtype`; a
            tokenizer of another vocabulary size than the model's.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype: must be auto, float32 or bfloat16, got {dtype!r}")
    usable = usable_device(device) if device is not None else None
    if isinstance(model, PldrForCausalLM):
        if rope is not None or g_lm is not None:
            raise ValueError(
                "rope, g_lm: apply to files in the reference layout, not to a model that is loaded already"
            )
        if tokenizer is None:
            raise ValueError("tokenizer: a model that is loaded already has none beside it; pass it, or its folder")
        loaded = _placed(model, usable or model.device, dtype)
    else:
        model = local_path(model)
        loaded = load_model(model, dtype=dtype, device=usable or "cpu", rope=rope, g_lm=g_lm)
        if tokenizer is None:
            tokenizer = model if model.is_dir() else model.parent
    if isinstance(tokenizer, (str, os.PathLike)):
        read = load_tokenizer(local_path(tokenizer))
        read.model_max_length = loaded.config.max_position_embeddings
        tokenizer = read
    check_vocabulary(tokenizer, loaded.config.vocab_size)
    return loaded, tokenizer


def usable_device(device: str | torch.device) -> torch.device:
    """The device, tried.

    Raises:
        ValueError: it is not here.
    """
    try:
        probe = torch.ones(1, device=device)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {device} can not be used here ({one_line(error, 120)})") from None
    return probe.device


def _placed(model: PldrForCausalLM, device: torch.device, dtype: str) -> PldrForCausalLM:
    """The model itself, or a copy where it is to be elsewhere or of another dtype."""
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if (model.device, model.dtype) == (device, wanted):
        return model
    return copy.deepcopy(model).to(device=device, dtype=wanted)


def load_predefined_G(path: str | os.PathLike[str]) -> torch.Tensor:
    """A predefined operator from a file or a model: safetensors, or the published pickle of tensors (of any device).

    Args:
        path: a model folder whose operator is not learned; ``.safetensors`` with one tensor or one called "G_LM"; else a
            pickle of what the published code keeps of a layer: G_LM, or [A_LM, G_LM], or a DAG model's [A_LM, G_LM, A_P].

    Returns:
        [L, H, D, D], on the CPU.

    Raises:
        OSError: see `pldr.files.check_regular`.
        ValueError: anything but tensors in the file, tensors of other dimensions, or attention weights.
    """
    path = Path(path)
    check_regular(path)
    if path.is_dir():
        model = load_model(path)
        if model.config.operator == "learned":
            raise ValueError(f"{path}: this model computes its G_LM; freeze it first (pldr freeze)")
        return stored_operator(model)
    layers = _operator_among(path) if path.suffix == ".safetensors" else read_pickled_tensors(path)
    rows = isinstance(layers, (list, tuple)) or (isinstance(layers, torch.Tensor) and layers.dim() > 0 < layers.numel())
    if not rows or not len(layers) or not all(isinstance(row, (torch.Tensor, list, tuple)) for row in layers):
        raise ValueError(f"{path}: not one tensor per layer")
    picked = [_operator_of(layer, path) for layer in layers]
    squeezed = [layer[0] if layer.dim() == 4 and layer.shape[0] == 1 else layer for layer in picked]
    for shape in (tuple(layer.shape) for layer in squeezed):
        if len(shape) != 3 or shape[1] != shape[2] or shape != tuple(squeezed[0].shape):
            raise ValueError(f"{path}: G_LM must be [layers, heads, head_dim, head_dim], a layer has {shape}")
    _check_one_dtype(squeezed, str(path))
    G_LM = torch.stack(squeezed)
    for layer, head in (~torch.isfinite(G_LM).flatten(2).all(2)).nonzero().tolist():
        raise ValueError(f"{path}: G_LM: layer {layer}, head {head} holds NaN or infinite values")
    if _are_attention_weights(G_LM):
        raise ValueError(
            f"{path}: these are attention weights (causal, rows that sum to 1), not G_LM; give what the model returns as its "
            "deductive outputs"
        )
    return G_LM


def _operator_of(layer: Any, path: Path) -> torch.Tensor:
    """G_LM in what a pickle holds of a layer, by the published structures.

    Raises:
        ValueError: another structure.
    """
    parts = layer if isinstance(layer, (tuple, list)) else [layer]
    if not all(isinstance(part, torch.Tensor) for part in parts) or not 1 <= len(parts) <= 3:
        held = ", ".join(type(part).__name__ for part in parts[:4]) or "nothing"
        raise ValueError(
            f"{path}: a layer holds {len(parts)} ({held}); known are G_LM, [A_LM, G_LM] and [A_LM, G_LM, A_P]"
        )
    G_LM = parts[min(1, len(parts) - 1)]
    other = next((tuple(part.shape) for part in parts if part.shape != G_LM.shape), None)
    if other is not None:
        raise ValueError(
            f"{path}: a layer holds tensors of shapes {tuple(G_LM.shape)} and {other}; A_LM, G_LM and A_P have one"
        )
    return G_LM


def _are_attention_weights(tensors: torch.Tensor) -> bool:
    """Whether [L, H, T, T] looks like what softmax leaves behind a causal mask; the identity does not."""
    sums = tensors.double().sum(-1)
    causal = bool((tensors >= 0).all()) and not bool(tensors.triu(1).any())
    return causal and torch.allclose(sums, torch.ones_like(sums), atol=1e-2) and bool(tensors.tril(-1).any())


def _operator_among(path: Path) -> torch.Tensor:
    tensors = _read_safetensors(path)
    if "G_LM" not in tensors and len(tensors) != 1:
        raise ValueError(f"{path}: holds no tensor G_LM, but {', '.join(tensors)}")
    return tensors.get("G_LM", next(iter(tensors.values())))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises ValueError: a damaged file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({one_line(error)})") from None


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Likewise, with quantised weights as plain ones."""
    tensors = _read_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return quantized.expanded(tensors, metadata, path) if quantized.NAMES in metadata else tensors


# --- folders with a config.json -------------------------------------------------------------------------------------


def read_config(folder: Path) -> PldrConfig:
    """The configuration in a model folder.

    Raises:
        FileNotFoundError: it has none.
        ValueError: damaged, of another kind of model, or with settings that are not read from files.
    """
    file = folder / "config.json"
    fields = read_json(file)
    if not isinstance(fields, dict) or fields.get("model_type") != "pldrllm":
        raise ValueError(f"{file}: model_type must be 'pldrllm'")
    # Settings that make transformers fetch and run more code (attention kernels, quantisation backends) are no part of
    # a PLDR-LLM; whoever wants them passes them to `from_pretrained` in person.
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    refused = sorted({"attn_implementation", "experts_implementation"} & fields.keys())
    if refused:
        raise ValueError(f"{file}: {refused[0]} is not read from a file; remove it")
    # Which weights are quantised, and how, stands with the weights; they are read as the numbers that they stand for.
    method = fields.pop("quantization_config", None)
    if method is not None and (not isinstance(method, dict) or method.get("quant_method") != quantized.METHOD):
        raise ValueError(
            f"{file}: quantization_config is read where its quant_method is {quantized.METHOD!r}; remove it"
        )
    try:
        return PldrConfig.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the weights, in a folder of one file or of shards with an index."""
    index = folder / layouts.WEIGHTS_INDEX
    if not os.path.lexists(index):
        if not (folder / layouts.WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder}: neither {layouts.WEIGHTS} nor {layouts.WEIGHTS_INDEX}")
        return [layouts.WEIGHTS]
    if (folder / layouts.WEIGHTS).is_file():
        raise ValueError(
            f"{folder}: holds both {layouts.WEIGHTS} and {index.name}; remove the one that does not belong"
        )
    content = read_json(index)
    try:
        files = sorted(set(content["weight_map"].values()))
        outside = [name for name in files if Path(name).name != name]
        missing = [name for name in files if not (folder / name).is_file()]
    except (KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{index}: damaged index ({one_line(error)})") from None
    if outside:
        raise ValueError(f"{index}: names a file outside the folder: {outside[0]}")
    if missing:
        raise FileNotFoundError(f"{index}: names {missing[0]}, which is missing")
    return files


def read_folder(folder: Path) -> tuple[PldrConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a folder in this library's or the hub's layout, under our names; see `load_model`."""
    if os.path.lexists(folder / _ADAPTER):
        raise ValueError(f"{folder / _ADAPTER}: adapters are not applied; merge it into the weights, or remove it")
    config = read_config(folder)
    stored: dict[str, torch.Tensor] = {}
    for name in _weight_files(folder):
        stored |= _read_weights(folder / name)
    state = under_our_names(stored, config, folder)
    check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, config, str(folder))
    _check_sums(folder)
    return config, state


def under_our_names(stored: dict[str, torch.Tensor], config: PldrConfig, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of any layout as this library calls them.

    Raises:
        ValueError: one comes twice, or a packed G_LM is not that of the configuration.
    """
    stored = {name: tensor for name, tensor in stored.items() if name != layouts.HUB_G_STATUS}
    packed = stored.pop(layouts.HUB_G, None)
    renamed = layouts.published_to_ours(stored)
    pairs = [(renamed.get(name, name), tensor) for name, tensor in stored.items()]
    if packed is not None:
        heads, head_dim = config.num_attention_heads, config.head_dim
        expected = (config.num_hidden_layers, 3, 1, heads, head_dim, head_dim)
        if packed.shape != expected:
            raise ValueError(f"{path}: {layouts.HUB_G} must be {expected}, got {tuple(packed.shape)}")
        pairs += [(layouts.OUR_G.format(i), layer[layouts.HUB_G_SLOT, 0].clone()) for i, layer in enumerate(packed)]
    state = dict(pairs)
    if len(state) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{path}: holds {twice} twice, under this name and a published one")
    return state


def _check_one_dtype(tensors: Iterable[torch.Tensor], where: str) -> torch.dtype:
    """The dtype of all tensors.

    Raises:
        ValueError: they have several, which one model can not hold without rounding some of them, or one that is no
            weight's.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"
    if len(dtypes) != 1:
        raise ValueError(f"{where}: the tensors must have one dtype, found {names}")
    if names not in DTYPES:
        raise ValueError(f"{where}: the tensors are {names}; weights are {', '.join(DTYPES)}")
    return dtypes.pop()


def check_tensors(stored: Mapping[str, tuple[int, ...]], config: PldrConfig, where: str) -> None:
    """Raises ValueError: the stored tensors are not exactly those of the model, by name and shape."""
    asked = layouts.tensor_count(config)
    if asked > 2 * len(stored):  # so many that making them, or listing what is missing, is no use
        raise ValueError(f"{where}: the configuration asks for {asked:,} tensors, and {len(stored):,} are stored")
    with torch.device("meta"), no_init_weights():
        expected = {name: tuple(tensor.shape) for name, tensor in class_of(config)(config).state_dict().items()}
    problems = [
        *_listed("missing", expected.keys() - stored.keys() - _optional(config)),
        *_listed("unknown", stored.keys() - expected.keys()),
        *_listed(
            "mis-shaped",
            (f"{name} {stored[name]} instead of {expected[name]}"
             for name in expected.keys() & stored.keys() if stored[name] != expected[name]),
        ),
    ]  # fmt: skip
    if problems:
        raise ValueError(f"{where}: weights do not fit the configuration: {'; '.join(problems)}")


def class_of(config: PldrConfig) -> type[PldrPreTrainedModel]:
    """The class of a model by the head that its configuration names."""
    head = layouts.head_of(config)
    return PldrForCausalLM if head == "ForCausalLM" else getattr(heads, f"Pldr{head}")


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
    if not os.path.lexists(folder / CHECKSUMS):
        return
    sums = read_sums(folder)
    unlisted = [name for name in _weight_files(folder) if name not in sums]
    if unlisted:
        raise ValueError(f"{folder / CHECKSUMS}: does not list {unlisted[0]}; the folder was changed")
    for name, digest in sums.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / CHECKSUMS}: names {name!r}, which is not in the folder")
        if sha256(folder / name) != digest:
            raise ValueError(
                f"{folder / name}: does not match {CHECKSUMS}: the file is damaged or was changed; fetch it again, or "
                f"delete {CHECKSUMS} if the change was meant"
            )


# --- the reference layout -------------------------------------------------------------------------------------------


def _read_reference(
    path: Path, rope: str | None, g_lm: str | os.PathLike[str] | None
) -> tuple[PldrConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a checkpoint in the reference layout, under our names."""
    weights, hyperparameters = find_reference_files(path)
    found = read_hyperparameters(hyperparameters)
    try:
        fields = layouts.hyperparameters_to_ours(found)
        if rope is not None:
            fields["rope_pairing"] = rope
        config = PldrConfig(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{hyperparameters}: {one_line(error)}") from None
    state = under_our_names(read_pth(weights), config, weights)
    stored = _check_one_dtype(state.values(), str(weights))
    if config.operator == "constant":
        file = Path(g_lm) if g_lm is not None else weights.with_name(layouts.REFERENCE_G)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: a v51G checkpoint needs its predefined operator; name its file by g_lm")
        operator = load_predefined_G(file)
        try:
            check_operator_tensor(operator, config)
        except ValueError as error:
            raise ValueError(f"{file}, with {hyperparameters.name}: {error}") from None
        state |= {layouts.OUR_G.format(index): layer.to(stored) for index, layer in enumerate(operator)}
    elif g_lm is not None:
        raise ValueError("g_lm: this checkpoint has a learned operator; convert it first, then freeze it")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_tensors(shapes, config, f"{weights}, with {hyperparameters.name}")
    return config, state
