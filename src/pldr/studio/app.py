"""The studio's endpoints, and the files of its page."""

import asyncio
import json
import logging
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pldr.files import json_safe, one_line
from pldr.studio.door import OPERATORS, Door
from pldr.studio.pieces import ALTERNATIVES

if TYPE_CHECKING:
    from pldr.studio.early import EarlyWriter
    from pldr.studio.freezing import Freezing
    from pldr.studio.workbench import Workbench

logger = logging.getLogger("pldr.studio")

PAGE = Path(__file__).parent / "page"
# Certificates whose frozen models are kept.
_JOBS = 4
_ENDED = "the studio has been ended; start it again"

Text = Annotated[str, Field(max_length=200_000)]
Name = Annotated[str, Field(min_length=1, max_length=40)]


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Generation(_Asked):
    prompt: Text | None = None
    ids: Annotated[list[int], Field(min_length=1, max_length=100_000)] | None = None
    operator: Name
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None


class OneHead(_Asked):
    text: Text
    layer: int
    head: int
    length: int | None = None
    operator: Name


class Grid(_Asked):
    text: Text
    tensor: Literal["A", "A_LM", "A_P", "G_LM"]
    length: int | None = None
    operator: Name


class Attention(_Asked):
    text: Text
    operator: Name
    layer: int
    head: int


class Comparison(_Asked):
    text: Text
    prompt: Text
    operators: Annotated[list[Name], Field(min_length=1, max_length=12)]
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 40


class Certification(_Asked):
    text: Text


class Studio:
    """What the page works with: a workbench, once the model is loaded; of some models, until then, what writes already.

    Attributes:
        stage: what is being done until then.
        failure: why there never will be a workbench; `on_failure` is called then.
        closed: whether it has been ended.
        runs: folders of trainings that may be looked at, by name.
    """

    def __init__(
        self,
        load: "Callable[[], Workbench]",
        runs: dict[str, Path],
        version: str,
        early: "EarlyWriter | None" = None,
    ) -> None:
        self.stage, self.runs, self.version = "loading the model", runs, version
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.closed = False
        self._load, self._early = load, early
        self._bench: Workbench | None = None
        self.jobs: dict[str, Freezing] = {}
        self._warm = threading.Event()
        self._certifying = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="load").start()

    def _run(self) -> None:
        try:
            if self._early is not None:
                self._early.wait()
            self._bench = self._load()
            self.stage = "ready"
        except Exception as error:  # noqa: BLE001 (whoever started the server raises it)
            self.failure = error
            self.on_failure()
            return
        try:
            self._bench.warm_up()
        except Exception as error:  # noqa: BLE001 (one operator may fail where others work; who asks for it is told again)
            logger.warning("not every operator can be had: %s", one_line(error))
        self._warm.set()
        if self._early is not None:
            self._early.retire()

    async def bench(self) -> "Workbench":
        """Waits until it is there. Raises HTTPException: it never will be."""
        while self._bench is None:
            if self.closed:
                raise HTTPException(503, _ENDED)
            if self.failure is not None:
                raise HTTPException(500, one_line(self.failure))
            await asyncio.sleep(0.05)
        return self._bench

    def early(self, operator: str) -> "EarlyWriter | None":
        """Who writes with an operator until the workbench does, without waiting for what it prepares."""
        early = None if self._warm.is_set() else self._early
        return early if early is not None and early.free and operator in early.operators else None

    def state(self) -> dict[str, Any]:
        facts = {"ready": self._bench is not None, "stage": self.stage, "version": self.version,
                 "runs": list(self.runs)}  # fmt: skip
        if self._bench is not None:
            return facts | self._bench.facts()
        return facts | (self._early.facts if self._early is not None else {})

    def certify(self, bench: "Workbench", text: str) -> str:
        """Begin a certificate, and name it. Raises HTTPException: another is being made."""
        from pldr.studio.freezing import Freezing

        with self._certifying:
            if any(job.running for job in self.jobs.values()):
                raise HTTPException(409, "certify: another certificate is being made; wait until it is done")
            job = Freezing(bench, text)
            name = secrets.token_urlsafe(12)
            self.jobs[name] = job
            for old in list(self.jobs)[:-_JOBS]:
                self.jobs.pop(old).close()
        return name

    def job(self, name: str) -> "Freezing":
        if name not in self.jobs:
            raise HTTPException(404, "there is no such certificate; certify again")
        return self.jobs[name]

    def close(self) -> None:
        self.closed = True
        if self._early is not None:
            self._early.close()
        for job in self.jobs.values():
            job.close()


