"""Forward and backward as one CUDA graph: the host hands over a step in one call, where the device of a small model would wait
for it hundreds of times.
"""

from collections.abc import Callable, Iterable

import torch

from pldr.recipe import OptimizationRecipe

# Calls before the capture: what compiles at its first use, or allocates, has done so.
WARMUP = 3

Inputs = dict[str, torch.Tensor]
Step = Callable[[Inputs], tuple[torch.Tensor, ...]]


def may_be_graph(recipe: OptimizationRecipe, device: torch.device, processes: int = 1) -> bool:
    """Whether forward and backward of a step may be one CUDA graph."""
    if recipe.accumulation > 1 or recipe.gradient_checkpointing or recipe.dag_coefficients:
        return False
    return recipe.cuda_graph == "auto" and device.type == "cuda" and processes == 1


class GraphedStep:
    """A function of tensors that returns tensors and leaves gradients, called as it is at first and then replayed.

    It must not look at a value on the host, and find no gradients from before. Replays give the same numbers; inputs of another
    shape are computed without the graph.

    Attributes:
        replayed: whether the last call was a replay: then its gradients lie where those of every other replay do.
    """

    def __init__(self, step: Step, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.step = step
        self.parameters = list(parameters)
        self.calls = 0
        self.replayed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Inputs = {}
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.gradients: list[torch.Tensor | None] = []

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """
        Raises:
            RuntimeError: the step did something that no graph can hold.
        """
        self.calls += 1
        if self.graph is None and self.calls > WARMUP:
            self._capture(inputs)
        self.replayed = self.graph is not None and _shapes(inputs) == _shapes(self.inputs)
        if self.graph is None or not self.replayed:
            return self.step(inputs)
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return tuple(output.clone() for output in self.outputs)

    def _capture(self, inputs: Inputs) -> None:
        """Record the step; nothing is computed."""
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # What other threads do meanwhile (batches that are pinned, a checkpoint that is written) is not the step's.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.step(self.inputs)
            self.graph, self.gradients = graph, [parameter.grad for parameter in self.parameters]
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the first one says what it was
                cause = cause.__context__
            reason = str(cause).splitlines()[0]
            raise RuntimeError(
                f"optimization.cuda_graph: the step can not be a CUDA graph ({reason}); set it to never"
            ) from error


def _shapes(tensors: Inputs) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}
