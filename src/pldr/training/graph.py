"""Forward and backward as one CUDA graph: the host hands over a step in one call, where the device of a small model would wait
for it hundreds of times.
"""

import warnings
from collections.abc import Callable, Iterable

import torch

# Calls before the capture: what compiles at its first use, or allocates, has done so.
WARMUP = 3

Inputs = dict[str, torch.Tensor]
Step = Callable[[Inputs], tuple[torch.Tensor, ...]]


class GraphedStep:
    """A function of tensors that returns tensors and leaves gradients, called as it is at first and then replayed.

    It must not look at a value on the host, and find no gradients from before. Replays give the same numbers; inputs of another
    shape are computed without the graph. Where the capture fails, a warning says why, and it goes on without.
    """

    def __init__(self, step: Step, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.step = step
        self.parameters = list(parameters)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Inputs = {}
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.gradients: list[torch.Tensor | None] = []
        self.failed = False

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        if self.failed or self.calls <= WARMUP:
            return self.step(inputs)
        if self.graph is None and not self._capture(inputs):
            return self.step(inputs)
        if {name: _shape(x) for name, x in inputs.items()} != {name: _shape(x) for name, x in self.inputs.items()}:
            return self.step(inputs)
        assert self.graph is not None
        torch._foreach_copy_(list(self.inputs.values()), [inputs[name] for name in self.inputs])
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return tuple(output.clone() for output in self.outputs)

    def _capture(self, inputs: Inputs) -> bool:
        """Record the step; nothing is computed. Whether it went well."""
        static = {name: x.clone() for name, x in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                outputs = self.step(static)
        except RuntimeError as error:
            self.failed = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"optimization.cuda_graph: this step can not be a CUDA graph ({reason})", stacklevel=2)
            for parameter in self.parameters:
                parameter.grad = None
            return False
        self.graph, self.inputs, self.outputs = graph, static, outputs
        self.gradients = [parameter.grad for parameter in self.parameters]
        return True


def _shape(x: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype
