"""Who sees whom in a forward: the masks of attention and of G_LM, positions, and sequences that are packed into one row.

Shapes: B batch, T tokens of this forward, S tokens that attention sees, N packed sequences.
"""

import sys
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask, find_packed_sequence_indices
from transformers.utils import is_tracing
from transformers.utils.generic import is_flash_attention_requested

from pldr.configuration_pldr import ATTENTIONS, FLASH, PldrConfig


def create_masks(
    config: PldrConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """The two masks of a forward: "attention" (None where causality is all) and "padding" for G_LM ([B, T])."""
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    attention = (
        None
        if _is_plainly_causal(config, attention_mask, past_key_values, position_ids)
        else create_causal_mask(**arguments)
    )
    if config.operator != "learned" or attention_mask is None or attention_mask.ndim != 2:
        return {"attention": attention, "padding": None}
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    arguments["attention_mask"] = _window(attention_mask, past_length, inputs_embeds.shape[1])
    return {"attention": attention, "padding": create_recurrent_attention_mask(**arguments)}


def _is_plainly_causal(config: PldrConfig, *others: Any) -> bool:
    """Whether SDPA's own causal mask is all, while a CUDA graph is recorded: transformers would then make a tensor of it."""
    if config._attn_implementation != "sdpa" or any(other is not None for other in others):
        return False
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def positions_of(
    config: PldrConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The positions of a forward's tokens, [B or 1, T]: as given, or counted over the tokens that are not padding.

    Raises:
        TooLong: a sequence is longer than the context; rows may be, where they hold padding or several sequences.
        ValueError: the mask leaves out earlier tokens.
    """
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    tokens, mask = inputs_embeds.shape[1], attention_mask
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        mask = None
    # A static cache counts on the device; its size is checked when it is made. An engine that brings attention of its own
    # checks its requests.
    checked = isinstance(past_length, int) and config._attn_implementation in (*ATTENTIONS, *FLASH)
    if checked and mask is not None and mask.shape[1] < past_length + tokens:
        raise ValueError(
            f"attention_mask: covers {mask.shape[1]} tokens, but there are {past_length} earlier and {tokens} new ones"
        )
    if position_ids is None and mask is None:
        if checked:
            _check_context(config, past_length + tokens)
        return torch.arange(tokens, device=inputs_embeds.device)[None] + past_length
    if position_ids is None:
        position_ids = _window((mask.long().cumsum(-1) - 1).clamp(min=0), past_length, tokens)
    # To look at positions that are not on the CPU is to wait for them.
    is_worth_it = position_ids.device.type == "cpu" or past_length + tokens > config.max_position_embeddings
    if checked and is_worth_it and position_ids.numel() and not is_tracing(position_ids):
        _check_context(config, int(position_ids.max()) + 1)
    return position_ids


def _check_context(config: PldrConfig, longest: int) -> None:
    if longest > config.max_position_embeddings:
        raise too_long(
            f"input of {longest} tokens is longer than the context length "
            f"max_position_embeddings={config.max_position_embeddings}"
        )


class TooLong(ValueError):
    """A sequence is longer than the context."""


def too_long(message: str) -> TooLong:
    """The error; in a process that runs a server made with Starlette, as `transformers serve` is, one that it answers with 400.

    No handler has to be put into the server for it, so that a model's own code beside its weights has it, too.
    """
    starlette = sys.modules.get("starlette.exceptions")
    if starlette is None:
        return TooLong(message)
    answer = {"status_code": 400, "detail": message, "headers": None, "__str__": ValueError.__str__}
    return type("TooLong", (TooLong, starlette.HTTPException), answer)(message)


def _window(values: torch.Tensor, past_length: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """The columns of the new tokens, [B, T], out of `values` [B, at least past_length + T]."""
    return values.index_select(1, torch.arange(tokens, device=values.device) + past_length)


# --- sequences packed into rows -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Where each token of rows that hold several sequences belongs.

    Attributes:
        sequence, place: [B, T], the token's sequence, from 0 to N - 1, and its place in it.
        apart: whether they are computed one a row: with a learned operator, for each has a G_LM of its own; and several rows
            with FlashAttention, for which transformers cuts one.
    """

    sequence: torch.Tensor
    place: torch.Tensor
    apart: bool

    def one_a_row(self, values: torch.Tensor) -> torch.Tensor:
        """[B, T, …] → [N, longest, …], zeros behind the shorter ones."""
        rows, columns = (int(index.max()) + 1 for index in self[:2])
        return values.new_zeros(rows, columns, *values.shape[2:]).index_put(self[:2], values)

    def as_given(self, values: torch.Tensor) -> torch.Tensor:
        """[N, longest, …] → [B, T, …]."""
        return values[self[:2]]


def find_packed(config: PldrConfig, position_ids: torch.Tensor, batch: int) -> Packed | None:
    """The sequences of rows in which positions begin anew, as transformers and TRL pack them; None: one each.

    Raises:
        ValueError: while compiling, which can not look at them, for a learned operator: its G_LM would be that of a whole row.
    """
    if is_tracing(position_ids):
        if config.operator == "learned" and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            raise ValueError(
                "position_ids: may pack sequences, which a compiled forward can not see; pass attention_mask as well "
                "(ones, if there is one sequence a row), or do not compile"
            )
        return None
    of_row = find_packed_sequence_indices(position_ids.expand(batch, -1))
    if of_row is None:
        return None
    begins = of_row.diff(dim=-1, prepend=of_row[:, :1] - 1) != 0
    columns = torch.arange(of_row.shape[1], device=of_row.device).expand_as(of_row)
    first = torch.where(begins, columns, 0).cummax(-1).values
    apart = config.operator == "learned" or (batch > 1 and is_flash_attention_requested(config))
    return Packed((begins.flatten().cumsum(0) - 1).view_as(of_row), columns - first, apart)