def make_app(studio: Studio, hosts: set[str], frames: Sequence[str] = ()) -> Door:
    """The page and what it asks for; `hosts` and `frames` as of `Door`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_endpoints(app, studio)
    _add_certificates(app, studio)
    _add_runs(app, studio)

    @app.get("/")
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/", StaticFiles(directory=PAGE))
    return Door(app, hosts, frames)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ValueError)
    async def _value(http: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": one_line(error)}, 422)

    @app.exception_handler(HTTPException)
    async def _http(http: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": one_line(str(error.detail))}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def _invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse({"error": one_line(f"{place}: {first['msg']}")}, 422)

    @app.exception_handler(Exception)
    async def _internal(http: Request, error: Exception) -> JSONResponse:
        logger.exception("request failed")
        return JSONResponse({"error": "internal error; the terminal that runs pldr studio has it"}, 500)


def _add_endpoints(app: FastAPI, studio: Studio) -> None:
    async def work(function: Callable[..., Any], *arguments: Any) -> JSONResponse:
        return JSONResponse(json_safe(await asyncio.to_thread(function, *arguments)))

    @app.get("/api/state")
    async def state() -> JSONResponse:
        return JSONResponse(studio.state())

    @app.post("/api/generate")
    async def generate(asked: Generation, http: Request) -> Response:
        from pldr.engine import Options

        if (asked.prompt is None) == (asked.ids is None):
            raise ValueError("prompt, ids: give exactly one of them")
        options = Options(
            max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty, seed=asked.seed, logprobs=True, top_logprobs=ALTERNATIVES,
        )  # fmt: skip
        early = studio.early(asked.operator)
        if early is not None:
            steps = early.generate(asked.prompt, asked.ids, asdict(options))
        else:
            steps = (await studio.bench()).write(asked.prompt, asked.ids, asked.operator, options)
        begun = [await asyncio.to_thread(next, steps) for _ in range(2)]  # what is wrong shows before the answer begins
        return StreamingResponse(_lines(studio, begun, steps), media_type="application/x-ndjson")

    @app.post("/api/operator")
    async def operator(asked: OneHead) -> JSONResponse:
        return await work(
            (await studio.bench()).operator, asked.text, asked.layer, asked.head, asked.length, asked.operator
        )

    @app.post("/api/grid")
    async def grid(asked: Grid) -> JSONResponse:
        return await work((await studio.bench()).grid, asked.text, asked.tensor, asked.length, asked.operator)

    @app.post("/api/attention")
    async def attention(asked: Attention) -> JSONResponse:
        return await work((await studio.bench()).attention, asked.text, asked.operator, asked.layer, asked.head)

    @app.post("/api/compare")
    async def compare(asked: Comparison) -> JSONResponse:
        return await work(
            (await studio.bench()).compare, asked.text, asked.prompt, asked.operators, asked.max_new_tokens
        )

    @app.post(OPERATORS)
    async def add_operator(http: Request) -> JSONResponse:
        bench, body = await studio.bench(), await http.body()
        name = Path(http.headers.get("x-file-name", "operator.safetensors")).name
        suffix = ".pkl" if name.lower().endswith((".pkl", ".pickle")) else ".safetensors"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"operator{suffix}"  # a name of ours: theirs is never a path
            file.write_bytes(body)
            try:
                added = await asyncio.to_thread(bench.add_operator, file)
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), one_line(name, 60))) from None
        return JSONResponse({"operator": added, "name": one_line(name, 60)})


def _add_certificates(app: FastAPI, studio: Studio) -> None:
    @app.post("/api/certify")
    async def certify(asked: Certification) -> JSONResponse:
        return JSONResponse({"job": await asyncio.to_thread(studio.certify, await studio.bench(), asked.text)})

    @app.get("/api/certify/{name}")
    async def state(name: str) -> JSONResponse:
        return JSONResponse(json_safe(studio.job(name).state()))

    @app.get("/api/certify/{name}/model.zip")
    async def model(name: str) -> FileResponse:
        archive = studio.job(name).archive
        if not archive.is_file():
            raise HTTPException(404, "there is no frozen model: not certified, or not yet")
        return FileResponse(archive, filename="frozen.zip")

    @app.get("/api/certify/{name}/certificate.json")
    async def certificate(name: str) -> Response:
        found = studio.job(name).certificate
        if found is None:
            raise HTTPException(404, "there is no certificate yet")
        headers = {"content-disposition": 'attachment; filename="certificate.json"'}
        return Response(json.dumps(found, indent=1), media_type="application/json", headers=headers)


def _add_runs(app: FastAPI, studio: Studio) -> None:
    def folder(run: str) -> Path:
        if run not in studio.runs:
            raise HTTPException(404, f"run: there is no {run[:60]!r}; start pldr studio with --run FOLDER")
        return studio.runs[run]

    @app.get("/api/training")
    async def training(run: str) -> JSONResponse:
        from pldr.studio.training import curves

        return JSONResponse(json_safe(await asyncio.to_thread(curves, folder(run))))

    @app.get("/api/training/operator")
    async def operator(run: str, step: int) -> JSONResponse:
        from pldr.studio.training import operator

        return JSONResponse(json_safe(await asyncio.to_thread(operator, folder(run), step)))


async def _lines(studio: Studio, begun: list[dict[str, Any]], steps: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
    """One JSON text a line, as it comes; a client that leaves ends the work."""
    try:
        for step in begun:
            yield json.dumps(json_safe(step)) + "\n"
        while (one := await asyncio.to_thread(next, steps, None)) is not None:
            yield json.dumps(json_safe(one)) + "\n"
            if studio.closed:
                raise ValueError(_ENDED)
    except (ValueError, FloatingPointError) as error:
        yield json.dumps({"error": one_line(error)}) + "\n"
    finally:
        await asyncio.to_thread(steps.close)  # type: ignore[attr-defined]
