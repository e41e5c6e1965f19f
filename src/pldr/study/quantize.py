"""A model's weights in 8 or 4 bits on disk, by torchao, and what that changes, on held-out text."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from pldr import layouts
from pldr.checkpoints.certificate import (
    QUANTIZED_KIND,
    is_about,
    read_certificate,
    write_certificate,
)
from pldr.checkpoints.load import load_model, load_with_tokenizer
from pldr.checkpoints.quantized import METHOD, packed_in_four_bits
from pldr.data.sources import Source, names_of
from pldr.evaluation.modes import keeps_training
from pldr.files import check_output, read_json, require, whole_folder, write_json, write_sums
from pldr.modeling_pldr import LanguageModelHead, PldrForCausalLM
from pldr.models.shipped import HELD_OUT
from pldr.study.certify import (
    BaseReport,
    Thresholds,
    against,
    certificate_of,
    compare_forms,
    in_float32,
    spread_passages,
)
from pldr.tables import Printable, quantization_view

KINDS = ("int8", "int4", "fp8")
# Inputs that share a scale, of weights of 4 bits: the first that divides a layer's inputs.
GROUPS = (64, 32)


@dataclass(frozen=True, kw_only=True)
class QuantizedReport(BaseReport):
    """What quantised weights change; modes: "quantized", all positions, with the same operator as before.

    Attributes:
        weights: their kind, one of `KINDS`.
    """

    kind = QUANTIZED_KIND
    weights: str


@dataclass(frozen=True)
class Quantization(Printable):
    """What `quantize` made.

    Attributes:
        folder: where it is.
        layers: how many have weights of each kind.
        bytes, bytes_before: of the weights' files, and of the weights before.
        report: what was measured.
        certificate: as it was written.
    """

    folder: Path
    layers: dict[str, int]
    bytes: int
    bytes_before: int
    report: QuantizedReport
    certificate: dict[str, Any] = dataclasses.field(repr=False)

    def to_json(self) -> dict[str, Any]:
        names = ("layers", "bytes", "bytes_before", "certificate")
        return {"folder": str(self.folder)} | {name: getattr(self, name) for name in names}

    def __rich__(self) -> RenderableType:
        return quantization_view(self.to_json())


@keeps_training
def quantize(
    model: str | os.PathLike[str] | PldrForCausalLM,
    destination: str | os.PathLike[str],
    *,
    to: str = "int8",
    operator: bool = False,
    loss: float = 0.01,
    agreement: float = 0.98,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    passages: int = 16,
    length: int | None = None,
    text_column: str = "text",
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    overwrite: bool = False,
) -> Quantization:
    """Write a model with weights of 8 or 4 bits, and a certificate with what that changes, as `pldr quantize` does.

    The linear layers of attention and feed-forward blocks are quantised; embedding, head, norms and operator stay as they are.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model, which stays as it is; with any operator.
        destination: folder to write, with tokenizer and certificate; it appears only when whole. `load_model` reads it, and
            `from_pretrained` where torchao is installed.
        to: "int8" or "fp8", one scale a row; or "int4", one scale and zero for 64 or 32 inputs. Layers whose inputs are no
            multiple of either have int8 then.
        operator: quantise the metric learner, too: it makes up much of the time to load, and G_LM is sensitive to it.
        loss, agreement: of the verdict, see `pldr.study.certify.Thresholds`.
        data: held-out text: .txt, .jsonl, .parquet files or patterns, hub:NAME; by default excerpts that ship with pldr.
        passages: to compare on, at least 2.
        length: tokens of a passage, at least 4; 512, or the context if that is less.
        text_column: of JSON lines, Parquet files and hub data sets.
        tokenizer, rope: see `pldr.checkpoints.load.load_with_tokenizer`.
        overwrite: replace a destination that is not empty.

    Raises:
        ModuleNotFoundError: without the extra `quantize`.
        ValueError, OSError: an option outside its range, too little text, or a model, tokenizer or destination that can not be
            used; nothing is written then.
    """
    _check_options(to, passages)
    thresholds = Thresholds(loss, agreement)
    require("quantize", "torchao")
    check_output(destination, overwrite=overwrite)
    stored, found = load_with_tokenizer(model, tokenizer, rope=rope)
    source = Source(names_of(data) or [str(HELD_OUT)], text_column if data else "text")
    sources = names_of(data) or [HELD_OUT.name]
    rows = spread_passages(source, found, stored, passages, length)
    with whole_folder(destination, overwrite=overwrite) as folder:
        layers = write_quantized(stored, folder, to, operator=operator)
        found.save_pretrained(folder)
        written = load_model(folder)
        report = _report(stored, written, rows, to, thresholds)
        made = certificate_of(model, stored, written, found, report, sources=sources, rows=rows, calibration=0)
        certificate = made.to_json() | {"source": _certificate_of_source(model, stored)}
        write_certificate(folder, certificate)
        size = (folder / layouts.WEIGHTS).stat().st_size
    whole = sum(tensor.numel() * tensor.element_size() for tensor in stored.state_dict().values())
    return Quantization(Path(destination), layers, size, whole, report, certificate)


def _check_options(to: str, passages: int) -> None:
    if to not in KINDS:
        raise ValueError(f"to: must be one of {', '.join(KINDS)}, got {to!r}")
    if passages < 2:
        raise ValueError(f"passages: must be at least 2, got {passages}")


def _report(
    stored: PldrForCausalLM, written: PldrForCausalLM, rows: torch.Tensor, to: str, thresholds: Thresholds
) -> QuantizedReport:
    comparison, before = compare_forms(in_float32(stored), in_float32(written), rows)
    reasons = against("quantized", comparison, thresholds)
    return QuantizedReport(
        weights=to, passages=len(rows), tokens=rows.numel(), loss=before, modes={"quantized": comparison},
        thresholds=thresholds, reasons=reasons, certified=not reasons,
    )  # fmt: skip


def _certificate_of_source(model: Any, stored: PldrForCausalLM) -> dict[str, Any]:
    """What certifies the operator of the model that was quantised; nothing where there is nothing about these weights."""
    certificate = None if isinstance(model, PldrForCausalLM) else read_certificate(model)
    return certificate if certificate is not None and is_about(certificate, stored.state_dict()) else {}


def write_quantized(model: PldrForCausalLM, folder: Path, to: str, *, operator: bool = False) -> dict[str, int]:
    """Write config.json and weights, as transformers does after `from_pretrained` with a `TorchAoConfig`.

    Returns:
        How many layers have weights of each kind.
    """
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    configs = _torchao_configs()
    kinds = {name: _kind_of(layer, to) for name, layer in _layers(model, operator).items()}
    tensors = {
        name: _quantized(tensor, configs, kinds[name.removesuffix(".weight")])
        if name.removesuffix(".weight") in kinds and name.endswith(".weight")
        else tensor
        for name, tensor in model.state_dict().items()
    }
    flat, metadata = flatten_tensor_state_dict({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    save_file(
        {name: tensor.contiguous() for name, tensor in flat.items()},
        folder / layouts.WEIGHTS,
        metadata | {"format": "pt"},
    )
    write_sums(folder, [folder / layouts.WEIGHTS])
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    config.save_pretrained(folder)
    left = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in kinds]
    fields = read_json(folder / "config.json") | {
        "quantization_config": {
            "quant_method": METHOD,
            "quant_type": {"default": config_to_dict(configs[to])},
            "modules_to_not_convert": left,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }
    }
    write_json(folder / "config.json", fields, indent=2)
    return {kind: sum(found == kind for found in kinds.values()) for kind in dict.fromkeys(kinds.values())}


def _layers(model: PldrForCausalLM, operator: bool) -> dict[str, nn.Linear]:
    """By name, those that are quantised."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, LanguageModelHead)
        and (operator or ".operator." not in name)
    }


def _kind_of(layer: nn.Linear, to: str) -> str:
    return "int8" if to == "int4" and _group_of(layer.in_features) is None else to


def _group_of(inputs: int) -> int | None:
    return next((group for group in GROUPS if inputs % group == 0), None)


def _torchao_configs() -> dict[str, Any]:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return {
        "int8": Int8WeightOnlyConfig(),
        "int4": Int4WeightOnlyConfig(group_size=GROUPS[0]),
        "fp8": Float8WeightOnlyConfig(),
    }


def _quantized(weight: torch.Tensor, configs: dict[str, Any], kind: str) -> torch.Tensor:
    """A weight as a tensor of torchao's."""
    from torchao.quantization import Int4Tensor, quantize_

    if kind == "int4":  # which torchao makes on a GPU alone
        group = _group_of(weight.shape[1])
        assert group is not None
        return Int4Tensor(**packed_in_four_bits(weight, group), block_size=[1, group], shape=weight.shape)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(layer, configs[kind])
    return layer.weight.data
