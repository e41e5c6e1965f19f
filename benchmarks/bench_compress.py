"""What keys in fewer dimensions cost: loss and greedy tokens against bytes of the KV-cache.

    python benchmarks/bench_compress.py [MODEL] [--data FILES] [--passages 32] [--train FILES] [--g-lm FILE] [--output FILE]

Of the model: the ranks that the bounds of `pldr compress` allow; every rank, in all layers alike, by factors weighted with
moments of queries and keys, by ones centred on the mean key (softmax does not see what is common to all keys), and by plain
ones; and values in fewer dimensions, through the output projection; factors trained on. Of attention: its time by dimensions of keys. Of a G_LM by itself: the ranks that keep the relative
error of scores below 1%, for queries and keys that are standard normal, which favours no direction.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from conditions import conditions, record
from torch.nn import functional as F

from pldr import HELD_OUT, STORIES, compress, load_predefined_G
from pldr.checkpoints.load import load_with_tokenizer
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.evaluation.modes import frozen_copy
from pldr.operator import factor, stored_operator
from pldr.study.certify import interval_of_mean, spread_passages
from pldr.study.compress import factors_of, moments_of, read, root_and_inverse

CALIBRATION = 8


class Measured:
    """Loss and greedy tokens of changed forms of a frozen model, against its own, on held-out passages."""

    def __init__(self, frozen, held_out):
        self.frozen, self.before = frozen, read(frozen, held_out)

    def __call__(self, name, form, keys, values):
        """`keys`, `values`: their dimensions, layer by layer."""
        after = read(form, self.before.passages)
        differences = after.losses - self.before.losses
        whole = 2 * self.frozen.config.head_dim * len(keys)
        row = {
            "name": name, "keys": keys, "values": values, "kv_share": (sum(keys) + sum(values)) / whole,
            "loss_difference": float(differences.mean()),
            "loss_interval": interval_of_mean(differences.tolist()),
            "agreement": float((after.greedy == self.before.greedy).double().mean()),
        }  # fmt: skip
        print(f"{name:40} {row['kv_share']:6.3f} {row['loss_difference']:+.1e} {row['loss_interval'][1]:+.1e} "
              f"{row['agreement']:.3%}", flush=True)  # fmt: skip
        return row


@torch.no_grad()
def means_and_outputs(model, passages):
    """Mean key [L, H, D]; mean [L, M] and covariance [L, M, M] of what reaches the output projections; float64."""
    keys, outputs, handles = {}, {}, []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        handles.append(
            attention.operator.register_forward_pre_hook(
                lambda module, arguments, index=index: keys.setdefault(index, []).append(
                    arguments[1].double().mean((0, 2))
                )
            )
        )
        handles.append(
            attention.o_proj.register_forward_pre_hook(
                lambda module, arguments, index=index: outputs.setdefault(index, []).append(arguments[0].double()[0])
            )
        )
    for ids in passages.split(1):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    layers = range(len(model.model.layers))
    read = [torch.cat(outputs[index]) for index in layers]
    return (
        torch.stack([torch.stack(keys[index]).mean(0) for index in layers]),
        torch.stack([y.mean(0) for y in read]), torch.stack([y.T.cov() for y in read]),
    )  # fmt: skip


@torch.no_grad()
def narrow_values(model, layer, size, mean, covariance):
    """Values of `size` dimensions in one layer, in place: what the output projection sees of them is kept as far as it can.

    Values of each head keep the subspace that matters most for the output; the output projection is then the least-squares
    one for what all heads kept, and its bias takes the mean. (Written as a product of the width that there was, which
    changes nothing in the numbers.)
    """
    head_dim, projection = model.config.head_dim, model.model.layers[layer].self_attn.o_proj
    weight = projection.weight.double()
    kept = []
    for part in torch.arange(len(weight)).split(head_dim):
        root, inverse = root_and_inverse(covariance[part][:, part])
        kept.append(inverse @ torch.linalg.svd(root @ weight[:, part].T)[0][:, :size])
    narrow = torch.block_diag(*kept)
    fitted = torch.linalg.solve(narrow.T @ covariance @ narrow, narrow.T @ covariance @ weight.T)
    new = (narrow @ fitted).T
    projection.bias += (weight - new) @ mean
    projection.weight.copy_(new)


def trained(frozen, pairs, rows, rate=1e-3):
    """Factors trained on towards the frozen model's distribution, in steps of four of the rows [N, T], once through them."""
    form = factor(copy.deepcopy(frozen), pairs, trainable=True)
    parameters = [p for name, p in form.requires_grad_(False).named_parameters() if ".operator." in name]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=rate)
    batches = rows.split(4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 10) * (1 - n / len(batches)))
    for ids in batches:
        with torch.no_grad():
            aim = frozen(ids, use_cache=False).logits.log_softmax(-1)
        found = form(ids, use_cache=False).logits.log_softmax(-1)
        F.kl_div(found.flatten(0, 1), aim.flatten(0, 1), log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return form


def further(frozen, layers, ranks, tokenizer, measure, data, steps):
    """One step of eight below the ranks of the widest layers: by singular vectors, and trained on."""
    lower = [rank - 8 if rank == max(ranks) else rank for rank in ranks]
    pairs = [layer.cut(rank) for layer, rank in zip(layers, lower, strict=True)]
    rows = read_passages(Source(data), tokenizer, 256, 4 * steps)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    whole = [frozen.config.head_dim] * len(ranks)
    for name, form in (("svd", factor(copy.deepcopy(frozen), pairs)), ("trained", trained(frozen, pairs, rows))):
        yield measure(f"{name} keys {lower}", form, lower, whole)


def of_the_model(arguments):
    stored, tokenizer = load_with_tokenizer(arguments.model)
    rows = spread_passages(Source(arguments.data), tokenizer, stored, arguments.passages + CALIBRATION, None)
    calibration, held_out = rows[:CALIBRATION], rows[CALIBRATION:]
    result = compress(stored, tokenizer=tokenizer, calibration=arguments.data, passages=arguments.passages)
    print(result, flush=True)
    frozen = frozen_copy(stored, calibration)
    G_LM, moments = stored_operator(frozen), moments_of(frozen, calibration)
    mean_key, mean, covariance = means_and_outputs(frozen, calibration)
    centred = moments.key - mean_key[..., :, None] * mean_key[..., None, :]
    ways = {
        "weighted": [factors_of(*layer) for layer in zip(G_LM, *moments, strict=True)],
        "centred": [factors_of(*layer) for layer in zip(G_LM, moments.query, centred, strict=True)],
        "plain": [factors_of(G) for G in G_LM],
    }
    measure, dims = Measured(frozen, held_out), frozen.config.head_dim
    whole, rows = [dims] * len(G_LM), []
    print(f"{'':40} {'KV':>6} loss    upper    greedy")
    for name, layers in ways.items():
        for ranks in [*([rank] * len(layers) for rank in range(8, dims, 8)), result.ranks]:
            form = factor(copy.deepcopy(frozen), [layer.cut(rank) for layer, rank in zip(layers, ranks, strict=True)])
            rows.append(measure(f"{name} keys {ranks}", form, ranks, whole))
    narrowed = []
    for layer in range(len(G_LM)):
        for size in range(8, dims, 8):
            form = copy.deepcopy(frozen)
            narrow_values(form, layer, size, mean[layer], covariance[layer])
            sizes = [size if index == layer else dims for index in range(len(G_LM))]
            narrowed.append(measure(f"values of layer {layer}: {size}", form, whole, sizes))
    pairs = [layer.cut(rank) for layer, rank in zip(ways["weighted"], result.ranks, strict=True)]
    for size in range(dims - 8, 0, -8):
        # Where values of this size alone are within the bound.
        layers = [
            n for n in range(len(G_LM)) if narrowed[n * (dims // 8 - 1) + size // 8 - 1]["loss_interval"][1] <= 1e-4
        ]
        form = factor(copy.deepcopy(frozen), pairs)
        for layer in layers:
            narrow_values(form, layer, size, mean[layer], covariance[layer])
        sizes = [size if index in layers else dims for index in range(len(G_LM))]
        rows.append(measure(f"both, values {size} in layers {layers}", form, result.ranks, sizes))
    if arguments.train:
        rows += further(frozen, ways["weighted"], result.ranks, tokenizer, measure, arguments.train, arguments.steps)
    return {"compress": result.to_json(), "forms": rows, "values": narrowed}


def of_the_operator(file):
    """Ranks for a relative error of scores below 1%, by factors and then measured on queries and keys that are drawn."""
    layers = [factors_of(G) for G in load_predefined_G(file)]
    dims = layers[0].left.shape[1]
    ranks = [(layer.errors < 0.01 * layer.errors[:, :1]).double().argmax(1) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1024, dims, generator=generator, dtype=torch.float64)
    worst = 0.0
    for layer, head_ranks in zip(layers, ranks, strict=True):
        for left, right, rank in zip(layer.left, layer.right, head_ranks, strict=True):
            scores = query @ left @ right.T @ key.T
            error = scores - query @ left[:, :rank] @ right[:, :rank].T @ key.T
            worst = max(worst, float(error.norm() / scores.norm()))
    stored = [
        next(r for r in range(8, dims + 1, 8) if layer.errors[:, r].norm() < 0.01 * layer.errors[:, 0].norm())
        for layer in layers
    ]
    found = {
        "head_dim": dims, "head_ranks": [layer.tolist() for layer in ranks], "worst_error": worst,
        "mean_head_rank": float(torch.cat(ranks).double().mean()), "stored_ranks": stored,
        "kv_share": (sum(stored) / len(stored) + dims) / (2 * dims),
    }  # fmt: skip
    print(f"{file}: mean rank of the heads {found['mean_head_rank']:.1f} of {dims}, stored {stored}")
    return found


def of_attention():
    """Median milliseconds of scaled dot-product attention at the published 110M shape, by dimensions of keys."""
    times = {}
    for name, new in (("prefill of 512 tokens", 512), ("one token after 511", 1)):
        times[name] = {}
        for dims in (64, 32, 16):
            query, key, value = (
                torch.randn(1, 14, new, dims),
                torch.randn(1, 14, 512, dims),
                torch.randn(1, 14, 512, 64),
            )
            runs = []
            for _ in range(30):
                start = time.perf_counter()
                F.scaled_dot_product_attention(query, key, value, is_causal=new > 1)
                runs.append(1e3 * (time.perf_counter() - start))
            times[name][dims] = statistics.median(runs)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=STORIES)
    parser.add_argument("--data", nargs="+", default=[str(HELD_OUT)])
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--train", nargs="+", default=[], help="texts to train factors on with")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--g-lm", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {
        "benchmark": "compress",
        "passages": arguments.passages,
        "data": [Path(name).name for name in arguments.data],
    }
    if arguments.g_lm:
        result["operator"] = {"file": arguments.g_lm.name, **of_the_operator(arguments.g_lm)}
    result |= {"attention_ms": of_attention()} | of_the_model(arguments) | conditions()
    result["compress"]["certificate"]["data"]["sources"] = result["data"]  # names, wherever they lie
    record(result, arguments.output)


if __name__ == "__main__":
    main()
