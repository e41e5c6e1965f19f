"""Writing checkpoints: one layout into another, bit for bit; and a model with its operator frozen."""

import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from pldr import layouts
from pldr.checkpoints.code import auto_map, write_code
from pldr.checkpoints.hub import local_path
from pldr.checkpoints.load import load_model, load_predefined_G, load_with_head, load_with_tokenizer
from pldr.files import check_output, one_line, read_text, whole_folder, write_json
from pldr.modeling_pldr import PldrForCausalLM, PldrPreTrainedModel
from pldr.operator import freeze, stored_operator
from pldr.tables import Printable, Text
from pldr.tokenizer import check_vocabulary, encode_prompt, load_tokenizer

CHECKPOINT_LAYOUTS = ("pldr", "hub", "reference")


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "pldr",
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    with_code: bool = False,
    overwrite: bool = False,
) -> PldrPreTrainedModel:
    """Rewrite a checkpoint of any layout in another one. Tensors are copied bit for bit.

    The published layouts know no factored operator: what is written there is its product, a predefined G_LM.

    Args:
        source, rope, g_lm: see `load_model`.
        destination: folder to write; it appears only when whole.
        to: "pldr" (this library), "hub" (the published Hugging Face layout) or "reference" (the published framework's).
        tokenizer: tokenizer to put beside the weights; by default the source folder's, where it has one.
        with_code: of the hub layout, write the code of the model classes as well, for people without this library; see
            `pldr.checkpoints.code`.
        overwrite: replace a destination that is not empty.

    Returns:
        The model that was written.

    Raises:
        ValueError, OSError: see `load_model`; then nothing is written.
    """
    if to not in CHECKPOINT_LAYOUTS:
        raise ValueError(f"to: must be one of {', '.join(CHECKPOINT_LAYOUTS)}, got {to!r}")
    if with_code and to != "hub":
        raise ValueError("with_code: goes with to='hub' only")
    check_output(destination, overwrite=overwrite)
    source = local_path(source)
    model = load_with_head(source, rope=rope, g_lm=g_lm)
    found = _find_tokenizer(source, tokenizer)
    if found is not None:
        check_vocabulary(found[0], model.config.vocab_size)
        found[0].model_max_length = model.config.max_position_embeddings
    if to != "pldr":  # refuses what that layout can not say, before anything is written
        (layouts.ours_to_hyperparameters if to == "reference" else layouts.ours_to_hub_fields)(model.config)
    with whole_folder(destination, overwrite=overwrite) as folder:
        if to == "pldr":
            model.save_pretrained(folder)
        elif to == "hub":
            _write_hub(model, folder, with_code)
        else:
            _write_reference(model, folder)
        if found is not None:
            loaded, sentencepiece_file = found
            loaded.save_pretrained(folder)
            if sentencepiece_file is not None:
                shutil.copyfile(sentencepiece_file, folder / "tokenizer.model")
    return model


def _find_tokenizer(
    source: Path, tokenizer: str | os.PathLike[str] | None
) -> tuple[PreTrainedTokenizerFast, Path | None] | None:
    """The tokenizer to put beside the weights and its SentencePiece file, where there is one."""
    place = Path(tokenizer) if tokenizer is not None else source if source.is_dir() else source.parent
    models = [place] if place.is_file() else sorted(place.glob("*.model"))
    if tokenizer is None and not models and not (place / "tokenizer.json").is_file():
        return None
    return load_tokenizer(place), models[0] if len(models) == 1 else None


