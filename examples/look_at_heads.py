"""Which heads use their operator? Replaces G_LM of one head at a time by a multiple of the identity, with TransformerLens.

    pip install transformer-lens
    python examples/look_at_heads.py

With G_LM a multiple of the identity a head is one of ordinary attention. A line a layer, a number a head: the loss that this adds, in
thousandths of a nat per token, and how far G_LM is from that multiple, relative to its size.
"""

import torch

import pldr
from pldr.integrations.lens import bridge

TEXT = "Once upon a time there was a king who had three sons. The youngest of them went out into the world to seek his fortune."


def nearest_identity(G_LM: torch.Tensor) -> torch.Tensor:
    """[…, D, D] → the multiple of the identity that is nearest to each matrix."""
    mean = G_LM.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return mean * torch.eye(G_LM.shape[-1])


@torch.no_grad()
def main() -> dict[str, torch.Tensor]:
    tokenizer = pldr.load_tokenizer(pldr.STORIES)
    model = bridge(pldr.load_model(pldr.STORIES), tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    whole, cache = model.run_with_cache(ids, return_type="loss")
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    added, distance = torch.zeros(layers, heads), torch.zeros(layers, heads)
    for layer in range(layers):
        name = f"blocks.{layer}.attn.operator.hook_G"
        G_LM = cache[name][0]  # [H, D, D]
        distance[layer] = (G_LM - nearest_identity(G_LM)).norm(dim=(-2, -1)) / G_LM.norm(dim=(-2, -1))
        for head in range(heads):

            def exchange(G: torch.Tensor, hook: object, head: int = head) -> torch.Tensor:
                changed = G.clone()
                changed[:, head] = nearest_identity(G[:, head])
                return changed

            added[layer, head] = model.run_with_hooks(ids, return_type="loss", fwd_hooks=[(name, exchange)]) - whole
    print(f"loss {whole:.4f} nats per token")
    for layer in range(layers):
        losses = " ".join(f"{1000 * value:7.2f}" for value in added[layer].tolist())
        print(
            f"layer {layer}: added {losses}   distance {' '.join(f'{value:.2f}' for value in distance[layer].tolist())}"
        )
    return {"loss": whole, "added": added, "distance": distance}


if __name__ == "__main__":
    main()
