"""The endpoints. Each checks what is asked, hands texts to the engine's thread, and answers whole or in pieces."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pldr.engine import Engine
from pldr.engine.text import TokenTexts
from pldr.files import json_safe, one_line
from pldr.serving.answers import DONE, Answer, ChatAnswer, CompletionAnswer, event, usage
from pldr.serving.guard import ARRIVAL, INTERNAL, Guard
from pldr.serving.metrics import Metrics
from pldr.serving.protocol import DEFAULT_TOKENS, ApiError, ChatRequest, CompletionRequest, mistake
from pldr.serving.worker import JOINING_TOKENS, Cancelled, Full, Job, News, Stopped, Worker
from pldr.tokenizer import encode_prompt

PATHS = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/pldr/operator", "/health", "/metrics"}

# What a setting of the engine is called in a request.
_NAMES = {"max_new_tokens": "max_tokens", "stop_ids": "stop_token_ids", "prompts": "prompt"}


@dataclass(frozen=True)
class Limits:
    """What requests may take.

    Attributes:
        queue: texts that wait for a place in the batch.
        tokens: new ones of a text; None where the context alone is the limit.
        body: bytes of a request.
        seconds: from a request's arrival to its end.
    """

    queue: int = 256
    tokens: int | None = None
    body: int = 1 << 20
    seconds: float = 300.0


@dataclass(eq=False)
class Service:
    """A model that is served.

    Attributes:
        name: as clients call it.
        engine: with a tokenizer.
        operator: what `/v1/pldr/operator` tells.
        draining: the server shuts down.
        connections: that are open.
    """

    name: str
    engine: Engine
    operator: dict[str, Any]
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    draining: bool = False
    connections: Collection[Any] = ()

    def __post_init__(self) -> None:
        assert self.engine.tokenizer is not None
        self.engine.decoder.reserve(JOINING_TOKENS)  # a server is as large when it starts as it will be
        self.tokenizer, self.metrics = self.engine.tokenizer, Metrics()
        self.tokens, self.created = TokenTexts(self.tokenizer), int(time.time())
        self.worker = Worker(self.engine, self.metrics, self.limits.queue, self._tell)
        self._loop: asyncio.AbstractEventLoop | None = None
        running = self.engine.running
        rows, length = self.engine.decoder.rows, self.engine.decoder.length
        self.metrics.watch("requests_running", "Texts in the batch.", lambda: len(running))
        self.metrics.watch(
            "requests_waiting", "Texts that wait for a place.", lambda: max(self.worker.open - len(running), 0)
        )
        self.metrics.watch(
            "cache_used_ratio", "Share of the cache's positions that hold a token.",
            lambda: sum(len(r.prompt) + len(r.token_ids) for r in list(running)) / (rows * length),
        )  # fmt: skip

    def start(self) -> None:
        """Begin to work; to be called in the event loop that is to have the news."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def _tell(self, news: list[News]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_hand_out, news)

    # --- requests ----------------------------------------------------------------------------------------------------

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError: it is not the one that is here."""
        if asked is not None and asked != self.name:
            message = f"The model {one_line(asked, 64)!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    def check_count(self, prompts: int, choices: int = 1) -> None:
        """Raises ApiError: more texts in one request than would ever find a place together."""
        if prompts * choices > self.worker.most:
            message = f"at most {self.worker.most} texts in one request, got {prompts * choices}"
            raise ApiError(400, f"prompt, n: {message}", "n" if choices > 1 else "prompt")

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Raises ApiError: a text that is not valid."""
        if not isinstance(prompt, str):
            return prompt
        try:
            return await asyncio.to_thread(encode_prompt, self.tokenizer, prompt)
        except ValueError as error:
            raise _refused(error) from None

    def jobs(
        self, asked: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]], default: int | None, **how: Any
    ) -> list[Job]:
        """One for each prompt and choice, queued.

        Args:
            asked: the request.
            prompts: token ids.
            default: new tokens where the request does not say; None for as many as there is room for.
            how: for `options`.

        Raises:
            ApiError: something in it is out of range; no room in the queue; the server shuts down.
        """
        news: asyncio.Queue[News] = asyncio.Queue()
        deadline = time.monotonic() + self.limits.seconds
        choices = asked.choices
        made = []
        for index, ids in enumerate(ids for ids in prompts for _ in range(choices)):
            most = self._most(asked, len(ids), default)
            try:
                options = asked.options(index % choices, most, **how)
                request = self.engine.request(ids, options, streaming=bool(asked.stream))
            except ValueError as error:
                raise _refused(error) from None
            made.append(Job(request, news, deadline, bool(asked.stream), index))
        try:
            self.worker.submit(made)
        except Full:
            raise ApiError(503, "too many requests wait already; try again", headers={"retry-after": "1"}) from None
        except Stopped:
            raise ApiError(503, "the server shuts down", headers={"retry-after": "5"}) from None
        return made

    def _most(self, asked: CompletionRequest | ChatRequest, prompt: int, default: int | None) -> int:
        """New tokens for a prompt of so many.

        Raises:
            ApiError: more are asked for than this server gives.
        """
        most = asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            most = asked.max_completion_tokens
        limit = self.limits.tokens
        if most is None:
            room = max(self.engine.decoder.length - prompt, 1)
            return min(number for number in (room, default, limit) if number is not None)
        if limit is not None and most > limit:
            raise ApiError(400, f"max_tokens: must be at most {limit}, got {most}", "max_tokens")
        return max(most, 1)  # of none, the one that comes with the prompt is not shown

    async def answer(
        self, http: Request, answer: Answer, *, stream: Any, include_usage: bool, always: bool
    ) -> Response:
        """Whole, or as a stream of pieces, with the usage behind them or in each where asked for."""
        http.state.noted |= {"prompt_tokens": sum(map(len, answer.prompts)), "texts": len(answer.jobs)}
        if stream:
            pieces = self._pieces(answer, http.state.noted, include_usage, always)
            return _Stream(pieces, self.worker, answer.jobs)
        gone, ended = asyncio.create_task(_until_gone(http)), asyncio.create_task(_all_ended(answer.jobs))
        try:
            await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.worker.cancel(answer.jobs)
            gone.cancel()
            ended.cancel()
        if not ended.done():
            return Response(status_code=499)  # which nobody reads
        for job in answer.jobs:
            if job.error is not None:
                raise _failed(job.error)
        http.state.noted |= {"completion_tokens": answer.usage()["completion_tokens"]} | self._texts(answer)
        return JSONResponse(json_safe(answer.whole()))

    async def _pieces(
        self, answer: Answer, noted: dict[str, Any], include_usage: bool, always: bool
    ) -> AsyncIterator[bytes]:
        for fields in answer.beginning():
            yield event(fields)
        missing = len(answer.jobs)
        while missing:
            news = await answer.jobs[0].news.get()
            if news.job.error is not None:
                yield event(_failed(news.job.error).body())
                yield DONE
                return
            piece = answer.piece(news)
            if include_usage:
                piece["usage"] = usage(len(news.job.request.prompt), news.tokens) if always else None
            yield event(json_safe(piece))
            missing -= news.ended
        noted |= {"completion_tokens": answer.usage()["completion_tokens"]} | self._texts(answer)
        if include_usage:
            yield event(answer.last())
        yield DONE

    def _texts(self, answer: Answer) -> dict[str, Any]:
        """For the log, where it may hold texts."""
        if not self.log_prompts:
            return {}
        prompts = [self.tokenizer.decode(list(ids)) for ids in answer.prompts]
        return {"prompts": prompts, "completions": [job.completion.text for job in answer.jobs if job.completion]}


