"""What may be asked of a generation, checked before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

# Logits are divided by the temperature, and must stay finite.
LEAST_TEMPERATURE = 1e-6
# Tokens that are generated where nothing is said and the context has room for them.
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a prompt is continued. Greedy unless one of `temperature`, `top_k` and `top_p` is given.

    Attributes:
        max_new_tokens: most tokens to add; 64, or as many as the context holds, by default.
        temperature: softmax temperature, at least 1e-6 and finite.
        top_k: draw among the k most probable tokens; 0 means all.
        top_p: draw among the most probable tokens whose mass reaches this, in (0, 1].
        repetition_penalty: between 1e-6 and 1e6; the logits of tokens that the prompt or the text so far holds are divided by it
            where they are positive, else multiplied. 1 changes nothing.
        seed: of the drawing; the i-th prompt of a list draws with seed + i. By default from torch's generator.
        stop: texts that end a continuation; they are left out of it.
        stop_ids: token ids that end it, beside the model's own; kept in `token_ids`, not in the text.
        ignore_end: go on past the model's own end token, for measurements of equal length.
        logprobs: also return the log-probability of each token under the model's own distribution.
        top_logprobs: and of so many most probable tokens at each place.
        prompt_logprobs: and both of the prompt's tokens, but for the first.

    Raises:
        ValueError: a setting outside its range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_end: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "top_logprobs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name}: must be an integer, got {value!r}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise ValueError(f"{name}: must be a number, got {value!r}")
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)
        penalty = self.repetition_penalty
        if not isinstance(penalty, Real) or not LEAST_TEMPERATURE <= penalty <= 1 / LEAST_TEMPERATURE:
            raise ValueError(f"repetition_penalty: must be between 1e-6 and 1e6, got {penalty!r}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs: must be 0 or more, got {self.top_logprobs}")
        if (self.top_logprobs or self.prompt_logprobs) and not self.logprobs:
            raise ValueError("logprobs: must be set for top_logprobs and prompt_logprobs")
        if not isinstance(self.stop, str | list | tuple) or not all(
            isinstance(text, str) and text for text in self.stops
        ):
            raise ValueError(f"stop: must be a text, or a list of texts that are not empty, got {self.stop!r}")
        if not isinstance(self.stop_ids, list | tuple) or not all(isinstance(token, int) for token in self.stop_ids):
            raise ValueError(f"stop_ids: must be a list of token ids, got {self.stop_ids!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as several texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, and not the most probable ones taken."""
        return any(setting is not None for setting in (self.temperature, self.top_k, self.top_p))


def check_sampling(temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None = None) -> None:
    """
    Raises:
        ValueError: a setting outside its range.
    """
    if temperature is not None and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature: must be positive, got {temperature}: at least {LEAST_TEMPERATURE} and finite; leave it out for "
            "greedy decoding"
        )
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: must be 0 (all tokens) or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**62:
        raise ValueError(f"seed: must be between 0 and 2^62 - 1, got {seed}")


def end_ids(own: int | list[int] | None) -> set[int]:
    """The tokens that end a text, of a configuration's `eos_token_id`."""
    return set() if own is None else {own} if isinstance(own, int) else set(own)


def new_tokens(prompt: int, context: int, asked: int | None) -> int:
    """How many tokens to add to a prompt of so many tokens, by default 64 or what the context has room for.

    Raises:
        ValueError: the context has no room for them.
    """
    room = context - prompt
    if room < 1:
        raise ValueError(f"prompt: {prompt} tokens leave no room in the context of {context}")
    if asked is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if not 1 <= asked <= room:
        raise ValueError(f"max_new_tokens: must be between 1 and {room} after this prompt, got {asked}")
    return asked
