"""Text in, text out: one function for the command line and for scripts, with the input checked before any work."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from pldr.engine import NOT_FINITE, Engine, Options
from pldr.engine.options import check_sampling, end_ids, new_tokens
from pldr.engine.text import GrowingText, continuation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tokenizer import check_vocabulary, encode_prompt

# The published implementation's cache modes as (keys and values, G_LM).
CACHE_MODES = {"kv+g": (True, True), "kv": (True, False), "g": (False, True), "none": (False, False)}
# Texts that are continued side by side.
_BATCH = 32


@dataclass
class Generation:
    """Result of `generate_text`.

    Attributes:
        text: the continuation, to be put right behind the prompt: with its leading space, where it begins a word, and
            without special tokens.
        token_ids: ids of the continuation, with [END] where it was reached.
        prompt_tokens: length of the prompt in tokens.
        seconds: wall-clock time of the generation, prompt included.
        finish_reason: why it ended; see `pldr.Completion`.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    seconds: float
    finish_reason: str

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def generate_text(
    model: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    cache: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    beams: int = 1,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    quantize: str | None = None,
    ignore_end: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt. Greedy unless one of `temperature`, `top_k` and `top_p` is given.

    Args:
        model, tokenizer: of one checkpoint.
        prompt: the text to continue; no special token is put before it, as in training.
        max_new_tokens, temperature, top_k, top_p, seed, ignore_end: see `pldr.Options`.
        repetition_penalty, stop: likewise; of the engine.
        cache: by default the engine, which keeps keys, values and G_LM; or one of the published implementation's four
            modes, "kv+g", "kv", "g" or "none", by the model's own `generate`, which beams take, too.
        beams: beam-search width; 1 means no beam search.
        quantize: "int8" for weights of 8 bits; of the engine, on a CPU.
        on_text: called with each new piece of text as it is generated.

    Raises:
        ValueError: a prompt longer than the context, or a setting outside its range or of the other way.
        FloatingPointError: the model's logits are not finite.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    ids = encode_prompt(tokenizer, prompt)
    new = new_tokens(len(ids), model.config.max_position_embeddings, max_new_tokens)
    if cache is not None and cache not in CACHE_MODES:
        raise ValueError(f"cache: must be one of {', '.join(CACHE_MODES)}, got {cache!r}")
    if cache is None and beams == 1:
        options = Options(
            max_new_tokens=new, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
            repetition_penalty=repetition_penalty, ignore_end=ignore_end,
        )  # fmt: skip
        engine = Engine(model, tokenizer, max_batch=1, max_length=len(ids) + new, quantize=quantize)
        return _by_engine(engine, ids, options, on_text)
    if repetition_penalty != 1 or stop or quantize is not None:
        raise ValueError("repetition_penalty, stop, quantize: are the engine's; leave cache and beams out")
    if on_text is not None and beams > 1:
        raise ValueError("stream: beam search knows its text only at the end; use beams=1")
    settings = _sampling(temperature, top_k, top_p, seed, beams) | {"max_new_tokens": new}
    settings["eos_token_id"] = None if ignore_end else model.config.eos_token_id
    settings["streamer"] = None if on_text is None else TextStreamer(tokenizer, on_text, ids)
    if seed is not None:
        torch.manual_seed(seed)
    return _by_model(model, tokenizer, ids, *CACHE_MODES[cache or "kv+g"], settings)


def generate_texts(
    model: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    quantize: str | None = None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Continue many texts at once, with the engine.

    Args:
        prompts: the texts; as many as you like.
        max_new_tokens, quantize: see `generate_text`.
        settings: of `pldr.Options`: temperature, top_k, top_p, seed, repetition_penalty, stop.

    Yields:
        Of each text in turn "prompt", "text", "token_ids", "prompt_tokens" and "finish_reason".

    Raises:
        ValueError: there is none; one is longer than the context (it is named); see `generate_text`.
    """
    if not prompts:
        raise ValueError("prompts: there are none; give at least one")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
            new_tokens(len(encoded[-1]), model.config.max_position_embeddings, max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    engine = Engine(model, tokenizer, max_batch=min(len(prompts), _BATCH), quantize=quantize)
    found = engine.generate(encoded, Options(max_new_tokens=max_new_tokens, **settings))
    for prompt, completion in zip(prompts, found, strict=True):
        yield {
            "prompt": prompt, "text": completion.text, "token_ids": completion.token_ids,
            "prompt_tokens": completion.prompt_tokens, "finish_reason": completion.finish_reason,
        }  # fmt: skip


def _by_model(
    model: PldrForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    kv: bool,
    g: bool,
    settings: dict[str, Any],
) -> Generation:
    start = time.perf_counter()
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), use_cache=kv, use_g_cache=g,
        pad_token_id=model.config.pad_token_id, logits_processor=LogitsProcessorList([_CheckFinite()]), **settings,
    )  # fmt: skip
    found = output[0, len(ids) :].tolist()
    seconds = time.perf_counter() - start
    reason = "end" if found[-1] in end_ids(settings["eos_token_id"]) else "length"
    return Generation(continuation(tokenizer, ids, found), found, len(ids), seconds, reason)


def _by_engine(engine: Engine, ids: list[int], options: Options, on_text: Callable[[str], None] | None) -> Generation:
    start = time.perf_counter()
    if on_text is None:
        completion = engine.generate(ids, options)[0]
    else:
        for piece in engine.stream(ids, options):
            if piece.text:
                on_text(piece.text)
        assert piece.completion is not None
        completion = piece.completion
    seconds = time.perf_counter() - start
    return Generation(completion.text, completion.token_ids, len(ids), seconds, completion.finish_reason)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None, beams: int
) -> dict[str, Any]:
    check_sampling(temperature, top_k, top_p, seed)
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


class _CheckFinite(LogitsProcessor):
    """Stops where there is nothing to choose from: NaN would pass for token 0."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError(NOT_FINITE)
        return scores


class TextStreamer(BaseStreamer):
    """For `model.generate`: hands out text as soon as later tokens can not change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], prompt: list[int]) -> None:
        self.on_text, self.growing = on_text, GrowingText(tokenizer, prompt)
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate puts the prompt first
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.growing.add(token)
        self._show(last=False)

    def end(self) -> None:
        self.growing.end()
        self._show(last=True)

    def _show(self, *, last: bool) -> None:
        if text := self.growing.piece(last=last):
            self.on_text(text)
