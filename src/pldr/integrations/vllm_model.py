"""A PLDR-LLM in vLLM: this library's own model, in vLLM's backend for models that are written for transformers.

vLLM's layers take the place of the linear layers, the embedding, the norms and attention. What is added here is what vLLM
can not know of: an operator, of which each process keeps its own heads, and the published names of tensors.

A factored operator is multiplied out to a constant one: vLLM keeps keys and values of a head in one cache, in as many
dimensions, and so has no use for keys in fewer.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.math_utils import round_up

from pldr.checkpoints.certificate import refuse_learned
from pldr.checkpoints.load import check_tensors, under_our_names
from pldr.configuration_pldr import PldrConfig
from pldr.operator import ConstantOperator

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# How the processes of a tensor-parallel group share a layer; what is not named is whole in each.
_TENSOR_PARALLEL = {
    "layers.*.self_attn.[qkv]_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.(gate|up)_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# The features of the feed-forward block that a process has are a multiple of this, which kernels for narrow weights ask
# for. Those that are added are silu(0) · 0 = 0, and meet zeros.
_ALIGNMENT = 64


class PldrForVllm(TransformersForCausalLM):
    """Made by vLLM, in each of its worker processes.

    Raises:
        ValueError: the operator is learned.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not self.pp_group.is_first_rank:
            self.model.embed_scale = 1.0  # the hidden states that come in are another process's
        for operator in self.model.modules():
            if isinstance(operator, ConstantOperator):
                operator.G_LM = operator.G_LM.chunk(self.tp_group.world_size)[self.tp_group.rank_in_group].clone()
                set_weight_attrs(operator.G_LM, {"weight_loader": sharded_weight_loader(0)})

    def _patch_config(self) -> None:
        """Called by vLLM before it makes the model of `config`."""
        stored: PldrConfig = self.model_config.hf_config
        refuse_learned(self.model_config.model, stored.operator)
        config = self.config = self.text_config = copy.deepcopy(stored)
        super()._patch_config()
        # The tensor itself comes by `load_weights`.
        config.operator, config.operator_init = "constant", "identity"
        config.operator_trainable, config.operator_ranks = False, None
        assert stored.intermediate_size is not None  # set by the configuration
        config.intermediate_size = round_up(stored.intermediate_size, _ALIGNMENT * self.tp_group.world_size)
        config.base_model_tp_plan = _TENSOR_PARALLEL
        config.base_model_pp_plan = {name: [[], []] for name in ("embed_tokens", "embed_norm", "layers")}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Args:
            weights: of this library's layout or the hub's.

        Raises:
            ValueError: they are not exactly those of the configuration, by name and shape.
        """
        folder, config = Path(self.model_config.model), self.model_config.hf_config
        state = under_our_names(dict(weights), config, folder)
        check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, config, str(folder))
        return super().load_weights(self._as_served(state))

    def _as_served(self, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        missing = self.config.intermediate_size - self.model_config.hf_config.intermediate_size
        for name, tensor in state.items():
            if name.endswith(".operator.right"):
                continue
            if name.endswith(".operator.left"):
                right = state[name.removesuffix("left") + "right"]
                yield name.removesuffix("left") + "G_LM", tensor @ right.transpose(-1, -2)
            elif ".mlp.down_proj.weight" in name:
                yield name, F.pad(tensor, (0, missing))
            elif ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
                yield name, F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))
            else:
                yield name, tensor
