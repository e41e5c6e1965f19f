"""Generation for many prompts at once: sequences join and leave a running batch, each with settings of its own.

`Engine.generate` and `Engine.stream` are for callers with a list of prompts. A server submits each request as it arrives and
calls `Engine.step` again and again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pldr.engine.decoder import STEPS, Decoder
from pldr.engine.options import Options, end_ids, new_tokens
from pldr.engine.text import GrowingText, continuation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tokenizer import check_vocabulary, encode_prompt

# Weights can be finite and still be too large for the numbers that a forward works with.
NOT_FINITE = "the model's logits are NaN or infinite; its weights are damaged, or too large for this dtype"

# Steps between two looks at what has come, where somebody waits for it.
_STREAMED_STEPS = 4
# Tokens of prompts that are read at once, at most, but for a prompt that is longer by itself.
_PROMPT_TOKENS = 32768
# Below it, a probability mass is none in float32.
_LEAST_TOP_P = 1e-30

Prompt = str | Sequence[int]
# Token ids and their log-probabilities, the most probable first.
Alternatives = list[tuple[int, float]]


@dataclass(frozen=True)
class Completion:
    """How a prompt was continued.

    Attributes:
        text: to be put right behind the prompt: with its leading space, where it begins a word; without special tokens
            and without the stop that ended it.
        token_ids: of the continuation, with the token that ended it.
        prompt_tokens: length of the prompt in tokens.
        finish_reason: why it ended: "end" (the model's own end token), "stop" (one of the stops), "length" or "cancelled".
        logprobs: log-probability of each token under the model's own distribution, where asked for.
        top_logprobs: the most probable tokens at each place and their log-probabilities, where asked for.
        prompt_logprobs, prompt_top_logprobs: the same of the prompt's tokens, from the second on.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[Alternatives] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[Alternatives] | None = None


@dataclass(frozen=True)
class Piece:
    """A bit of a continuation, as it comes.

    Attributes:
        index: of the prompt in the list.
        text: new text, behind what came before; may be empty in the last piece.
        completion: in the last piece, all of it; else None.
    """

    index: int
    text: str
    completion: Completion | None = None


class Request:
    """A prompt on its way.

    Attributes:
        prompt: its token ids.
        options: what was asked for.
        token_ids: of the continuation so far.
        logprobs, top_logprobs: of those tokens, where asked for; see `Completion`.
        prompt_logprobs, prompt_top_logprobs: likewise.
        growing: its text so far, where it is streamed or has stops.
        finish_reason: None until it ends; see `Completion`, or "error".
        error: what went wrong, where something did.
    """

    def __init__(self, prompt: list[int], options: Options, limit: int, ends: frozenset[int]) -> None:
        self.prompt, self.options, self.limit, self.ends = prompt, options, limit, ends
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[Alternatives] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_top_logprobs: list[Alternatives] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.growing: GrowingText | None = None
        self._uniform = torch.Generator()
        if options.samples:
            self._uniform.manual_seed(int(torch.randint(2**62, (1,))) if options.seed is None else options.seed)

    @property
    def remaining(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.token_ids)

    @property
    def draws(self) -> bool:
        """Whether it needs more than the most probable token."""
        return self.options.samples or self.options.logprobs or self.options.repetition_penalty != 1

    def uniforms(self, steps: int) -> torch.Tensor:
        """Places in the cumulated probabilities for the next tokens: [steps], in [0, 1)."""
        return torch.rand(steps, generator=self._uniform)

    def add(self, tokens: list[int], logprobs: list[float]) -> None:
        """Take the next tokens, up to the one that ends it, and their log-probabilities where asked for."""
        tokens = tokens[: self.remaining]
        logprobs = logprobs[: len(tokens)] if self.options.logprobs else []
        if self.growing is None and self.ends.isdisjoint(tokens):  # most of the time, and for all tokens at once
            self.token_ids += tokens
            self.logprobs += logprobs
            self.finish_reason = None if self.remaining else "length"
            return
        before = len(self.token_ids)
        for token in tokens:
            self._add(token)
            if self.finish_reason is not None:
                break
        self.logprobs += logprobs[: len(self.token_ids) - before]

    def _add(self, token: int) -> None:
        if token < 0:
            self.finish_reason, self.error = "error", FloatingPointError(NOT_FINITE)
            return
        self.token_ids.append(token)
        if token in self.ends:
            self.finish_reason = "stop" if token in self.options.stop_ids else "end"
        elif self.growing is not None and self.growing.add(token):
            self.finish_reason = "stop"
        elif not self.remaining:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.growing is not None and self.growing.end():
            self.finish_reason = "stop"


class _Flight:
    """Steps that the device was given, and the copy of what comes of them."""

    def __init__(self, requests: Sequence[Request], steps: int, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        self.requests, self.steps = list(requests), steps
        on_device = tokens.is_cuda
        self._tokens, self._logprobs = (
            torch.empty(part.shape, dtype=part.dtype, pin_memory=on_device).copy_(part, non_blocking=True)
            for part in (tokens, logprobs)
        )
        self._end = torch.cuda.current_stream(tokens.device).record_event() if on_device else None

    def arrived(self) -> tuple[list[Request], torch.Tensor, torch.Tensor]:
        """Wait for them: requests N, tokens and log-probabilities [N, steps] on the host."""
        if self._end is not None:
            self._end.synchronize()
        return self.requests, self._tokens, self._logprobs


class Engine:
    """A model that continues texts, many at once.

    On CUDA the steps are replayed graphs of fused kernels; on the CPU the same steps run as plain PyTorch. The weights are
    packed when the engine is made: later changes of the model are not seen. An engine serves one thread.

    Attributes:
        running, waiting: the requests that hold a row of the caches, and those that wait for one.
        overlaps: whether the device is given the next steps before the last ones are looked at.

    Args:
        model: with any operator. A learned operator's G_LM is computed from each prompt and kept (KV and G), as `generate`
            with a G-cache does.
        tokenizer: of the model; without one, prompts must be token ids, and there is no text.
        max_batch: most sequences at once; 128 on CUDA, 16 elsewhere, by default. Others wait.
        max_length: most tokens of a prompt with its continuation; the context by default.
        quantize: "int8" keeps the weights of the products in 8 bits (see `pldr.ops.quantized`); on the CPU alone.
        graphs: whether steps are recorded and replayed; by default on CUDA.

    Raises:
        ValueError: a setting outside its range; a tokenizer of another vocabulary.
    """

    def __init__(
        self,
        model: PldrForCausalLM,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        max_batch: int | None = None,
        max_length: int | None = None,
        quantize: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        if max_batch is None:
            max_batch = 128 if model.device.type == "cuda" else 16
        if max_batch < 1:
            raise ValueError(f"max_batch: must be at least 1, got {max_batch}")
        if max_length is not None and not 2 <= max_length <= context:
            raise ValueError(f"max_length: must be between 2 and the context length {context}, got {max_length}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize: must be int8, or left out, got {quantize!r}")
        if quantize is not None and model.device.type != "cpu":
            raise ValueError(f"quantize: int8 is for the CPU, the model is on {model.device}; use dtype bfloat16 there")
        if graphs and model.device.type != "cuda":
            raise ValueError(f"graphs: are of CUDA, the model is on {model.device}; leave it out")
        if tokenizer is not None:
            check_vocabulary(tokenizer, model.config.vocab_size)
        self.config, self.tokenizer = model.config, tokenizer
        self.decoder = Decoder(model, max_batch, max_length or context, quantize=quantize, graphs=graphs)
        self.overlaps = self.decoder.graphs
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._joining: list[Request] = []
        self._flight: _Flight | None = None

    # --- for a list of prompts ---------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: Options | None = None, **settings: Any
    ) -> list[Completion]:
        """Continue prompts.

        Args:
            prompts: a text or a list of token ids, or several of them; of any lengths, and as many as you like.
            options: how; or
            settings: its fields by name.

        Returns:
            One `Completion` a prompt, in their order. What a prompt is continued with does not depend on the others, up to
            the rounding of products over another number of rows.

        Raises:
            ValueError: an empty list of ids, a prompt longer than the context, an unknown token, or a setting outside its range;
                before anything is generated.
            FloatingPointError: the logits behind one of them are not finite; what the others came to is lost, which it is
                not with `submit`.
        """
        requests = self._requests(prompts, options, settings, streaming=False)
        self.waiting += requests
        try:
            while any(request.finish_reason is None for request in requests):
                self.step(STEPS)
        finally:
            self.cancel(*requests)
        return [self.completion(request) for request in requests]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], options: Options | None = None, **settings: Any
    ) -> Iterator[Piece]:
        """Continue prompts and hand out their text as it comes; arguments and errors as of `generate`.

        Yields:
            Pieces; joined, those of a prompt are its completion's text. A caller that stops reading ends the work.
        """
        if self.tokenizer is None:
            raise ValueError("stream: needs a tokenizer; make the engine with one")
        return self._pieces(self._requests(prompts, options, settings, streaming=True))

    def _pieces(self, requests: list[Request]) -> Iterator[Piece]:
        self.waiting += requests
        try:
            open_ones = dict(enumerate(requests))
            while open_ones:
                self.step(_STREAMED_STEPS)
                for index, request in list(open_ones.items()):
                    assert request.growing is not None
                    ended = request.finish_reason is not None
                    text = request.growing.piece(last=ended)
                    if ended:
                        del open_ones[index]
                    if text or ended:
                        yield Piece(index, text, self.completion(request) if ended else None)
        finally:
            self.cancel(*requests)

    def completion(self, request: Request) -> Completion:
        """The result of a request that has ended.

        Raises:
            ValueError: it has not.
            FloatingPointError, or what else broke a step off: it ended so.
        """
        if request.error is not None:
            raise request.error
        if request.finish_reason is None:
            raise ValueError("request: has not ended; go on with step")
        if request.growing is not None:
            text = request.growing.text
        elif self.tokenizer is None:
            text = ""
        else:
            ids = request.token_ids
            ended = request.finish_reason in ("end", "stop")  # by the last token, which is no text
            text = continuation(self.tokenizer, request.prompt, ids[:-1] if ended else ids)
        asked = request.options
        return Completion(
            text, request.token_ids, len(request.prompt), request.finish_reason,
            request.logprobs if asked.logprobs else None,
            request.top_logprobs if asked.top_logprobs else None,
            request.prompt_logprobs if asked.prompt_logprobs else None,
            request.prompt_top_logprobs if asked.prompt_logprobs and asked.top_logprobs else None,
        )  # fmt: skip

    # --- for a server ------------------------------------------------------------------------------------------------

    def request(self, prompt: Prompt, options: Options | None = None, *, streaming: bool = False) -> Request:
        """A prompt and what is asked for, checked and not yet queued: `waiting` takes it. Any thread may call this.

        Errors as of `generate`.
        """
        options = options or Options()
        ids = self._ids(prompt)
        limit = new_tokens(len(ids), self.decoder.length, options.max_new_tokens)
        own = set() if options.ignore_end else end_ids(self.config.eos_token_id)
        request = Request(ids, options, limit, frozenset({-1, *own, *options.stop_ids}))
        if streaming or options.stops:
            if self.tokenizer is None:
                raise ValueError("stop: texts need a tokenizer; make the engine with one, or give stop_ids")
            request.growing = GrowingText(self.tokenizer, ids, options.stops)
        return request

    def submit(self, prompt: Prompt, options: Options | None = None, *, streaming: bool = False) -> Request:
        """Queue one prompt. With `streaming` its text grows with its tokens. Errors as of `generate`."""
        request = self.request(prompt, options, streaming=streaming)
        self.waiting.append(request)
        return request

    def cancel(self, *requests: Request) -> None:
        """End requests that have not ended yet; their places are free for the next step."""
        for request in requests:
            if request.finish_reason is None:
                request.finish_reason = "cancelled"
                if request.growing is not None:
                    request.growing.end()
        if any(request.finish_reason is not None for request in self.waiting):
            self.waiting = deque(request for request in self.waiting if request.finish_reason is None)
        self._leave()

    def step(self, most: int = 1) -> None:
        """Let waiting requests join while there is room, and give every running one its next tokens.

        Args:
            most: of tokens each; fewer where requests wait for a place. Where graphs are used they are rounded down to a
                power of two.
        """
        try:
            self.join()
            if self.running:
                self._go_on(most)
            else:
                self._flight = None
        except BaseException as error:
            # How far the caches came is not known: whoever was in the step ends with it, and the others can go on.
            for request in (*self._joining, *self.running):
                if request.finish_reason is None:
                    request.finish_reason = "error"
                    request.error = error if isinstance(error, Exception) else RuntimeError("a step was broken off")
            self._joining, self._flight = [], None
            raise
        finally:
            self._leave()

    def _go_on(self, most: int) -> None:
        flight, self._flight = self._flight or self._launch(most), None
        # The device goes on while the host looks at what came; not where somebody waits for a place.
        if self.overlaps and not self.waiting and not any(request.options.top_logprobs for request in self.running):
            self._flight = self._launch(most, flight)
        if flight is not None:
            self._hand_out(*flight.arrived())

    def _launch(self, most: int, before: _Flight | None = None) -> _Flight | None:
        """Give the device the next steps; `before` are those that it has not ended yet. None where nobody needs more."""
        # A recorded graph leaves no logits behind.
        eager = any(request.options.top_logprobs for request in self.running)
        coming = dict.fromkeys(before.requests, before.steps) if before is not None else {}
        needed = max(request.remaining - coming.get(request, 0) for request in self.running)
        if needed < 1:
            return None
        wanted = min(max(most, 1), needed, _STREAMED_STEPS if self.waiting else STEPS)
        steps = 1 if eager else self._steps(wanted)
        draw = any(request.draws for request in self.running)
        if draw:
            uniform = torch.stack([request.uniforms(steps) for request in self.running])
            self.decoder.choice.uniform[: len(self.running), :steps] = uniform.to(self.decoder.device)
        tokens, logprobs = self.decoder.run(len(self.running), steps, draw=draw, eager=eager)
        return _Flight(self.running, steps, tokens, logprobs)

    def _steps(self, wanted: int) -> int:
        """How many steps at once: a token that comes after the last one is lost work, which on a CPU counts."""
        return 1 << (wanted.bit_length() - 1) if self.decoder.graphs else 1

    def _hand_out(self, requests: Sequence[Request], tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        wanted = any(request.options.logprobs for request in requests)
        probabilities = logprobs.tolist() if wanted else [[]] * len(requests)
        for request, new, its_own in zip(requests, tokens.tolist(), probabilities, strict=True):
            if request.finish_reason is None:  # else it has ended since
                request.add(new, its_own)
        most = max(request.options.top_logprobs for request in requests)
        if most:
            for request, found in zip(requests, _most_probable(self.decoder.newest, most), strict=True):
                request.top_logprobs.append(found[: request.options.top_logprobs])

    def _leave(self) -> None:
        """Free the rows of requests that have ended; the last row takes the place of each."""
        for row in reversed(range(len(self.running))):
            if self.running[row].finish_reason is not None:
                last = self.running.pop()
                if row < len(self.running):
                    self.running[row] = last
                    self.decoder.move(len(self.running), row)

    def join(self) -> None:
        """Read waiting prompts into free rows, those of one length together."""
        self._leave()
        free = self.decoder.rows - len(self.running)
        self._joining = [self.waiting.popleft() for _ in range(min(len(self.waiting), free))]
        alike: dict[tuple[int, bool], list[Request]] = {}
        for request in self._joining:
            alike.setdefault((len(request.prompt), request.options.prompt_logprobs), []).append(request)
        for (length, whole), requests in alike.items():
            together = 1 if whole else max(1, _PROMPT_TOKENS // length)
            for start in range(0, len(requests), together):
                self._begin(requests[start : start + together])
        self._joining = []
        self._leave()

    def _begin(self, requests: list[Request]) -> None:
        row = len(self.running)
        self._set_choice(row, requests)  # also where none draws: others may, later, and then all rows do
        draw = any(request.draws for request in requests)
        last = self._read_whole(row, requests[0]) if requests[0].options.prompt_logprobs else None
        tokens, logprobs = self.decoder.begin(row, [request.prompt for request in requests], draw=draw, logits=last)
        self._hand_out(requests, tokens[:, None], logprobs[:, None])
        self.running += requests

    def _read_whole(self, row: int, request: Request) -> torch.Tensor:
        """Read a prompt into a row, and note the log-probabilities of its tokens: the logits behind the last one, [1, V]."""
        logits = self.decoder.read(row, request.prompt).float()
        behind, following = logits[:-1], torch.tensor(request.prompt[1:], device=logits.device)
        chosen = behind.gather(1, following[:, None])[:, 0] - behind.logsumexp(-1)
        request.prompt_logprobs = chosen.tolist()
        if request.options.top_logprobs:
            request.prompt_top_logprobs = _most_probable(behind, request.options.top_logprobs)
        return logits[-1:]

    def _set_choice(self, row: int, requests: list[Request]) -> None:
        if any(request.options.repetition_penalty != 1 for request in requests):
            self.decoder.keep_seen()
        rows = slice(row, row + len(requests))
        choice, asked = self.decoder.choice, [request.options for request in requests]
        choice.uniform[rows, :1] = torch.stack([request.uniforms(1) for request in requests]).to(self.decoder.device)
        for part, values in (
            (choice.temperature, [(o.temperature or 1.0) if o.samples else 0.0 for o in asked]),
            (choice.top_k, [min(o.top_k or 0, self.config.vocab_size) for o in asked]),
            (choice.top_p, [1.0 if o.top_p is None else max(o.top_p, _LEAST_TOP_P) for o in asked]),
            (choice.penalty, [o.repetition_penalty for o in asked]),
        ):
            part[rows] = torch.tensor(values, dtype=part.dtype, device=self.decoder.device)
        if choice.seen is not None:
            choice.seen[rows] = 0
            for index, request in enumerate(requests):
                choice.seen[row + index, torch.tensor(request.prompt, device=self.decoder.device)] = 1

    # --- checks ------------------------------------------------------------------------------------------------------

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], options: Options | None, settings: dict[str, Any], streaming: bool
    ) -> list[Request]:
        if options is not None and settings:
            raise ValueError(f"options: pass options or {', '.join(settings)}, not both")
        options = options or Options(**settings)
        return [
            self.request(
                prompt,
                options if options.seed is None else replace(options, seed=options.seed + i),
                streaming=streaming,
            )
            for i, prompt in enumerate(_several(prompts))
        ]

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompts: texts need a tokenizer; make the engine with one, or give token ids")
            return encode_prompt(self.tokenizer, prompt)
        ids = _as_list(prompt)
        if not all(isinstance(token, Integral) for token in ids):
            raise ValueError(f"prompt: must be a text or token ids, got a list with {_kind(ids)}")
        if not ids:
            raise ValueError("prompt: is empty; G_LM needs at least one token")
        wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"prompt: token {wrong} is none of the model's {self.config.vocab_size}")
        return [int(token) for token in ids]


def _most_probable(logits: torch.Tensor, most: int) -> list[Alternatives]:
    """Of each row of logits [N, V], with their log-probabilities."""
    logits = logits.float()
    values, tokens = logits.topk(min(most, logits.shape[1]))
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    return [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def _several(prompts: Any) -> list[Any]:
    """A text or a list of ids as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    listed = _as_list(prompts)
    return [listed] if listed and all(isinstance(token, Integral) for token in listed) else listed


def _as_list(ids: Any) -> list[Any]:
    """Of a list, a tuple, an array or a tensor.

    Raises:
        ValueError: it is something else.
    """
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(found, list | tuple):
        raise ValueError(f"prompts: must be texts or lists of token ids, got {type(ids).__name__}")
    return list(found)


def _kind(values: list[Any]) -> str:
    return next(type(value).__name__ for value in values if not isinstance(value, Integral))
