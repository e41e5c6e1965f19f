"""What stands before the studio: it answers pages of its own alone, and reads no more than it must."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

# Bytes of a request's body, and of an operator's file.
_BODY, OPERATOR_BODY = 1 << 20, 32 << 20
OPERATORS = "/api/operators"
_POLICY = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'"
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"), (b"cache-control", b"no-cache"),
]  # fmt: skip
_JSON, _BYTES = b"application/json", b"application/octet-stream"


class Door:
    """An ASGI application around another.

    A request must name a host that is this machine, as the page's address does: a foreign name that leads here (DNS rebinding)
    is refused. What changes or computes something must come from the page itself.

    Args:
        app: the other.
        hosts: names that the server may be called by, without ports.
        frames: origins whose pages may show this one within them.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: set[str], frames: Sequence[str] = ()) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}
        policy = f"{_POLICY}; frame-ancestors " + (" ".join(frames) or "'none'")
        self.headers = [*_HEADERS, (b"content-security-policy", policy.encode())]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        refused = self._refusal(scope, headers)
        if refused is not None:
            await _refuse(answer, *refused)
            return
        limit = OPERATOR_BODY if scope["path"] == OPERATORS else _BODY
        body = await _body(receive, limit, headers)
        if body is None:
            await _refuse(answer, 413, f"the body must have at most {limit} bytes")
            return
        await self.app(scope, _replayed(body, receive), answer)

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        if name.strip("[]") not in self.hosts:
            return 421, f"Host: this server is {' or '.join(sorted(self.hosts))}, not {host[:80]!r}"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            return 403, "Origin: another page may not use this server"
        if headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            return 403, "Sec-Fetch-Site: another page may not use this server"
        wanted = _BYTES if scope["path"] == OPERATORS else _JSON
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != wanted:
            return 415, f"Content-Type: must be {wanted.decode()}"
        return None


async def _body(receive: Any, limit: int, headers: dict[bytes, bytes]) -> bytes | None:
    """All of it; None where it is longer than the limit."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > limit:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Any) -> Any:
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return pending.pop() if pending else await receive()

    return again


async def _refuse(send: Any, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", _JSON), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
