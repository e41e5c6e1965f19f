"""The operator of power law graph attention: whatever turns queries and keys into those of ordinary attention.

    scores = (q G_LM) kᵀ

An operator is called with rotated queries and keys and returns the ones to attend with, so that attention itself never
knows where G_LM came from. Ordinary attention is G_LM = identity.

Shapes: B batch, H heads, T tokens, D head dimension, L layers.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from transformers import initialization as init

from pldr.cache import OperatorState
from pldr.configuration_pldr import PldrConfig
from pldr.ops import reference
from pldr.ops.aligned import gated_linear_unit
from pldr.ops.bilinear import apply_operator, density_matrix
from pldr.ops.metric_learner import residual_network
from pldr.pictures import layers_html

if TYPE_CHECKING:
    from pldr.modeling_pldr import PldrAttention, PldrForCausalLM


class DeductiveOutputs(NamedTuple):
    """The deductive outputs of one layer, each [B, H, D, D] or None where the operator did not compute it.

    Attributes:
        A: output of the metric learner's residual network.
        A_LM: metric tensor, iSwiGLU(W A + b) + 1e-9.
        A_P: potential tensor, A_LM raised elementwise to the learned exponents.
        G_LM: energy-curvature tensor, a A_P + b_a: the operator. A constant operator's is [1, H, D, D].
    """

    A: torch.Tensor | None
    A_LM: torch.Tensor | None
    A_P: torch.Tensor | None
    G_LM: torch.Tensor

    def __repr__(self) -> str:
        shown = (f"{name}={_shape(value)}" for name, value in self._asdict().items())
        return f"DeductiveOutputs({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """For a notebook: the shapes, and G_LM of the first sequence as pictures."""
        layers = self.G_LM[None] if self.G_LM.dim() == 4 else self.G_LM
        return layers_html("G_LM", layers[:, 0].detach(), [repr(self)])


def _shape(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class GatedLinearUnit(nn.Module):
    """(silu(z W1 + b1) ∘ (z W2 + b2)) W3 + b3, the feed-forward block and the metric learner's building block."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width)
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = nn.Linear(inner_width, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return gated_linear_unit(z, self.gate_proj, self.up_proj, self.down_proj)


class ResidualUnit(nn.Module):
    """u ← LayerNorm(GLU_N(… GLU_1(u) …) + u) on the rows of A; shared by the heads of a layer."""

    def __init__(self, config: PldrConfig) -> None:
        super().__init__()
        self.glus = nn.ModuleList(
            GatedLinearUnit(config.head_dim, config.metric_learner_width) for _ in range(config.metric_learner_glus)
        )
        self.norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        residual = u
        for glu in self.glus:
            u = glu(u)
        return self.norm(u + residual)


class LearnedOperator(nn.Module):
    """G_LM from the queries, by the metric learner and the power law (v51, v52, v51-DAG).

    G_LM sums over every position that it is given, later ones too: a forward with a learned operator is not causal.
    """

    def __init__(self, config: PldrConfig) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
        self.metric_learner = nn.ModuleList(ResidualUnit(config) for _ in range(config.metric_learner_units))
        shape = (config.num_attention_heads, config.head_dim, config.head_dim)
        self.metric_weight = nn.Parameter(torch.empty(shape))  # W
        self.metric_bias = nn.Parameter(torch.empty(shape))  # b
        self.exponent = nn.Parameter(torch.empty(shape))  # p
        self.energy_weight = nn.Parameter(torch.empty(shape))  # a
        self.energy_bias = nn.Parameter(torch.empty(shape))  # b_a

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        state: OperatorState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DeductiveOutputs]:
        """
        Args:
            query, key: [B, H, T, D], rotated.
            padding_mask: [B, T], zero at padding; None where nothing is padded.
            state: this layer's part of the cache. Filled where it is empty, read in place of the network where not.

        Returns:
            query and key for attention, [B, H, T, D], and this layer's deductive outputs.
        """
        if state is None or not state.has_operator_state:
            deductive = self.energy_curvature(self.metric(query, padding_mask))
            if state is not None:
                kept = deductive.G_LM if state.caches_g else deductive.A
                assert kept is not None
                state.fill_operator_state(kept)
        else:
            assert state.operator_state is not None
            if state.caches_g:
                deductive = DeductiveOutputs(None, None, None, state.operator_state)
            else:
                deductive = self.energy_curvature(state.operator_state)
        return apply_operator(query, deductive.G_LM), key, deductive

    def metric(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """A: the density matrix qᵀq through the residual network. [B, H, T, D] → [B, H, D, D]."""
        A = self.input_norm(density_matrix(query, padding_mask))
        rows = A.flatten(0, 1)  # as most quantised linears want it
        return residual_network(rows, self.metric_learner).view_as(A)

    def energy_curvature(self, A: torch.Tensor) -> DeductiveOutputs:
        """A_LM, A_P and G_LM from A, each [B, H, D, D]."""
        A_LM, A_P, G_LM = reference.power_law(
            A, self.metric_weight, self.metric_bias, self.exponent, self.energy_weight, self.energy_bias
        )
        return DeductiveOutputs(A, A_LM, A_P, G_LM)


class ConstantOperator(nn.Module):
    """G_LM as a stored tensor [H, D, D]: identity, random, transferred, or frozen from a learned operator.

    A trainable G_LM is a parameter, any other a buffer; both are saved and loaded under the same name.
    """

    G_LM: torch.Tensor

    def __init__(self, config: PldrConfig) -> None:
        super().__init__()
        shape = (config.num_attention_heads, config.head_dim, config.head_dim)
        _keep(self, "G_LM", torch.empty(shape), trainable=config.operator_trainable)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        state: OperatorState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DeductiveOutputs]:
        """Like `LearnedOperator.forward`; `padding_mask` and `state` have no effect on a constant."""
        return apply_operator(query, self.G_LM), key, DeductiveOutputs(None, None, None, self.G_LM[None])

    def factors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What multiplies queries, [H, D, R], and what multiplies keys before they are kept, likewise; None: nothing does."""
        return self.G_LM.detach(), None


class FactoredOperator(nn.Module):
    """A constant G_LM of low rank, left rightᵀ: queries and keys are attended with in r < D dimensions, and keys cached so.

    Attributes:
        left, right: [H, D, r], r the layer's rank; columns that a head of a smaller rank does not need are zero. Parameters
            where the operator is trainable, else buffers.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, config: PldrConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.operator_ranks is not None  # checked by the configuration
        shape = (config.num_attention_heads, config.head_dim, config.operator_ranks[layer_idx])
        _keep(self, "left", torch.empty(shape), trainable=config.operator_trainable)
        _keep(self, "right", torch.empty(shape), trainable=config.operator_trainable)

    @property
    def G_LM(self) -> torch.Tensor:
        """left rightᵀ, [H, D, D]."""
        return self.left @ self.right.transpose(-1, -2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        state: OperatorState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DeductiveOutputs]:
        """Like `ConstantOperator.forward`, but the query and key that it returns are [B, H, T, r].

        Raises:
            ValueError: a cache from elsewhere, whose keys have other dimensions.
        """
        kept = getattr(state, "keys", None)
        if kept is not None and kept.shape[-1] != self.right.shape[-1]:
            raise ValueError(
                f"past_key_values: the prefix has keys of {kept.shape[-1]} dimensions, a factored operator's have "
                f"{self.right.shape[-1]}; tune prefixes with the model that pldr.compress was given"
            )
        return query @ self.left, key @ self.right, DeductiveOutputs(None, None, None, self.G_LM[None])

    def head_ranks(self) -> list[int]:
        """The columns of each head that are not zero."""
        used = (self.left != 0).any(-2) & (self.right != 0).any(-2)
        return [int(count) for count in used.sum(-1)]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `ConstantOperator.factors`; here both are [H, D, r]."""
        return self.left.detach(), self.right.detach()


def _keep(module: nn.Module, name: str, tensor: torch.Tensor, *, trainable: bool) -> None:
    """Give a module a tensor: a parameter where it is trainable, else a buffer."""
    if trainable:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def make_operator(config: PldrConfig, layer_idx: int) -> LearnedOperator | ConstantOperator | FactoredOperator:
    if config.operator == "factored":
        return FactoredOperator(config, layer_idx)
    return LearnedOperator(config) if config.operator == "learned" else ConstantOperator(config)


def init_constant(operator: ConstantOperator | FactoredOperator, config: PldrConfig, *, has_weights: bool) -> None:
    """A G_LM as `operator_init` says: the identity (of a factored one, its nearest of lower rank), uniform or normal.

    Tensors that came with the weights stay as they are. Those that are to come with the weights are NaN till then.

    Args:
        has_weights: the weights have come.

    Raises:
        ValueError: the configuration says that G_LM comes with the weights, and it did not.
    """
    tensors = [operator.G_LM] if isinstance(operator, ConstantOperator) else [operator.left, operator.right]
    for tensor in tensors:
        if getattr(tensor, "_is_hf_initialized", False):
            continue
        if config.operator_init == "external" and not has_weights:
            init.constant_(tensor, float("nan"))
        elif config.operator_init == "external":
            raise ValueError(
                "operator_init='external': G_LM must come with the weights, and they hold none; build the model with "
                "operator_init='identity' and hand the tensor to pldr.freeze(model, G_LM=…)"
            )
        elif config.operator_init == "identity":
            init.copy_(tensor, torch.eye(*tensor.shape[1:], device=tensor.device))
        elif config.operator_init == "uniform":
            init.uniform_(tensor, 0.0, 1.0)
        else:
            # The product of two factors sums over r columns: so its entries have a variance of 1 as well.
            init.normal_(tensor, std=1.0 if len(tensors) == 1 else tensor.shape[-1] ** -0.25)


# --- freezing -------------------------------------------------------------------------------------------------------


def check_operator_tensor(G_LM: torch.Tensor | Sequence[torch.Tensor], config: PldrConfig) -> torch.Tensor:
    """A predefined G_LM as one float32 tensor [L, H, D, D], checked against a model's shape.

    Args:
        G_LM: [L, H, D, D], or [L, 1, H, D, D], or one [H, D, D] or [1, H, D, D] tensor a layer.
        config: the model that it is meant for.

    Raises:
        ValueError: another number of layers or heads, another head dimension, or a value that is not finite.
    """
    layers = [layer.detach() for layer in G_LM]
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"G_LM: has {len(layers)} layers, the model has {config.num_hidden_layers}")
    expected = (config.num_attention_heads, config.head_dim, config.head_dim)
    for index, layer in enumerate(layers):
        if not layer.is_floating_point():
            raise ValueError(f"G_LM: layer {index} holds {layer.dtype}, it must hold real floating-point numbers")
        if layer.dim() == 4 and layer.shape[0] == 1:
            layer = layers[index] = layer[0]
        if tuple(layer.shape) != expected:
            raise ValueError(
                f"G_LM: layer {index} has shape {tuple(layer.shape)}, the model needs [heads, head_dim, head_dim] = "
                f"{expected}"
            )
        if not bool(torch.isfinite(layer).all()):
            raise ValueError(f"G_LM: layer {index} holds NaN or infinite values")
    return torch.stack([layer.to(torch.float32) for layer in layers])


@torch.no_grad()
def average_operator(model: "PldrForCausalLM", prompts: Iterable[torch.Tensor]) -> torch.Tensor:
    """G_LM of a learned operator, averaged over prompts.

    Where G_LM does not depend on the input, any one prompt gives the same tensor; where it does, the mean is the
    least-squares constant for these prompts.

    Args:
        model: one with learned operators.
        prompts: token ids of one prompt each, [T] or [1, T]; no padding. A single [T] tensor is one prompt.

    Returns:
        [L, H, D, D], float32, on the CPU.

    Raises:
        ValueError: no prompts, an empty one, or a model without a learned operator.
    """
    if model.config.operator != "learned":
        raise ValueError("freeze: the model's operator is constant already; pass G_LM to exchange it")
    if isinstance(prompts, torch.Tensor) and prompts.dim() == 1:
        prompts = [prompts]
    total, count = None, 0
    was_training = model.training
    model.eval()
    try:
        for prompt in prompts:
            ids = torch.as_tensor(prompt, device=model.device)
            if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
                raise ValueError(f"freeze: a prompt must be token ids [T], got shape {tuple(ids.shape)}")
            ids = ids.reshape(1, -1)
            if ids.shape[1] == 0:
                raise ValueError("freeze: a prompt is empty; G_LM needs at least one token")
            layers = model.model(ids, use_cache=False, output_deductive_outputs=True).deductive_outputs
            G_LM = torch.stack([layer.G_LM[0] for layer in layers]).double().cpu()
            total, count = (G_LM if total is None else total + G_LM), count + 1
    finally:
        model.train(was_training)
    if total is None:
        raise ValueError("freeze: no prompts given; pass at least one, or G_LM")
    return (total / count).float()


def freeze(
    model: "PldrForCausalLM",
    prompts: Iterable[torch.Tensor] | torch.Tensor | None = None,
    *,
    G_LM: torch.Tensor | Sequence[torch.Tensor] | None = None,
    trainable: bool = False,
) -> "PldrForCausalLM":
    """Make the operator of `model` a constant, in place, and drop the network that computed it.

    Either `prompts` (the operator that the model itself computes for them) or `G_LM` (a tensor from elsewhere: the
    paper's v51Gi, a transferred or random operator). A constant or factored operator can be exchanged the same way.

    Args:
        model: with any operator.
        prompts: token ids, one [T] tensor a prompt; or [T] for a single one; or [B, T] without padding.
        G_LM: [L, H, D, D]; other accepted forms are those of `check_operator_tensor`.
        trainable: make the constant a parameter, so that training goes on with it (hand-off).

    Returns:
        The same model. Saved and loaded again, it has no metric learner at all.

    Raises:
        ValueError: not exactly one of `prompts` and `G_LM`, or a tensor that does not fit. The model is then as before.
    """
    if prompts is not None and G_LM is None:
        constant = average_operator(model, prompts)
    elif prompts is None and G_LM is not None:
        constant = check_operator_tensor(G_LM, model.config)
    else:
        raise ValueError("freeze: pass either prompts or G_LM")
    fields = {"operator": "constant", "operator_ranks": None, "operator_trainable": trainable}
    _exchange(model, fields, [{"G_LM": value} for value in constant])
    return model


def factor(
    model: "PldrForCausalLM", factors: Sequence[tuple[torch.Tensor, torch.Tensor]], *, trainable: bool = False
) -> "PldrForCausalLM":
    """Make the operator of `model` a product of two factors, in place; `pldr.compress` finds good ones.

    Args:
        model: with any operator.
        factors: of each layer left and right, [H, D, r] both: G_LM = left rightᵀ. r is a multiple of 8.
        trainable: make them parameters.

    Returns:
        The same model.

    Raises:
        ValueError: factors of other shapes, or with values that are not finite. The model is then as before.
    """
    config, shapes = model.config, [tuple(tensor.shape for tensor in pair) for pair in factors]
    ranks = [left[-1] for left, _ in shapes]
    config.check_ranks(ranks)
    for index, (rank, found) in enumerate(zip(ranks, shapes, strict=True)):
        expected = (config.num_attention_heads, config.head_dim, rank)
        if found != (expected, expected):
            raise ValueError(
                f"factors: layer {index} has shapes {found[0]} and {found[1]}, it must have {expected} twice"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in factors[index]):
            raise ValueError(f"factors: layer {index} holds NaN or infinite values")
    fields = {"operator": "factored", "operator_ranks": ranks, "operator_trainable": trainable}
    _exchange(model, fields, [{"left": left, "right": right} for left, right in factors])
    return model


def _exchange(model: "PldrForCausalLM", fields: dict[str, Any], tensors: Sequence[dict[str, torch.Tensor]]) -> None:
    """Give every layer a new operator: of a configuration with these fields, and with these tensors by name."""
    # A configuration of its own: whoever made this model from one may make others from it.
    shared, config = model.config, copy.deepcopy(model.config)
    for name, value in (fields | {"operator_init": "external"}).items():
        setattr(config, name, value)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    for index, (layer, values) in enumerate(zip(model.model.layers, tensors, strict=True)):
        attention = cast("PldrAttention", layer.self_attn)
        like = next(attention.q_proj.parameters())
        operator = make_operator(config, index).to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for name, value in values.items():
                getattr(operator, name).copy_(value)
        attention.operator = operator.train(model.training)


def stored_operator(model: "PldrForCausalLM") -> torch.Tensor:
    """G_LM of a model whose operator is constant or factored: [L, H, D, D], on the CPU."""
    operators = (module for module in model.modules() if isinstance(module, (ConstantOperator, FactoredOperator)))
    return torch.stack([operator.G_LM.detach().cpu() for operator in operators])
