"""What clients may ask, as OpenAI's interface has it, checked field by field; and how they are told of mistakes.

Fields of OpenAI's that this server has nothing for are taken where they ask for nothing, and refused where they do. Of its own it
has `top_k`, `repetition_penalty`, `stop_token_ids` and `ignore_eos`, called as vLLM calls them.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pldr.engine import Options
from pldr.files import one_line

# Most alternatives at each place, and most choices of one prompt.
MOST_ALTERNATIVES = 20
MOST_CHOICES = 128
# Tokens of a completion where a client does not say; OpenAI's own number. A chat goes on to its end.
DEFAULT_TOKENS = 16

# What may be one of several things, of which pydantic would name the first.
_EXPECTED = {
    "prompt": "a text, a list of token ids, or a list of several of either",
    "stop": "a text, or a list of at most 16",
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "overloaded_error",
          504: "timeout_error"}  # fmt: skip


class ApiError(Exception):
    """An answer that says what is wrong.

    Attributes:
        status: HTTP's.
        message, param, code: as OpenAI's errors have them.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def mistake(error: Mapping[str, Any]) -> ApiError:
    """The first thing that pydantic or FastAPI finds wrong with a request: which field, the rule, and what was there."""
    place = [str(part) for part in error["loc"] if part != "body"]
    kind, message = error["type"], error["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({one_line(error['ctx']['error'])})")
    if kind == "value_error":  # of a validator of this file's, which names the field by itself
        message = one_line(message.removeprefix("Value error, "))
        name = message.partition(":")[0]
        return ApiError(400, message, name if name.isidentifier() else None)
    if not place:
        return ApiError(400, "the body must be a JSON object, and come with the header Content-Type: application/json")
    if kind == "missing":
        return ApiError(400, f"{'.'.join(place)}: is missing", place[0])
    if place[0] in _EXPECTED:
        place, message = place[:1], f"must be {_EXPECTED[place[0]]}"
    rule = message.replace("Input should", "must").replace("List should", "must")
    return ApiError(400, one_line(f"{'.'.join(place)}: {rule}, got {_shown(error['input'])}"), place[0])


def _shown(value: Any) -> str:
    """Of a JSON value, as much as a line has room for."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:59] + "…"


class _Asked(BaseModel):
    """Fields of exact types; the first that is not known is named, however many there are."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            unknown = next((name for name in fields if name not in cls.model_fields), None)
            if unknown is not None:
                raise ValueError(f"Unrecognized request argument supplied: {one_line(unknown, 64)}")
        return fields


class StreamOptions(_Asked):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class _Sampled(_Asked):
    """What completions and chats share."""

    # Fields that may ask for nothing alone, and what that is.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    }  # fmt: skip

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=64)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _supported(self) -> "_Sampled":
        for name, values in self.neutral.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise ValueError(f"{name}: is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: is for streams alone; set stream, or leave it out")
        return self

    @property
    def choices(self) -> int:
        """How many texts for each prompt."""
        return self.n or 1

    def options(self, choice: int, most: int, alternatives: int | None, *, prompt_logprobs: bool = False) -> Options:
        """The engine's options for one of the choices.

        Args:
            choice: which; seeds go on from one to the next.
            most: new tokens.
            alternatives: at each place, or None where log-probabilities are not wanted.
            prompt_logprobs: also of the prompt's tokens.

        Raises:
            ValueError: a setting outside its range.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        drawing: dict[str, Any] = {}
        if temperature:
            drawing = {"temperature": temperature, "top_k": max(self.top_k or 0, 0), "top_p": self.top_p}
        return Options(
            max_new_tokens=most, seed=None if self.seed is None else (self.seed + choice) % 2**62,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=self.stop or (), stop_ids=self.stop_token_ids or (), ignore_end=bool(self.ignore_eos),
            logprobs=alternatives is not None, top_logprobs=alternatives or 0, prompt_logprobs=prompt_logprobs, **drawing,
        )  # fmt: skip


# The first mistake in a list is told, however many there are.
_Ids = Annotated[list[int], Field(fail_fast=True, min_length=1)]


class CompletionRequest(_Sampled):
    neutral = _Sampled.neutral | {"best_of": (1,), "suffix": ("",)}

    prompt: (
        str
        | _Ids
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | Annotated[list[_Ids], Field(fail_fast=True, min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    @model_validator(mode="after")
    def _something(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1, or 0 with echo, got 0")
        return self

    @property
    def prompts(self) -> list[Any]:
        """Texts or lists of token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class Part(_Asked):
    type: Literal["text"]
    text: str


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Sampled):
    neutral = _Sampled.neutral | {
        "tools": ([],), "tool_choice": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
        "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"), "parallel_tool_calls": (True, False),
    }  # fmt: skip

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    modalities: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: must be at least 1, got 0")
        return self
