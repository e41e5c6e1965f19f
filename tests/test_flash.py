"""FlashAttention through transformers, without its package and a GPU: its two functions, in plain PyTorch, in their places.

All that stands between our model and them is transformers' own: what is causal, the scale, how padding is taken out and rows that
hold several sequences are cut. Nothing here is about speed, or about how the kernels themselves round.
"""

import sys
from types import ModuleType

import pytest
import torch

from helpers import assert_close
from pldr import make_cache

calls = []


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    """q [B, T, H, D], k and v [B, S, H, D] → [B, T, H, D]; the last query sees the last key."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "the kernels have one width"
    scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if causal:
        tokens, seen = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(tokens, seen).tril(seen - tokens).bool(), -torch.inf)
    calls.append(("whole", q.shape[1], causal))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """The same for sequences one behind another: q, k and v [tokens of all, H, D]."""
    lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(lengths[0]), max(lengths[1])) == (max_seqlen_q, max_seqlen_k)
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    attended = [flash_attn_func(*(x[None] for x in part), softmax_scale, causal)[0] for part in parts]
    del calls[-len(attended) :]
    calls.append(("cut", *lengths[0]))
    return torch.cat(attended)


@pytest.fixture
def flash(monkeypatch):
    """`flash(model)`: the model as `attn_implementation="flash_attention_3"` would have it."""
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, package.__name__, package)
    calls.clear()

    def changed(model):
        model.config._attn_implementation = "flash_attention_3"
        return model

    yield changed
    # transformers keeps the functions that it found.
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._loaded_implementation", None)


@pytest.fixture(params=["learned", "constant", "factored"])
def model(request, small_model):
    fields = {} if request.param == "learned" else {"operator_init": "normal"}
    fields |= {"operator_ranks": [8, 16]} if request.param == "factored" else {}
    return small_model(operator=request.param, **fields)


@torch.no_grad()
def test_without_padding(model, ids, flash):
    expected = model(ids).logits
    assert_close(flash(model)(ids).logits, expected, max_error=1e-5)
    assert set(calls) == {("whole", 16, True)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_padding_is_taken_out(model, ids, flash, side):
    mask = torch.ones_like(ids)
    mask[1, {"left": slice(5), "right": slice(11, None), "within": slice(4, 9)}[side]] = 0
    expected = model(ids, attention_mask=mask).logits
    logits = flash(model)(ids, attention_mask=mask).logits
    assert_close(logits[mask.bool()], expected[mask.bool()], max_error=1e-5)
    assert set(calls) == {("cut", 16, 11, 16)}


@torch.no_grad()
def test_steps_after_a_cache(model, ids, flash):
    """One token, and several, as a draft's are checked."""

    def steps():
        cache = make_cache(model.config)
        return torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 3, 1, 2], dim=1)], dim=1
        )

    expected = steps()
    flash(model)
    assert_close(steps(), expected, max_error=1e-5)
    assert set(calls) == {("whole", tokens, True) for tokens in (9, 1, 3, 2)}


@torch.no_grad()
def test_a_padded_batch_generates_the_same(model, ids, flash):
    mask = torch.ones_like(ids)
    mask[0, :6], mask[2, :1] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert flash(model).generate(ids, **settings).tolist() == expected.tolist()
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_are_cut(model, flash, rows):
    ids = torch.randint(4, 97, (rows, 34), generator=torch.Generator().manual_seed(6))
    lengths = [(5, 11, 18), (20, 1, 13)][:rows]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    expected = model(ids, position_ids=positions).logits
    assert_close(flash(model)(ids, position_ids=positions).logits, expected, max_error=1e-5)
    if model.config.operator == "learned" or rows == 2:  # one sequence a row, the rest of it padding
        assert {call[0] for call in calls} == {"cut"}
    else:
        assert set(calls) == {("cut", *lengths[0])}


def test_gradients(model, ids, flash):
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    flash(model)(ids, labels=ids).loss.backward()
    for gradient, parameter in zip(expected, filter(lambda one: one.requires_grad, model.parameters()), strict=True):
        # The softmax's sums are in another order, and what differs goes through the power law's steep slopes.
        assert_close(parameter.grad, gradient, rms_ratio=1e-3)


def test_the_context_is_kept(model, flash):
    with pytest.raises(ValueError, match="65 tokens is longer than the context length max_position_embeddings=64"):
        flash(model)(torch.full((1, 65), 5))
