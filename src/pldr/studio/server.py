"""`pldr studio`: the page in a browser, from the first line in the terminal to Ctrl-C."""

import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr import __version__
from pldr.files import require
from pldr.imports import uncollected
from pldr.serving.sockets import bound
from pldr.studio.early import EarlyWriter

if TYPE_CHECKING:
    from types import FrameType

    from pldr.studio.app import Studio
    from pldr.studio.workbench import Workbench

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def run_studio(
    model: str | os.PathLike[str] | None = None,
    *,
    run: Sequence[str | os.PathLike[str]] = (),
    host: str = "127.0.0.1",
    port: int = 8600,
    allow_host: Sequence[str] = (),
    allow_frame: Sequence[str] = (),
    open_browser: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> None:
    """Show a model in a browser until Ctrl-C: its texts, its operator, and itself with other operators.

    Args:
        model: see `pldr.load_model`; the one that ships with pldr by default.
        run: output folders of `pldr train` whose curves the page may show.
        host, port: where to listen; port 0 takes a free one. Whoever reaches it may use the model: there is no password.
        allow_host: further names that requests may call the server by: a proxy's, or this machine's own in a network.
        allow_frame: origins (https://NAME) whose pages may show this one within them.
        open_browser: open the page.
        tokenizer, rope, g_lm, device, dtype: see `pldr.load_model`.

    Raises:
        ValueError, OSError: a model or a run that is not there, a port that is taken.
        ModuleNotFoundError: the extra is not installed.
    """
    require("studio", "fastapi", "uvicorn")
    if not 0 <= port <= 65535:
        raise ValueError(f"port: must be between 0 and 65535, got {port}")
    for origin in allow_frame:
        if not re.fullmatch(r"https?://[\w.:-]+", origin, re.ASCII):
            raise ValueError(f"allow_frame: must be an origin such as https://huggingface.co, got {origin!r}")
    runs = _runs(run)
    listening = bound(host, port)
    listening.listen()  # a browser may come at once, and waits
    port = listening.getsockname()[1]
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    sys.stderr.write(f"pldr studio: {url} (Ctrl-C ends it)\n")
    sys.stderr.flush()
    early = None if model else EarlyWriter()

    from pldr.studio.app import Studio, make_app

    options = {"device": device, "dtype": dtype, "rope": rope, "g_lm": g_lm}
    state = Studio(lambda: _loaded(model, tokenizer, options), runs, __version__, early)
    hosts = {host, *allow_host} | (_LOOPBACK if host in _LOOPBACK else set())
    _answer(listening, state, make_app(state, hosts, allow_frame), url if open_browser else None)


def _answer(listening: socket.socket, state: "Studio", app: Any, url: str | None) -> None:
    """Until Ctrl-C. Raises what kept the model from being loaded."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: "FrameType | None") -> None:
            state.close()  # texts that are being written break off: nobody waits for their end
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, log_level="critical",  # what goes wrong in a request is logged by the app
        access_log=False, server_header=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = Server(config)

    def stop() -> None:
        server.should_exit = True

    state.on_failure = stop
    state.start()
    if url is not None:
        threading.Timer(0.5, webbrowser.open, (url,)).start()
    try:
        server.run([listening])
    finally:
        state.close()
    if state.failure is not None:
        raise state.failure


def _loaded(
    model: str | os.PathLike[str] | None, tokenizer: str | os.PathLike[str] | None, options: dict[str, Any]
) -> "Workbench":
    """Imports torch, which takes seconds: the page is there before it."""
    with uncollected():
        from pldr.checkpoints.load import load_with_tokenizer
        from pldr.models.shipped import STORIES
        from pldr.studio.workbench import Workbench

    asked = STORIES if model is None else model
    loaded, its_tokenizer = load_with_tokenizer(asked, tokenizer, **options)
    return Workbench(loaded, its_tokenizer, Path(asked).absolute().name)


def _runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """By name. Raises FileNotFoundError: one is no run. Raises ValueError: two have the same name."""
    runs: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not (folder / "log.jsonl").is_file():
            raise FileNotFoundError(f"run: {folder} has no log.jsonl; name the output folder of pldr train")
        name = folder.absolute().name
        if name in runs:
            raise ValueError(
                f"run: {runs[name]} and {folder} have the same name, which the page calls them by; show one"
            )
        runs[name] = folder
    return runs
