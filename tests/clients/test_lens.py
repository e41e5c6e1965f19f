"""TransformerLens: our models in its bridge. notebooks/look-at-heads.ipynb, which `make test-docs` runs, uses it."""

from importlib.metadata import entry_points

import pytest
import torch

pytest.importorskip("transformer_lens")
from helpers import assert_close
from pldr import deductive_outputs, load_model, load_tokenizer
from pldr.integrations.lens import PldrArchitectureAdapter, bridge

TEXT = "Once upon a time there was a king"


@torch.no_grad()
def test_hooks(row, operator, model_folder):
    """Logits are the model's; q, scores and G_LM are seen, and what hooks return is what the model goes on with."""
    row("transformer-lens", "hooks on q, scores and G: `run_with_cache`, `run_with_hooks`", operator)
    model, tokenizer = load_model(model_folder(operator)), load_tokenizer(model_folder(operator))
    lens = bridge(load_model(model_folder(operator)), tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = model(ids).logits
    logits, cache = lens.run_with_cache(ids)
    assert_close(logits, expected, max_error=1e-4)
    G_LM = deductive_outputs(model, ids).G_LM  # [L, B or 1, H, D, D]
    name = "blocks.2.attn.operator.hook_G"
    assert_close(cache[name], G_LM[2], max_error=1e-5)
    q, k = (cache[f"blocks.2.attn.operator.hook_{kind}"] for kind in "qk")
    scores, length = cache["blocks.2.attn.hook_attn_scores"], ids.shape[1]
    seen = torch.ones(length, length).tril().bool()
    assert_close(scores[..., seen], (q @ G_LM[2] @ k.mT / q.shape[-1] ** 0.5)[..., seen], max_error=1e-4)
    assert_close(cache["blocks.2.attn.hook_pattern"].sum(-1), torch.ones(1, scores.shape[1], length), max_error=1e-5)
    # The same G_LM again changes nothing; without it, everything attends evenly.
    assert_close(lens.run_with_hooks(ids, fwd_hooks=[(name, lambda G, hook: G.clone())]), expected, max_error=1e-4)
    even = lens.run_with_hooks(ids, fwd_hooks=[(name, lambda G, hook: torch.zeros_like(G))])
    flat = lens.run_with_hooks(
        ids, fwd_hooks=[("blocks.2.attn.hook_attn_scores", lambda s, hook: torch.where(seen, 0.0, -1e9).expand_as(s))]
    )
    assert_close(even, flat, max_error=1e-4)
    assert (even - expected).abs().max() > 1e-2
    tokens = lens.generate(ids, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert tokens.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist()


def test_the_entry_point():
    (found,) = [
        entry for entry in entry_points(group="transformer_lens.architectures") if entry.name == "PldrForCausalLM"
    ]
    assert found.load() is PldrArchitectureAdapter
