"""The embedded server, from its first connection to its last answer."""

import asyncio
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn

from pldr.serving.app import Service
from pldr.serving.guard import ARRIVAL, Protocol

logger = logging.getLogger("pldr.serving")


def run(service: Service, app: Any, listening: socket.socket, shutdown_timeout: float) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish what was accepted, within so many seconds.

    Raises:
        KeyboardInterrupt: it was SIGINT, and all is over.
        SystemExit: it was SIGTERM; code 0.
    """
    config = uvicorn.Config(
        app, http=Protocol, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=ARRIVAL,
        timeout_graceful_shutdown=int(shutdown_timeout) + 5,  # the word to those that are cancelled takes a moment
    )  # fmt: skip
    # uvicorn raises the signal that ended it again, when all is over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _Server(config, service, shutdown_timeout).run([listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        service.connections = self.server_state.connections

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        assert sockets
        host, port, *_ = sockets[0].getsockname()
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        facts = {name: self._service.operator[name] for name in ("model", "operator")}
        logger.info("ready", extra={"fields": {"url": url} | facts})

    async def shutdown(self, sockets: Any = None) -> None:
        service = self._service
        service.draining = True
        logger.info("shutting down", extra={"fields": {"open": service.worker.open, "seconds": self._grace}})
        late = asyncio.get_running_loop().call_later(self._grace, service.worker.close, True)
        await super().shutdown(sockets)
        late.cancel()
        logger.info("stopped")
