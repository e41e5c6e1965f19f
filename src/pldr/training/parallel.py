"""How the processes of a run share a model: each holds all of it (DDP), or a shard of it (FSDP2).

Operators that train are whole in every process either way. The network of a learned one has over a hundred small parameters
a layer, a few percent of the model; the host takes longer to cut, gather and send each by itself than the step would take.
Their gradients are averaged in one piece.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pldr.modeling_pldr import PldrForCausalLM
from pldr.recipe import DistributedRecipe


def whole_parameters(model: PldrForCausalLM) -> list[torch.nn.Parameter]:
    """Those of the operators: neither DDP nor FSDP2 may see them."""
    operators = [layer.self_attn.operator for layer in model.model.layers]  # type: ignore[union-attr]
    return [p for operator in operators for p in operator.parameters() if p.requires_grad]  # type: ignore[union-attr]


def hide_from_ddp(model: PldrForCausalLM, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Keep parameters out of what DDP averages, when it will wrap the model."""
    hidden = set(parameters)
    names = [name for name, parameter in model.named_parameters() if parameter in hidden]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def shard(
    model: PldrForCausalLM, recipe: DistributedRecipe, device: torch.device, whole: Iterable[torch.nn.Parameter]
) -> None:
    """Cut a model's parameters, all but `whole`, among the processes, in place: layer by layer, the head and the rest or,
    where they are not cut again between forward and backward, all in one piece.

    Parameters stay float32, whose range the power law needs; a step in bf16 runs under autocast, as in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    processes = torch.distributed.get_world_size()
    if recipe.sharding == "hybrid":
        shape, names = (recipe.replicas, processes // recipe.replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (processes,))
    policy = CPUOffloadPolicy() if recipe.cpu_offload else OffloadPolicy()
    model.to(device)
    parts = (*model.model.layers, model.lm_head) if recipe.reshard else ()
    for module in (
        *parts,
        model,
    ):  # what is left to the model stays whole after the forward: the backward needs it at once
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=set(whole))


class ShardedForward(torch.nn.Module):
    """A sharded model under autocast. Accelerate would do that, and wrap the model in DDP as well."""

    def __init__(self, model: torch.nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return self.model(*args, **kwargs)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, which shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def by_kind(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Whole ones and sharded ones, apart, as the groups of an optimiser: its fused kernels take one kind at a time."""
    parameters = list(parameters)
    whole, sharded = [p for p in parameters if local(p) is p], [p for p in parameters if local(p) is not p]
    return [kind for kind in (whole, sharded) if kind]


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients of whole parameters by their mean over the processes, sent in one piece."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch._utils._flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    torch._foreach_copy_(gradients, torch._utils._unflatten_dense_tensors(flat, gradients))


@torch.no_grad()
def clip_by_norm(parameters: Iterable[torch.nn.Parameter], bound: float) -> torch.Tensor:
    """Scale all gradients, of whole and sharded parameters, by one number, so that their common norm is at most `bound`.

    Returns:
        The norm before that, of the whole model on every process.
    """
    kinds = [[p.grad for p in kind if p.grad is not None] for kind in by_kind(parameters)]
    norms = [torch.nn.utils.get_total_norm(kind) for kind in kinds]
    total = torch.linalg.vector_norm(
        torch.stack([(n.full_tensor() if hasattr(n, "full_tensor") else n).to(kinds[0][0].device) for n in norms])
    )
    scale = (bound / (total + 1e-6)).clamp(max=1.0)
    for kind in kinds:
        parts = [local(gradient) for gradient in kind]
        torch._foreach_mul_(parts, scale.to(parts[0].device))
    return total