def _write_hub(model: PldrPreTrainedModel, folder: Path, with_code: bool) -> None:
    """The hub layout: published tensor names, config.json in the remote code's terms; and that code, if it is asked for."""
    state = {name: tensor.contiguous() for name, tensor in _published_state(model).items()}
    if model.config.operator != "learned":
        G_LM = stored_operator(model)
        packed = G_LM.new_zeros(len(G_LM), 3, 1, *G_LM.shape[1:])
        packed[:, layouts.HUB_G_SLOT, 0] = G_LM
        state |= {layouts.HUB_G: packed, layouts.HUB_G_STATUS: torch.ones(len(G_LM), dtype=torch.bool)}
    try:
        save_file(state, folder / layouts.WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / layouts.WEIGHTS}: could not be written ({error})") from None
    fields = layouts.ours_to_hub_fields(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    if with_code:
        fields["auto_map"] = auto_map(model.config)
        write_code(folder)
    write_json(folder / "config.json", dict(sorted(fields.items())), indent=1)


def _write_reference(model: PldrPreTrainedModel, folder: Path) -> None:
    """The reference layout: a .pth, its hyperparameters as a Python file, and a predefined operator as a pickle."""
    # The published loader looks these two up; what they were at the end of training is not known here.
    unknown = {"loss": float("nan"), "accuracy": float("nan")}
    try:
        torch.save({"model_state_dict": _published_state(model), **unknown}, folder / layouts.REFERENCE_WEIGHTS)
    except RuntimeError as error:  # torch's writer wraps the system's error
        raise OSError(f"{folder / layouts.REFERENCE_WEIGHTS}: could not be written ({one_line(error)})") from None
    fields = layouts.ours_to_hyperparameters(model.config)
    literals = "".join(f"{name!r}: {value!r}, " for name, value in fields.items())
    text = f"import torch.nn.functional as F\n\nhpdict={{{literals}'activation': F.silu}}\n"
    (folder / "hyperparameters.py").write_text(text, encoding="utf-8")
    if model.config.operator != "learned":
        with (folder / layouts.REFERENCE_G).open("wb") as stream:
            pickle.dump([layer[None].clone() for layer in stored_operator(model)], stream)


def _published_state(model: PldrPreTrainedModel) -> dict[str, torch.Tensor]:
    """Under published names, on the CPU; all but an operator that is not learned, which the published layouts keep elsewhere."""
    state = model.state_dict()
    return {theirs: state[ours].detach().cpu() for ours, theirs in layouts.ours_to_published(state).items()}


# --- freezing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenCheckpoint(Printable):
    """What `freeze_checkpoint` made.

    Attributes:
        folder: where it is.
        model: as it was written.
        parameters_before: of the model that it was made from.
    """

    folder: Path
    model: PldrForCausalLM = field(repr=False)
    parameters_before: int

    def to_json(self) -> dict[str, Any]:
        parameters = self.model.num_parameters()
        return {"folder": str(self.folder), "parameters": parameters, "parameters_before": self.parameters_before}

    def __rich__(self) -> RenderableType:
        parameters = f"{self.model.num_parameters():,} parameters (before: {self.parameters_before:,})"
        return Text(f"{self.folder}: {self.model.config.operator} operator, {parameters}")


def freeze_checkpoint(
    model: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    prompts: str | Sequence[str] = (),
    prompts_file: str | os.PathLike[str] | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    overwrite: bool = False,
) -> FrozenCheckpoint:
    """Write a checkpoint whose operator is a constant, without the network that computed it; see `pldr.freeze`.

    Args:
        model: what to freeze; see `load_model`.
        destination: folder to write, with the tokenizer where there is one; it appears only when whole.
        prompts: text to compute G_LM from, or several, whose mean is kept.
        prompts_file: file of such texts, one per line.
        g_lm: in place of prompts, where to read G_LM; see `load_predefined_G`.
        trainable: make G_LM a parameter, to train on with.
        tokenizer: see `load_with_tokenizer`; needed with prompts alone.
        rope: RoPE of a checkpoint in the reference layout; see `load_model`.
        overwrite: replace a destination that is not empty.

    Raises:
        ValueError: neither prompts nor `g_lm`, or both; see `load_with_tokenizer`, `load_predefined_G`, `freeze`.
        OSError: a file can not be read, or the folder not be written. Nothing is written where something is wrong.
    """
    check_output(destination, overwrite=overwrite)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts_file is not None:
        texts += [line for line in read_text(prompts_file).splitlines() if line.strip()]
    if bool(texts) == (g_lm is not None):
        raise ValueError("freeze: pass either prompts or a prompts_file (with some text), or else g_lm")
    found: PreTrainedTokenizerFast | None = None
    model = local_path(model)
    if texts or tokenizer is not None or _find_tokenizer(model, None) is not None:
        loaded, found = load_with_tokenizer(model, tokenizer, rope=rope)
    else:
        loaded = load_model(model, rope=rope)
    before = loaded.num_parameters()
    if g_lm is not None:
        freeze(loaded, G_LM=load_predefined_G(g_lm), trainable=trainable)
    else:
        ids = [torch.tensor(encode_prompt(found, text, may_be_empty=False)) for text in texts]
        freeze(loaded, ids, trainable=trainable)
    with whole_folder(destination, overwrite=overwrite) as folder:
        loaded.save_pretrained(folder)
        if found is not None:
            found.save_pretrained(folder)
    return FrozenCheckpoint(Path(destination), loaded, before)
