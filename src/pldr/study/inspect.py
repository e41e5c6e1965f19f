"""Look at the deductive outputs of a model, or at a G_LM by itself."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.load import load_predefined_G, load_with_tokenizer
from pldr.data.rows import choose_passages
from pldr.data.sources import Source, names_of
from pldr.evaluation.modes import name_of
from pldr.files import write_text
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT
from pldr.study.order import order_parameter as measure_order
from pldr.study.page import report
from pldr.study.statistics import Analysis, analyse_model, analyse_operator

_PASSAGES = 32


def inspect(
    model: str | os.PathLike[str] | PldrForCausalLM,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    passages: int | None = None,
    length: int | None = None,
    text_column: str = "text",
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
    order_parameter: bool = False,
    device: str | None = None,
    dtype: str = "auto",
) -> Analysis:
    """Statistics of A, A_LM, A_P and G_LM, as `pldr inspect` shows them.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model; or a file with a G_LM (.safetensors, .pkl), with
            which only `html` goes.
        data: text: .txt, .jsonl, .parquet files or patterns, hub:NAME; by default held-out excerpts that ship with pldr.
        passages: to look at; 32, or as many as there are.
        length: tokens of a passage; 512, or the context if that is less.
        text_column: of JSON lines, Parquet files and hub data sets.
        tokenizer, rope, g_lm, device, dtype: see `pldr.checkpoints.load.load_with_tokenizer`.
        html: also write a report with pictures, one HTML file.
        order_parameter: also continue the first half of each passage twice, at random, and compare the outputs of the two.

    Raises:
        ValueError, OSError: an option outside its range, too little text, a model, tokenizer or file that can not be
            used, or a deductive output that is not finite.
    """
    if passages is not None and passages < 1:
        raise ValueError(f"passages: must be at least 1, got {passages}")
    if html is not None and Path(html).is_dir():
        raise ValueError(f"html: {html} is a folder; name a file")
    if _is_tensor_file(model):
        assert not isinstance(model, PldrForCausalLM)
        others = (data, passages, length, text_column != "text", tokenizer, rope, g_lm, device not in (None, "cpu"))
        if any(others) or order_parameter or dtype != "auto":
            raise ValueError(f"inspect: {model} holds a tensor alone: no data and no options but html go with it")
        analysis = replace(analyse_operator(load_predefined_G(model)), model=str(model))
    else:
        loaded, text_tokenizer = load_with_tokenizer(model, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
        context = loaded.config.max_position_embeddings
        # The excerpts that ship with pldr have one form; text_column is about the user's own data.
        names = names_of(data)
        source = Source(names, text_column) if names else Source([str(HELD_OUT)])
        ids = choose_passages(
            source, text_tokenizer, context, length=length, count=passages or _PASSAGES, needed=passages or 1
        )
        about = ", ".join(names) if names else "held-out excerpts that ship with pldr"
        analysis = replace(analyse_model(loaded, ids), model=name_of(model), source=about)
        if order_parameter:
            prompts, rest = ids.to(loaded.device).tensor_split([(ids.shape[1] + 1) // 2], 1)
            analysis = replace(analysis, order_parameter=measure_order(loaded, prompts, max(1, rest.shape[1])))
    if html is not None:
        write_text(html, report(analysis, title=Path(analysis.model).resolve().name, source=analysis.source))
    return analysis


def _is_tensor_file(model: str | os.PathLike[str] | PldrForCausalLM) -> bool:
    if isinstance(model, PldrForCausalLM) or Path(model).is_dir():
        return False
    return Path(model).suffix in (".safetensors", ".pkl")
