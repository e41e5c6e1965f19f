"""The engine's thread. It alone steps the engine; others hand it jobs, and are told what becomes of them."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pldr.engine import Completion, Engine
from pldr.engine.engine import Request
from pldr.serving.metrics import Metrics

logger = logging.getLogger("pldr.serving")

# Tokens of each sequence between two looks at what has come and gone; on a CPU the engine makes one at a time.
_STEPS = 4
# Prompts that join in one step, at most, and their tokens, but for one that is longer: the others wait for it with their next token.
_JOINING, JOINING_TOKENS = 8, 2048
# What a text ended by, where it was none of the engine's reasons.
_REASONS = {"TimeoutError": "timeout", "Cancelled": "cancelled", "Stopped": "stopped"}
# Seconds after which a step that has not ended counts as a failure.
_STALLED = 120.0


class Full(Exception):
    """There is no room in the queue."""


class Stopped(Exception):
    """The server shuts down."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Job:
    """One text that is being generated.

    Attributes:
        request: of the engine.
        news: where its news go.
        deadline: on the clock of `time.monotonic`.
        streaming: whether pieces of text are wanted, too.
        completion, error: what came of it, when it has ended: one of the two.
    """

    request: Request
    news: "asyncio.Queue[News]"
    deadline: float
    streaming: bool
    index: int = 0
    completion: Completion | None = None
    error: Exception | None = None
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    counted: int = 0


class News(NamedTuple):
    """Of a job: new text, how many tokens it has so far, and whether it has ended."""

    job: Job
    text: str
    tokens: int
    ended: bool


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        engine: nobody else steps it.
        metrics: are kept up to date.
        most_waiting: jobs that may wait for a place in the batch.
        tell: called in that thread with the news of a step.
    """

    def __init__(self, engine: Engine, metrics: Metrics, most_waiting: int, tell: Callable[[list[News]], None]) -> None:
        self.engine, self.metrics, self.tell = engine, metrics, tell
        self.most = most_waiting + engine.decoder.rows
        self._wake = threading.Condition()
        self._new: list[Job] = []
        self._dropped: list[tuple[Job, Exception]] = []
        self._open: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._closing = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="pldr-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return len(self._new) + len(self._open)

    @property
    def healthy(self) -> bool:
        """Whether the thread lives, and its steps end."""
        return self._thread.is_alive() and (not self.open or time.monotonic() - self._beat < _STALLED)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            Full: they would wait in too long a queue.
            Stopped: nothing is begun any more.
        """
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise Stopped
            if self.open + len(jobs) > self.most:
                raise Full
            self._new += jobs
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job], error: Exception | None = None) -> None:
        """End those that have not ended; their places are free for the next step."""
        with self._wake:
            self._dropped += [(job, error or Cancelled()) for job in jobs if job.completion is None and not job.error]
            if self._dropped:
                self._wake.notify()

    def close(self, now: bool) -> None:
        """Begin nothing more; and end what runs, if `now`, else let it come to its end."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if now:
            self.cancel([*self._new, *self._open], Stopped())

    def join(self) -> None:
        """Wait for the thread to end, after `close`."""
        self._thread.join()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                started = time.monotonic()
                try:
                    self.engine.step(_STEPS)
                except Exception:
                    logger.exception("a step failed; its requests end with it")
                self._beat = time.monotonic()
                self.metrics.step.observe(self._beat - started)
                self._report()
        finally:  # an error of this file's own, or of the process: nobody is left waiting
            with self._wake:
                self._closing = True
                jobs = [*self._open, *self._new]
            for job in jobs:
                job.error = job.error or Stopped()
            self.tell([News(job, "", len(job.request.token_ids), True) for job in jobs])

    def _take(self) -> bool:
        """Wait for something to do, and bring the engine up to date; False where there will be nothing more."""
        with self._wake:
            while not (self._new or self._dropped or self._open or self._closing):
                self._wake.wait()
            self._open += self._new
            self._waiting += self._new
            dropped, self._new, self._dropped = self._dropped, [], []
        self._beat = now = time.monotonic()
        dropped += [(job, TimeoutError()) for job in self._open if job.deadline < now]
        ending = [(job, error) for job, error in dropped if job.request.finish_reason is None]
        for job, error in ending:
            job.error = error
        self.engine.cancel(*(job.request for job, _ in ending))
        self._let_join()
        return bool(self._open) or not self._closing

    def _let_join(self) -> None:
        """Give the engine the next few that wait, as far as it has places."""
        places, tokens = min(self.engine.decoder.rows - len(self.engine.running), _JOINING), 0
        while self._waiting and len(self.engine.waiting) < places:
            request = self._waiting[0].request
            tokens += len(request.prompt)
            if self.engine.waiting and tokens > JOINING_TOKENS:
                break
            self._waiting.popleft()
            if request.finish_reason is None:
                self.engine.waiting.append(request)

    def _report(self) -> None:
        """Tell what the step has brought."""
        news, going_on, now = [], [], time.monotonic()
        for job in self._open:
            tokens, ended = len(job.request.token_ids), job.request.finish_reason is not None
            self._count(job, tokens, now)
            text = ""
            if job.streaming and job.request.growing is not None:
                text = job.request.growing.piece(last=ended)
            if ended:
                self._end(job, now)
            else:
                going_on.append(job)
            if text or ended:
                news.append(News(job, text, tokens, ended))
        self._open = going_on
        if news:
            self.tell(news)

    def _count(self, job: Job, tokens: int, now: float) -> None:
        if job.first is None and tokens:
            job.first = now
            self.metrics.first_token.observe(now - job.began)
            self.metrics.prompt_tokens.inc(len(job.request.prompt))
        self.metrics.generated_tokens.inc(tokens - job.counted)
        job.counted = tokens

    def _end(self, job: Job, now: float) -> None:
        if job.error is None:
            try:
                job.completion = self.engine.completion(job.request)
            except Exception as error:  # noqa: BLE001 (what ended the request is its answer)
                job.error = error
        reason = job.request.finish_reason if job.error is None else _REASONS.get(type(job.error).__name__, "error")
        self.metrics.finished.labels(reason).inc()
        self.metrics.request.observe(now - job.began)
        if job.first is not None and job.counted > 1:
            self.metrics.token.observe((now - job.first) / (job.counted - 1))
