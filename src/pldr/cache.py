"""KV-cache and G-cache, on transformers' own cache classes.

Beside its keys and values, a layer with a learned operator keeps one more tensor of shape [batch, heads, D, D], the
*operator state*: G_LM where the G-cache is on, or A, from which G_LM follows, where it is off (the published
implementation's semantics: with a KV-cache, A and so G_LM come from the prompt). The state is filled by the first
forward into an empty cache and read by every later one.

`DynamicCache(config=model.config)` and `StaticCache(config=model.config, …)` build these layers by themselves, because
the configuration's `layer_types` names them. A constant operator has no state: its models use the library's layers.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from pldr.configuration_pldr import PLGA_LAYER_TYPE, PldrConfig


class OperatorState:
    """Mixed into a cache layer: the tensor that a learned operator keeps between forwards.

    Attributes:
        operator_state: [batch, heads, D, D] where `has_operator_state`, else not to be read.
        has_operator_state: False until the first forward into an empty cache.
        caches_g: True where the state is G_LM, False where it is A.

    The state is as small as D keys and is read in every layer, so it stays on its device when K and V are offloaded.
    """

    operator_state: torch.Tensor | None = None
    has_operator_state: bool = False
    caches_g: bool = True

    def fill_operator_state(self, state: torch.Tensor) -> None:
        self.operator_state = state
        self.has_operator_state = True

    def _replace_operator_state(self, state: torch.Tensor) -> None:
        self.operator_state = state

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.has_operator_state = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.has_operator_state:
            assert self.operator_state is not None
            self._replace_operator_state(self.operator_state.index_select(0, beam_idx.to(self.operator_state.device)))


class _BatchEditable(OperatorState):
    """The operations that only caches of changing size have."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens; G_LM belongs to the prompt and stays, unless nothing of the sequence is left."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.get_seq_length() == 0:  # type: ignore[attr-defined]
            self.has_operator_state = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.has_operator_state:
            assert self.operator_state is not None
            self._replace_operator_state(self.operator_state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.has_operator_state:
            assert self.operator_state is not None
            self._replace_operator_state(self.operator_state[indices, ...])


class DynamicPlgaLayer(_BatchEditable, DynamicLayer):
    """K, V and operator state of one layer; K and V grow with the sequence."""

    _layer_type = PLGA_LAYER_TYPE

    def reset(self) -> None:
        # Dropped, because `update` grows them; some transformers 5 releases would keep them as zeros.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()


class StaticPlgaLayer(OperatorState, StaticLayer):
    """K, V and operator state of one layer at fixed addresses, for a compiled decode step."""

    _layer_type = PLGA_LAYER_TYPE

    def fill_operator_state(self, state: torch.Tensor) -> None:
        if self.operator_state is None or self.operator_state.shape != state.shape:
            self.operator_state = torch.empty_like(state, memory_format=torch.contiguous_format)
            if not torch.compiler.is_compiling():  # which knows no such call; its graphs hold what they make themselves
                torch._dynamo.mark_static_address(self.operator_state)
        self._replace_operator_state(state)
        self.has_operator_state = True

    def _replace_operator_state(self, state: torch.Tensor) -> None:
        assert self.operator_state is not None
        self.operator_state.copy_(state)


class _NoKeysOrValues(CacheLayerMixin):
    """A layer that keeps nothing of K and V: every forward sees the whole sequence."""

    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a G-cache without a KV-cache stores no keys")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        pass


class OperatorOnlyLayer(_BatchEditable, _NoKeysOrValues):
    """The G-cache alone, without a KV-cache."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to remove: the next forward is given the sequence that it should see."""


def make_cache(
    config: PldrConfig, *, kv: bool = True, g: bool = True, max_cache_len: int | None = None
) -> Cache | None:
    """The cache for one of the four modes of the published implementation.

    Args:
        config: the model's configuration.
        kv: keep keys and values.
        g: keep G_LM of the prompt. A constant operator has no use for it, and the flag makes no difference there.
        max_cache_len: make a static cache for this many tokens (needs `kv`).

    Returns:
        A cache to pass as `past_key_values`; None where nothing is to be kept. Mode by mode: neither recomputes
        everything at every step; KV keeps A from the prompt; G keeps G_LM and recomputes attention over the whole
        sequence; KV and G keep both.

    Raises:
        ValueError: a static cache without keys and values, or longer than the context.
    """
    if max_cache_len is not None and max_cache_len > config.max_position_embeddings:
        raise ValueError(
            f"max_cache_len={max_cache_len} is longer than the context length "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    if not kv:
        if max_cache_len is not None:
            raise ValueError("max_cache_len applies to a KV-cache: pass kv=True")
        if not g or config.operator != "learned":
            return None
        return Cache(layers=[OperatorOnlyLayer() for _ in range(config.num_hidden_layers)])
    cache = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
    set_g_cache(cache, g)
    return cache


def set_g_cache(cache: Cache, enabled: bool) -> None:
    """Switch the G-cache of an empty cache on or off (off: A is kept in its place)."""
    for layer in cache.layers:
        if isinstance(layer, OperatorState):
            layer.caches_g = enabled


def operator_state(cache: Cache | None, layer_idx: int) -> OperatorState | None:
    """The place of one layer's operator state, where the cache has one."""
    layer = cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None
    return layer if isinstance(layer, OperatorState) else None


def check_operator_cache(cache: Cache, num_layers: int, batch: int) -> None:
    """
    Raises:
        ValueError: the cache has no place for the operator state, so that later steps would compute G_LM from the
            newest token alone, or it holds that of another batch.
    """
    for index in range(num_layers):
        state = operator_state(cache, index)
        if state is None:
            raise ValueError(
                "past_key_values: this cache has no place for G_LM; make it with pldr.make_cache(model.config) or "
                "DynamicCache(config=model.config)"
            )
        if state.has_operator_state:
            assert state.operator_state is not None
            if state.operator_state.shape[0] != batch:
                raise ValueError(
                    f"past_key_values: holds G_LM of {state.operator_state.shape[0]} sequences, the input has {batch}"
                )
