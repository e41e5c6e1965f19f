"""Text in, text out: one function for the command line and for scripts, with the input checked before any work."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from pldr.modeling_pldr import PldrForCausalLM
from pldr.tokenizer import check_text, check_vocabulary, encode

# The published implementation's cache modes as (keys and values, G_LM).
CACHE_MODES = {"kv+g": (True, True), "kv": (True, False), "g": (False, True), "none": (False, False)}
# Weights can be finite and still be too large for the numbers that a forward works with.
NOT_FINITE = "the model's logits are NaN or infinite; its weights are damaged, or too large for this dtype"

# Logits are divided by the temperature, and must stay finite.
_LEAST_TEMPERATURE = 1e-6


@dataclass
class Generation:
    """Result of `generate_text`.

    Attributes:
        text: the continuation, to be put right behind the prompt: with its leading space, where it begins a word, and
            without special tokens.
        token_ids: ids of the continuation, with [END] where it was reached.
        prompt_tokens: length of the prompt in tokens.
        seconds: wall-clock time of the call to `generate`, prompt included.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def generate_text(
    model: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    cache: str = "kv+g",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    seed: int | None = None,
    ignore_end: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt. Greedy unless one of `temperature`, `top_k` and `top_p` is given.

    Args:
        model, tokenizer: of one checkpoint.
        prompt: the text to continue; no special token is put before it, as in training.
        max_new_tokens: most tokens to add; 64, or as many as the context holds, by default.
        cache: "kv+g", "kv", "g" or "none".
        temperature: softmax temperature, at least 1e-6 and finite.
        top_k: sample among the k most probable tokens; 0 means all.
        top_p: sample among the most probable tokens whose mass reaches this, in (0, 1].
        beams: beam-search width; 1 means no beam search.
        seed: of the sampling.
        ignore_end: go on past [END], for measurements of equal length.
        on_text: called with each new piece of text as it is generated.

    Raises:
        ValueError: an empty prompt, one longer than the context, or a setting outside its range.
        FloatingPointError: the model's logits are not finite.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    ids = encode_prompt(tokenizer, prompt)
    max_new_tokens = _checked_length(len(ids), model.config.max_position_embeddings, max_new_tokens)
    if cache not in CACHE_MODES:
        raise ValueError(f"cache: must be one of {', '.join(CACHE_MODES)}, got {cache!r}")
    sampling = _sampling(temperature, top_k, top_p, beams)
    if on_text is not None and beams > 1:
        raise ValueError("stream: beam search knows its text only at the end; use beams=1")
    streamer = TextStreamer(tokenizer, on_text, ids) if on_text is not None else None
    if seed is not None:
        torch.manual_seed(seed)
    kv, g = CACHE_MODES[cache]
    inputs = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, use_cache=kv, use_g_cache=g,
        eos_token_id=None if ignore_end else model.config.eos_token_id, pad_token_id=model.config.pad_token_id,
        streamer=streamer, logits_processor=LogitsProcessorList([_CheckFinite()]), **sampling,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    new = output[0, len(ids) :].tolist()
    return Generation(_continuation(tokenizer, ids, new), new, len(ids), seconds)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of a prompt, without special tokens.

    Raises:
        ValueError: the prompt is empty or not valid UTF-8.
    """
    ids = encode(tokenizer, check_text(prompt, "prompt"))
    if not ids:
        raise ValueError("prompt: is empty; G_LM needs at least one token")
    return ids


def _checked_length(prompt: int, context: int, new: int | None) -> int:
    """How many tokens to add to a prompt of so many tokens, by default 64 or what the context has room for.

    Raises:
        ValueError: the context has no room for them.
    """
    room = context - prompt
    if room < 1:
        raise ValueError(f"prompt: {prompt} tokens leave no room in the context of {context}")
    if new is None:
        return min(64, room)
    if not 1 <= new <= room:
        raise ValueError(f"max_new_tokens: must be between 1 and {room} after this prompt, got {new}")
    return new


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None, beams: int) -> dict[str, Any]:
    if temperature is not None and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature: must be positive, got {temperature}: at least {_LEAST_TEMPERATURE} and finite; leave it out for "
            "greedy decoding"
        )
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: must be 0 (all tokens) or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p}")
    if beams < 1:
        raise ValueError(f"beams: must be at least 1, got {beams}")
    if temperature is None and top_k is None and top_p is None:
        return {"do_sample": False, "num_beams": beams}
    return {
        "do_sample": True,
        "num_beams": beams,
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
    }


def _continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> str:
    """The text of `new` behind `prompt`: a decoder drops the space before a first word, which is none here."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *new], skip_special_tokens=True)[len(before) :]


class _CheckFinite(LogitsProcessor):
    """Stops where there is nothing to choose from: NaN would pass for token 0."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError(NOT_FINITE)
        return scores


class TextStreamer(BaseStreamer):
    """Hands out text as soon as later tokens can not change it: a run of byte tokens decodes only as a whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.prompt = prompt
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate puts the prompt first
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        # Special tokens are left out of the text, so that they do not end a run either.
        special = set(self.tokenizer.all_special_ids)
        tokens = self.tokenizer.convert_ids_to_tokens(self.ids)
        settled = len(tokens)
        while settled and (tokens[settled - 1].startswith("<0x") or self.ids[settled - 1] in special):
            settled -= 1
        # Other tokenizers cut characters inside ordinary tokens; what is cut decodes to the replacement character.
        self._show(_continuation(self.tokenizer, self.prompt, self.ids[:settled]).rstrip("\ufffd"))

    def end(self) -> None:
        self._show(_continuation(self.tokenizer, self.prompt, self.ids))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)
