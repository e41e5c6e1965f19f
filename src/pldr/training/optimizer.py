"""The optimiser of a run: AdamW of gradients that are bounded element by element."""

from collections.abc import Iterable
from typing import Any

import torch

from pldr.recipe import OptimizationRecipe
from pldr.training.parallel import by_kind, local


class BoundedAdamW(torch.optim.AdamW):
    """Fused AdamW with decay on every parameter; each element of a gradient is bounded first.

    Args:
        parameters: what to optimise.
        recipe: the settings, among them the bound.
        graphed: on a GPU, the step is one CUDA graph from where `gradients_stay`: of hundreds of small tensors the host would
            take longer than the device. Rates are float32 then, from the first step on.

    Attributes:
        gradients_stay: whether the gradients lie in the memory in which they lay at every other step with this set.
        found_inf: a float32 scalar, 1 to leave the next step out, as a gradient scaler would say it. Set it before each step.
    """

    found_inf: torch.Tensor

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], recipe: OptimizationRecipe, *, graphed: bool = False
    ) -> None:
        groups = [{"params": kind} for kind in by_kind(parameters)]
        betas = (recipe.beta1, recipe.beta2)
        super().__init__(groups, recipe.learning_rate, betas, recipe.epsilon, recipe.weight_decay, fused=True)
        self.bound = recipe.clip_value
        self.graphed = graphed
        self.gradients_stay = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rates: list[torch.Tensor] = []  # of the groups; with `_found_inf`, what the graph reads
        self._found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.graphed:
            self._update()
            return
        if not self._rates:
            device = self.found_inf.device
            self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
            self._found_inf = torch.zeros((), device=device)
        numbers, found_inf = [group["lr"] for group in self.param_groups], self.found_inf
        for rate, number in zip(self._rates, numbers, strict=True):
            rate.fill_(number)
        self._found_inf.copy_(found_inf)
        try:
            self._set_rates(self._rates)
            self.found_inf = self._found_inf
            if self.gradients_stay:
                self._replay()
            else:
                self._update()
        finally:
            self._set_rates(numbers)
            self.found_inf = found_inf

    def _update(self) -> None:
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.bound is not None and gradients:
            torch._foreach_clamp_min_(gradients, -self.bound)
            torch._foreach_clamp_max_(gradients, self.bound)
        super().step()

    def _replay(self) -> None:
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            for group in self.param_groups:
                group["capturable"] = True
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._update()
            for group in self.param_groups:
                group["capturable"] = False
            self._graph = graph
        self._graph.replay()

    def _set_rates(self, rates: list[Any]) -> None:
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
