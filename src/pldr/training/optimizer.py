"""The optimiser of a run: AdamW of gradients that are bounded element by element."""

from collections.abc import Iterable
from typing import Any

import torch

from pldr.recipe import OptimizationRecipe
from pldr.training.parallel import by_kind, local


class BoundedAdamW(torch.optim.AdamW):
    """Fused AdamW with decay on every parameter; each element of a gradient is bounded first.

    Attributes:
        bound: of a gradient's elements, or None.
        found_inf: a float32 scalar, 1 to leave the next step out, as a gradient scaler would say it. Set it before each step.
        gradients_stay: whether the gradients lie in the memory in which they lay at every other step with this set. The step
            is one CUDA graph then: of hundreds of small tensors the host would take longer than the device.
    """

    found_inf: torch.Tensor

    def __init__(self, parameters: Iterable[torch.nn.Parameter], recipe: OptimizationRecipe) -> None:
        groups = [{"params": kind} for kind in by_kind(parameters)]
        betas = (recipe.beta1, recipe.beta2)
        super().__init__(groups, recipe.learning_rate, betas, recipe.epsilon, recipe.weight_decay, fused=True)
        self.bound = recipe.clip_value
        self.gradients_stay = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rates: list[torch.Tensor] = []  # of the groups, float32, and `found_inf`, where the graph reads them
        self._found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.gradients_stay:
            self._update()
            return
        if self._graph is None:
            self._graph = self._recorded()
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._found_inf.copy_(self.found_inf)
        self._graph.replay()

    def _update(self) -> None:
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.bound is not None and gradients:
            torch._foreach_clamp_min_(gradients, -self.bound)
            torch._foreach_clamp_max_(gradients, self.bound)
        super().step()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        device = self.found_inf.device
        self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
        self._found_inf = torch.zeros((), device=device)
        found_inf, rates = self.found_inf, [group["lr"] for group in self.param_groups]
        graph = torch.cuda.CUDAGraph()
        try:
            self.found_inf = self._found_inf
            self._set_groups(self._rates, capturable=True)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._update()
        finally:
            self.found_inf = found_inf
            self._set_groups(rates, capturable=False)
        return graph

    def _set_groups(self, rates: list[Any], *, capturable: bool) -> None:
        for group, rate in zip(self.param_groups, rates, strict=True):
            group.update(lr=rate, capturable=capturable)
