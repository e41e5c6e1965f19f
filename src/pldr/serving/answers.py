"""What clients are told: texts, log-probabilities and usage, as OpenAI's interface has them, whole or in pieces."""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from pldr.engine.engine import Alternatives
from pldr.engine.text import TokenTexts
from pldr.serving.protocol import ChatRequest, CompletionRequest
from pldr.serving.worker import Job, News

_REASONS = {"end": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


def event(fields: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Answer:
    """To one HTTP request: `prompts` texts with `choices` continuations each.

    Attributes:
        jobs: in the order of their choices.
        prompts: token ids of each prompt.
    """

    kind, piece_kind, prefix = "", "", ""

    def __init__(self, model: str, prompts: Sequence[Sequence[int]], jobs: Sequence[Job], tokens: TokenTexts) -> None:
        self.model, self.prompts, self.jobs, self.tokens = model, prompts, jobs, tokens
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._sent = [0] * len(jobs)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self) -> dict[str, Any]:
        """Of jobs that have all ended well."""
        choices = [self._choice(job) | {"index": job.index, "finish_reason": self._reason(job)} for job in self.jobs]
        return self._head(self.kind) | {"choices": choices, "usage": self.usage()}

    def beginning(self) -> Iterable[dict[str, Any]]:
        """The pieces before any news."""
        return ()

    def piece(self, news: News) -> dict[str, Any]:
        """Of one job."""
        job = news.job
        first, self._sent[job.index] = self._sent[job.index], news.tokens
        reason = self._reason(job) if news.ended else None
        return self._piece(job, self._delta(job, news.text, first, news.tokens), reason)

    def _piece(self, job: Job, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = delta | {"index": job.index, "finish_reason": reason}
        return self._head(self.piece_kind) | {"choices": [choice]}

    def last(self) -> dict[str, Any]:
        """The piece with the usage, which has no choices."""
        return self._head(self.piece_kind) | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        return usage(sum(map(len, self.prompts)), sum(self._counted(job) for job in self.jobs))

    def _counted(self, job: Job) -> int:
        return len(job.request.token_ids)

    def _reason(self, job: Job) -> str:
        assert job.completion is not None
        return _REASONS[job.completion.finish_reason]

    def _choice(self, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, job: Job, text: str, first: int, last: int) -> dict[str, Any]:
        """Of a piece of text, and the tokens from `first` to before `last`."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    kind = piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: CompletionRequest, prompt_texts: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self.asked, self.prompt_texts = asked, prompt_texts
        self._length = [0] * len(self.jobs)

    def _counted(self, job: Job) -> int:
        return 0 if self.asked.max_tokens == 0 else len(job.request.token_ids)

    def _reason(self, job: Job) -> str:
        return "length" if self.asked.max_tokens == 0 else super()._reason(job)

    def _choice(self, job: Job) -> dict[str, Any]:
        assert job.completion is not None
        return self._delta(job, job.completion.text, 0, len(job.request.token_ids))

    def _delta(self, job: Job, text: str, first: int, last: int) -> dict[str, Any]:
        echo = bool(self.asked.echo) and first == 0
        if self.asked.max_tokens == 0:
            text, last = "", 0
        before = self.prompt_texts[job.index // self.asked.choices] if echo else ""
        return {"text": before + text, "logprobs": self._logprobs(job, first, last, echo)}

    def _logprobs(self, job: Job, first: int, last: int, echo: bool) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        request = job.request
        ids = request.token_ids[first:last]
        logprobs: list[float | None] = list(request.logprobs[first:last])
        alternatives: list[Alternatives | None] = list(request.top_logprobs[first:last])
        if echo:
            ids = [*request.prompt, *ids]
            logprobs = [None, *request.prompt_logprobs, *logprobs]
            alternatives = [None, *request.prompt_top_logprobs, *alternatives]
        texts = [self.tokens.of(token)[0] for token in ids]
        if echo:
            texts[0] = self.tokens.first(ids[0])
        offsets = []
        for text in texts:
            offsets.append(self._length[job.index])
            self._length[job.index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": [self._named(found) for found in alternatives] if self.asked.logprobs else None,
            "text_offset": offsets,
        }

    def _named(self, alternatives: Alternatives | None) -> dict[str, float] | None:
        if alternatives is None:
            return None
        # Of tokens with one text, the more probable one.
        return {self.tokens.of(token)[0]: logprob for token, logprob in reversed(alternatives)}


class ChatAnswer(Answer):
    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: ChatRequest, *args: Any) -> None:
        super().__init__(*args)
        self.asked = asked

    def beginning(self) -> Iterable[dict[str, Any]]:
        for job in self.jobs:
            yield self._piece(job, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def _choice(self, job: Job) -> dict[str, Any]:
        assert job.completion is not None
        message = {"role": "assistant", "content": job.completion.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(job, 0, len(job.request.token_ids))}

    def _delta(self, job: Job, text: str, first: int, last: int) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(job, first, last)}

    def _logprobs(self, job: Job, first: int, last: int) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        request = job.request
        content = []
        for place in range(first, last):
            top = request.top_logprobs[place] if self.asked.top_logprobs else []
            entry = self._named(request.token_ids[place], request.logprobs[place])
            content.append(entry | {"top_logprobs": [self._named(*one) for one in top]})
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, found = self.tokens.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(found)}
