"""Fast generation: `Engine` continues many texts at once, with graphs of fused kernels on CUDA."""

from pldr.engine.engine import NOT_FINITE, Completion, Engine, Piece, Request
from pldr.engine.options import Options

__all__ = ["NOT_FINITE", "Completion", "Engine", "Options", "Piece", "Request"]