def _hand_out(news: list[News]) -> None:
    for one in news:
        one.job.news.put_nowait(one)


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends them, the work for them ends, too."""

    def __init__(self, pieces: AsyncIterator[bytes], worker: Worker, jobs: Sequence[Job]) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._worker, self._jobs = worker, jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._jobs)


async def _until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _all_ended(jobs: Sequence[Job]) -> None:
    for _ in jobs:
        while not (await jobs[0].news.get()).ended:
            pass


def _refused(error: ValueError) -> ApiError:
    """What the engine says of its settings, of the request's fields."""
    name, colon, rest = str(error).partition(": ")
    param = _NAMES.get(name, name)
    code = "context_length_exceeded" if "leave no room" in rest or name == "max_new_tokens" else None
    known = colon and param in {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    return ApiError(400, one_line(f"{param}: {rest}" if known else error, 400), (known and param) or None, code)


def _failed(error: Exception) -> ApiError:
    """Of a job that has ended so."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server allows", headers={"x-should-retry": "false"})
    if isinstance(error, Stopped):
        return ApiError(503, "the server shuts down", headers={"retry-after": "5"})
    if isinstance(error, Cancelled):
        return ApiError(499, "cancelled")
    known = isinstance(error, FloatingPointError)
    return ApiError(500, one_line(error) if known else "the engine failed; see the server's log")


def make_app(service: Service, *, api_key: str | None = None, origins: Sequence[str] = ()) -> Any:
    """The whole ASGI application.

    Args:
        service: what it serves.
        api_key: that clients need; None for none.
        origins: of web pages that may use it from a browser.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.worker.close(True)
        await asyncio.to_thread(service.worker.join)

    app = FastAPI(title="pldr", lifespan=lifespan, openapi_url=None)
    _add_errors(app)
    _add_generation(app, service)
    _add_facts(app, service)
    guard = Guard(
        app, service.metrics, api_key=api_key, connections=lambda: len(service.connections),
        most_bytes=service.limits.body, arrival=ARRIVAL, seconds=service.limits.seconds + ARRIVAL, paths=PATHS,
    )  # fmt: skip
    if not origins:
        return guard
    # Browsers ask whether they may without the key.
    return CORSMiddleware(guard, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


def _add_errors(app: FastAPI) -> None:
    def answered(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def _api(http: Request, error: ApiError) -> JSONResponse:
        return answered(error)

    @app.exception_handler(Exception)
    async def _internal(http: Request, error: Exception) -> JSONResponse:
        return answered(INTERNAL)

    @app.exception_handler(HTTPException)
    async def _http(http: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return answered(
            ApiError(
                error.status_code,
                f"{http.method} {one_line(http.url.path, 100)}: {error.detail}",
                headers=headers,
            )
        )

    @app.exception_handler(RequestValidationError)
    async def _invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        return answered(mistake(error.errors()[0]))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        service.check_model(asked.model)
        service.check_count(len(asked.prompts), asked.choices)
        prompts = [await service.encode(prompt) for prompt in asked.prompts]
        texts = [
            prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in (asked.prompts if asked.echo else ())
        ]
        jobs = service.jobs(
            asked, prompts, DEFAULT_TOKENS,
            alternatives=asked.logprobs, prompt_logprobs=bool(asked.echo) and asked.logprobs is not None,
        )  # fmt: skip
        answer = CompletionAnswer(asked, texts, service.name, prompts, jobs, service.tokens)
        return await service.answer(http, answer, **_streaming(asked))

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        service.check_model(asked.model)
        service.check_count(1, asked.choices)
        prompt = await asyncio.to_thread(_from_chat, service, asked)
        alternatives = (asked.top_logprobs or 0) if asked.logprobs else None
        jobs = service.jobs(asked, [prompt], None, alternatives=alternatives)
        answer = ChatAnswer(asked, service.name, [prompt], jobs, service.tokens)
        return await service.answer(http, answer, **_streaming(asked))


def _streaming(asked: CompletionRequest | ChatRequest) -> dict[str, Any]:
    options = asked.stream_options
    return {"stream": asked.stream, "include_usage": bool(options and options.include_usage),
            "always": bool(options and options.continuous_usage_stats)}  # fmt: skip


def _from_chat(service: Service, asked: ChatRequest) -> list[int]:
    """Token ids of a chat in the form that the tokenizer's template gives it.

    Raises:
        ApiError: it has no template, or its template refuses these messages.
    """
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            f"the tokenizer of {service.name} has no chat template; use /v1/completions",
            "messages",
            "no_chat_template",
        )
    messages = [message.plain() for message in asked.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # noqa: BLE001 (templates raise what they like)
        raise ApiError(400, f"messages: the chat template refuses them ({one_line(error)})", "messages") from None
    return list(ids)


def _add_facts(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "pldr",
                "max_model_len": service.engine.decoder.length}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model()

    @app.get("/v1/pldr/operator")
    async def operator() -> dict[str, Any]:
        return service.operator

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.draining or not service.worker.healthy:
            status = "shutting down" if service.draining else "the engine does not answer"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
