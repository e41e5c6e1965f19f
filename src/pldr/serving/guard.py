"""What stands before the endpoints: keys, sizes and times of requests, one log line for each, and the last word on errors."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pldr.serving.metrics import Metrics
from pldr.serving.protocol import ApiError

logger = logging.getLogger("pldr.serving")

# The log has more, under the answer's X-Request-Id.
INTERNAL = ApiError(500, "internal error; the server's log has it under this answer's X-Request-Id")
# Seconds in which a request has to arrive, headers and body each; and after which an idle connection is closed.
ARRIVAL = 30
# That may be open at once.
MOST_CONNECTIONS = 1024


class Guard:
    """An ASGI application around another: it reads a request's body, within limits, before the other sees it.

    Args:
        app: the other.
        metrics: count requests.
        api_key: for every path under /v1; None asks for none.
        connections: that are open; beyond MOST_CONNECTIONS requests are sent away.
        most_bytes: of a body.
        arrival: seconds in which it has to come.
        seconds: in which the answer has to be taken, too, after which a client that does not read is left.
        paths: that are counted by name.
    """

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        *,
        api_key: str | None,
        connections: Callable[[], int],
        most_bytes: int,
        arrival: float,
        seconds: float,
        paths: set[str],
    ) -> None:
        self.app, self.metrics, self.most_bytes, self.paths = app, metrics, most_bytes, paths
        self.arrival, self.seconds, self.connections = arrival, seconds, connections
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, name = time.monotonic(), uuid.uuid4().hex
        noted: dict[str, Any] = {}
        scope.setdefault("state", {})["noted"] = noted
        status = 0

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            if scope["path"].startswith("/v1"):  # the others tell how the server is, however many there are
                self._check_key(scope)
                self._check_connections()
            body = await self._body(scope, receive)
            async with asyncio.timeout(self.seconds):
                await self.app(scope, _replayed(body, receive), answer)
        except ApiError as error:
            await _send_error(answer, error)
        except (_Gone, TimeoutError):  # which uvicorn closes the connection of
            status = 499
        except Exception:
            logger.exception("request failed", extra={"fields": {"id": name}})
            if not status:
                await _send_error(answer, INTERNAL)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.http.labels(path, str(status)).inc()
            fields = {"id": name, "method": scope["method"], "path": path, "status": status,
                      "seconds": round(time.monotonic() - started, 6)}  # fmt: skip
            logger.info("request", extra={"fields": fields | noted})

    def _check_key(self, scope: Any) -> None:
        if self._key is None:
            return
        given = next((value for header, value in scope["headers"] if header == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            message = "Incorrect API key provided." if given else "No API key provided: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_connections(self) -> None:
        if self.connections() > MOST_CONNECTIONS:
            message = f"more than {MOST_CONNECTIONS} connections are open; try again"
            raise ApiError(503, message, headers={"retry-after": "1", "connection": "close"})

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """
        Raises:
            ApiError: it is too long, or comes too slowly.
            _Gone: the client has left.
        """
        declared = next((value for header, value in scope["headers"] if header == b"content-length"), b"0")
        too_long = ApiError(413, f"the body must have at most {self.most_bytes} bytes", code="request_too_large")
        if int(declared) > self.most_bytes:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self.arrival):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    body += message.get("body", b"")
                    if len(body) > self.most_bytes:
                        raise too_long
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            message = f"the body did not arrive within {self.arrival:g} s"
            raise ApiError(408, message, headers={"connection": "close"}) from None


class _Gone(Exception):
    """The client has left before its request was whole."""


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body first."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return pending.pop() if pending else await receive()

    return again


async def _send_error(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | (error.headers or {})
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class Protocol(H11Protocol):
    """HTTP/1.1 whose connections do not stay where nothing comes, not even slowly."""

    _seen: Any = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(self.config.timeout_keep_alive, self._look)

    def _look(self) -> None:
        """Close the connection where, since the last look, no request has come to its end; its headers, that is."""
        if self.transport.is_closing():
            return
        if self.cycle is self._seen and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
            return
        self._seen = self.cycle
        self._look_again()

    def shutdown(self) -> None:
        """As the newer releases of uvicorn do it: whoever works on a request is not told that its client has gone."""
        if self.cycle is None or self.cycle.response_complete:
            super().shutdown()
        else:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """In the form of the other errors; and whoever works on a request of this connection learns that nobody waits."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.transport.close()
            return
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                   (b"connection", b"close")]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
