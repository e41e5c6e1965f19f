"""Fast generation: `Engine` continues many texts at once, with graphs of fused kernels on CUDA."""

from pldr.engine.engine import Completion, Engine, Piece
from pldr.engine.options import Options

__all__ = ["Completion", "Engine", "Options", "Piece"]
