"""Models for other runtimes: a graph that takes tokens and what is cached, and returns logits and what to cache next.

Shapes: B sequences, T new tokens, P cached ones, S tokens that the mask covers (at least P + T), V vocabulary; H heads, D their
dimensions, r those of keys with a factored operator (else D).
"""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedTokenizerFast

from pldr.checkpoints.certificate import is_about, read_certificate, write_certificate
from pldr.checkpoints.load import load_with_tokenizer
from pldr.configuration_pldr import PldrConfig
from pldr.files import check_output, require, whole_folder
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tables import Printable, Text

# The file that each format is written to.
FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
# By how much of the largest logit a written graph may differ from the model.
TOLERANCE = 1e-4

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


class CachedDecoder(nn.Module):
    """A model with its cache as plain tensors: what is exported."""

    def __init__(self, model: PldrForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: [B, T].
            attention_mask: [B, S], zero at padding.
            position_ids: [B, T], counted over the tokens that are not padding.
            past_key_values: key [B, H, P, r] and value [B, H, P, D] of each layer in turn; P may be 0.

        Returns:
            Logits [B, T, V]; and the keys and values of P + T tokens, in the same order.
        """
        tokens, past = input_ids.shape[1], past_key_values[0].shape[2]
        new, seen = torch.arange(tokens) + past, torch.arange(tokens + past)
        # A token of the padding sees itself, since attention to nothing at all would be 0/0.
        may_see = (seen < new[:, None]) & attention_mask.index_select(1, seen).bool()[:, None]  # [B, T, P + T]
        mask = torch.where(may_see | (seen == new[:, None]), 0.0, torch.finfo(torch.float32).min)[:, None]
        cache = DynamicCache(list(zip(past_key_values[::2], past_key_values[1::2], strict=True)))
        logits = self.model(
            input_ids,
            attention_mask={"attention": mask, "padding": None},
            position_ids=position_ids,
            past_key_values=cache,
        ).logits
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


@dataclass(frozen=True)
class Exported(Printable):
    """What `export` made.

    Attributes:
        file: the graph, with its weights; beside it are config.json, the tokenizer, and the certificate where there is one.
        operator: "constant" or "factored".
        difference: largest difference of a logit between the file, run, and the model.
        largest: of the model's logits there.
    """

    file: Path
    operator: str
    difference: float
    largest: float

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"file": str(self.file)}

    def __rich__(self) -> RenderableType:
        found = f"logits up to {self.largest:.1f} agree with the model's to {self.difference:.1e}"
        return Text(f"{self.file}: {self.operator} operator, {os.path.getsize(self.file) / 1e6:.1f} MB; {found}")


def export(
    model: str | os.PathLike[str] | PldrForCausalLM,
    destination: str | os.PathLike[str],
    *,
    to: str = "onnx",
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model with a constant or factored operator as a graph for other runtimes, in float32, and try it.

    Batch, number of tokens and number of cached tokens are free. The inputs and outputs of a graph in ONNX are called as
    runtimes of language models expect: `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key` and `.value`
    (see `CachedDecoder.forward`) make `logits` and `present.N.key` and `.value`.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model.
        destination: folder to write, with configuration, tokenizer and certificate; it appears only when whole.
        to: "onnx", for ONNX Runtime and others; or "torch", for `torch.export.load`.
        tokenizer, rope, g_lm: see `pldr.checkpoints.load.load_with_tokenizer`.
        overwrite: replace a destination that is not empty.

    Raises:
        ModuleNotFoundError: ONNX without the extra `export`.
        ValueError: a learned operator; another format; a model that can not be loaded.
        RuntimeError: the file that was written computes something else than the model; it is not kept.
    """
    if to not in FORMATS:
        raise ValueError(f"to: must be one of {', '.join(FORMATS)}, got {to!r}")
    if to == "onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")
    check_output(destination, overwrite=overwrite)
    stored, found = load_with_tokenizer(model, tokenizer, rope=rope, g_lm=g_lm)
    _refuse_learned(stored, model)
    exported = copy.deepcopy(stored).cpu().float().eval()
    # Attention as plain products, which every runtime knows.
    exported.set_attn_implementation("eager")
    decoder = CachedDecoder(exported)
    with whole_folder(destination, overwrite=overwrite) as folder, _without_notes():
        file = folder / FORMATS[to]
        program = export_program(decoder)
        if to == "onnx":
            _save_onnx(program, stored.config, file)
        else:
            torch.export.save(program, file)
        difference, largest = _compared(decoder, _onnx_runner(file) if to == "onnx" else _torch_runner(file))
        if not difference <= TOLERANCE * largest:
            raise RuntimeError(
                f"export: logits of the written file differ by {difference:.1e} from the model's, of {largest:.1f} at most; "
                "this version of the exporter or runtime computes something else, and nothing is kept"
            )
        exported.config.save_pretrained(folder)
        found.save_pretrained(folder)
        certificate = None if isinstance(model, PldrForCausalLM) else read_certificate(model)
        if certificate is not None and is_about(certificate, stored.state_dict()):
            write_certificate(folder, certificate)
    return Exported(Path(destination) / FORMATS[to], stored.config.operator, difference, largest)


