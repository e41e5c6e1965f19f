"""Reading and writing checkpoints: this library's layout and the two published ones.

Files from elsewhere are data. Weights are read from safetensors, or from a ``.pth`` through torch's weights-only loader;
hyperparameter files are parsed, never run; predefined operators are unpickled by a reader that knows tensors alone.
"""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pldr import layouts
from pldr.checkpoints.load import _WEIGHTS, load_model
from pldr.checkpoints.reference import _REFERENCE_G, REFERENCE_WEIGHTS
from pldr.files import check_output, one_line, whole_folder
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import stored_operator
from pldr.tokenizer import check_vocabulary, load_tokenizer

LAYOUTS = ("pldr", "hub", "reference")


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


# --- this library's and the hub's layout ----------------------------------------------------------------------------


def _write_hub(model: PldrForCausalLM, folder: Path) -> None:
    """The hub layout: published tensor names, config.json in the remote code's terms."""
    state = {name: tensor.contiguous() for name, tensor in _published_state(model).items()}
    if model.config.operator == "constant":
        G_LM = stored_operator(model)
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


# --- the reference layout -------------------------------------------------------------------------------------------


def _write_reference(model: PldrForCausalLM, folder: Path) -> None:
    """The reference layout: a .pth, its hyperparameters as a Python file, and a predefined operator as a pickle."""
    # The published loader looks these two up; what they were at the end of training is not known here.
    unknown = {"loss": float("nan"), "accuracy": float("nan")}
    try:
        torch.save({"model_state_dict": _published_state(model), **unknown}, folder / REFERENCE_WEIGHTS)
    except RuntimeError as error:  # torch's writer wraps the system's error
        raise OSError(f"{folder / REFERENCE_WEIGHTS}: could not be written ({one_line(error)})") from None
    fields = layouts.ours_to_hyperparameters(model.config)
    literals = "".join(f"{name!r}: {value!r}, " for name, value in fields.items())
    text = f"import torch.nn.functional as F\n\nhpdict={{{literals}'activation': F.silu}}\n"
    (folder / "hyperparameters.py").write_text(text, encoding="utf-8")
    if model.config.operator == "constant":
        with (folder / _REFERENCE_G).open("wb") as stream:
            pickle.dump([layer[None].clone() for layer in stored_operator(model)], stream)


# --- helpers --------------------------------------------------------------------------------------------------------


def _find_tokenizer(source: Path, tokenizer: str | os.PathLike[str] | None) -> tuple[Any, Path | None] | None:
    """The tokenizer to put beside the weights and its SentencePiece file, where there is one."""
    place = Path(tokenizer) if tokenizer is not None else source if source.is_dir() else source.parent
    models = [place] if place.is_file() else sorted(place.glob("*.model"))
    if tokenizer is None and not models and not (place / "tokenizer.json").is_file():
        return None
    return load_tokenizer(place), models[0] if len(models) == 1 else None
