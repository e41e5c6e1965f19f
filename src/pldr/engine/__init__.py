"""Generation for many texts at once: see `pldr.Engine`. Names are imported on first use: options and texts need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pldr.engine.engine import NOT_FINITE, Completion, Engine, Piece, Request
    from pldr.engine.options import Options

__all__ = ["NOT_FINITE", "Completion", "Engine", "Options", "Piece", "Request"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pldr.engine' has no attribute {name!r}")
    return getattr(import_module(f"pldr.engine.{'options' if name == 'Options' else 'engine'}"), name)