def _refuse_learned(model: PldrForCausalLM, given: Any) -> None:
    """Raises ValueError: the operator is learned."""
    if model.config.operator == "learned":
        name = model.name_or_path if isinstance(given, PldrForCausalLM) else given
        raise ValueError(
            "export: a learned G_LM is computed from the whole prompt, which a graph of single steps does not see; freeze "
            f'it first: pldr freeze {name or "MODEL"} FROZEN --prompt "Any text will do.", or certify it (pldr certify)'
        )


@torch.no_grad()
def export_program(decoder: CachedDecoder) -> ExportedProgram:
    """The decoder as a graph whose batch, new and cached tokens are free, up to the context."""
    config = decoder.model.config
    context = config.max_position_embeddings
    batch, tokens = Dim("batch", min=1), Dim("tokens", min=1, max=context)
    past, covered = Dim("past", min=0, max=context - 1), Dim("covered", min=1, max=context)
    dimensions = {
        "input_ids": {0: batch, 1: tokens},
        "attention_mask": {0: batch, 1: covered},
        "position_ids": {0: batch, 1: tokens},
        "past_key_values": [{0: batch, 2: past}] * (2 * config.num_hidden_layers),
    }
    # Sizes of an example that are 0 or 1 would be taken as fixed.
    return torch.export.export(decoder, _example(config, batch=2, tokens=3, past=5), dynamic_shapes=dimensions)


def _example(config: PldrConfig, *, batch: int, tokens: int, past: int) -> Inputs:
    """Inputs with random numbers in the cache; the last sequence begins with padding, where there are several tokens."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=random)
    mask = torch.ones(batch, past + tokens, dtype=torch.long)
    if batch > 1 < past + tokens:
        mask[-1, 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:].contiguous()
    widths = [
        config.operator_ranks or [config.head_dim] * config.num_hidden_layers,
        [config.head_dim] * config.num_hidden_layers,
    ]
    shapes = [(batch, config.num_attention_heads, past, width) for pair in zip(*widths, strict=True) for width in pair]
    return ids, mask, positions, [torch.randn(shape, generator=random) for shape in shapes]


def cache_names(config: PldrConfig, prefix: str) -> list[str]:
    """Of the cache's tensors: `prefix`.0.key, `prefix`.0.value, `prefix`.1.key, …"""
    return [f"{prefix}.{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]


def _save_onnx(program: ExportedProgram, config: PldrConfig, file: Path) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *cache_names(config, "past_key_values")],
        output_names=["logits", *cache_names(config, "present")],
    )
    assert written is not None
    written.save(file)


def _onnx_runner(file: Path) -> Callable[..., list[torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(
        ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        feed = zip(names, (ids, mask, positions, *past), strict=True)
        return [torch.from_numpy(output) for output in session.run(None, {name: x.numpy() for name, x in feed})]

    return run


def _torch_runner(file: Path) -> Callable[..., Any]:
    return torch.export.load(file).module()


@torch.no_grad()
def _compared(decoder: CachedDecoder, run: Callable[..., Any]) -> tuple[float, float]:
    """Largest difference of a logit, and largest logit: of two prompts, one of them padded, and of a step after a cache."""
    difference = largest = 0.0
    for batch, tokens, past in ((2, 7, 0), (1, 1, 6)):
        inputs = _example(decoder.model.config, batch=batch, tokens=tokens, past=past)
        ours, theirs = decoder(*inputs)[0], run(*inputs)[0]
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(ours.abs().max()))
    return difference, largest


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Without what the exporters say of themselves; what they wrote is compared."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
