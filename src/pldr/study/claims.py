"""The paper's claims as experiments: each trains what it needs, measures, and finds for or against the claim.

A claim is a function of a `Lab`, which holds the size, the data and the folder, trains runs (several at once, a finished one
only once) and measures trained models. What is found is reported whether it bears the paper out or not.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pldr.cache import make_cache
from pldr.checkpoints.load import usable_device
from pldr.data.rows import source_of
from pldr.data.sources import BadRows, names_of, read_pieces
from pldr.deductive import deductive_outputs, log_determinant
from pldr.evaluation.modes import MODES, OperatorModes, frozen_copy
from pldr.files import require
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import STORIES
from pldr.operator import DeductiveOutputs, stored_operator
from pldr.recipe import DataRecipe
from pldr.study.fidelity import fidelity
from pldr.study.invariance import invariance
from pldr.study.lab import INVARIANT_LOSS, SIZES, Finding, Lab, Verdict, default_data, mean_loss, table
from pldr.study.operators import ablation, handoff
from pldr.study.sdpa import sdpa
from pldr.study.significance import LEVEL, paired
from pldr.study.timing import generations

# Log-likelihoods of an ending, some 16 tokens, that differ by no more than this (nats) count as the same.
SAME_LIKELIHOOD = 1e-3


# --- claims about one trained model ---------------------------------------------------------------------------------


@torch.no_grad()
def caching(lab: Lab) -> Finding:
    """Deductive outputs, texts and choices before and after caching, and the time of each kind of cache."""
    model, tokenizer = lab.learned_model("caching")
    rows = lab.passages(tokenizer)
    half = rows.shape[1] // 2
    outputs = _outputs_around_caching(model, rows, half)
    kinds = [(name, quantity) for name in DeductiveOutputs._fields for quantity in ("rms", "log10_determinant")]
    before, after, anew = ([outputs[when][name][quantity] for name, quantity in kinds] for when in outputs)
    same = max(abs(two - one) for one, two in zip(before, after, strict=True))

    modes = OperatorModes(model, rows[:1])
    choices = _choices(modes, rows, half)
    timed = generations(modes, tokenizer, tokenizer.decode(rows[0, : min(64, half)]), min(64, half))
    identical = all(row.generation.token_ids == timed[0].generation.token_ids for row in timed)
    seconds = {row.cache: 1 / row.tokens_per_second for row in timed}
    largest = max(choices["largest"].values())
    confirmed = same < 1e-12 and identical and choices["differ"] == 0 and largest <= SAME_LIKELIHOOD
    return Finding(
        "Caching changes nothing",
        Verdict.CONFIRMED if confirmed else Verdict.NOT_CONFIRMED,
        f"what is cached keeps RMS and determinant to {same:.0e}, the greedy text is "
        + ("the same" if identical else "not the same")
        + f" in all modes, {choices['differ']} of {choices['questions']} choices differ, log-likelihoods by at most "
        f"{largest:.1e}",
        [
            "Root mean square and determinant of each deductive output, averaged over layers, heads and "
            f"{len(rows)} held-out passages: from the first half of each passage; from the cache after the second half was "
            "read with it; and, for comparison, the change if they are worked out anew from the whole passage.",
            table(
                ["tensor", "quantity", "before caching", "after caching", "difference", "anew, whole passage"],
                [
                    [name, quantity.replace("_", " "), f"{one:.15f}", f"{two:.15f}", f"{abs(two - one):.1e}",
                     f"{abs(three - one):.1e}"]
                    for (name, quantity), one, two, three in zip(kinds, before, after, anew, strict=True)
                ],
            ),
            *_choice_section(choices),
            "Inference time, greedy, one sequence.",
            table(
                ["cache", "ms per token", "× no cache"],
                [[cache, f"{1e3 * value:.2f}", f"{seconds['no cache'] / value:.1f}"] for cache, value in seconds.items()],
            ),
        ],
        outputs | {"choices": choices, "seconds_per_token": seconds, "same_text": identical},
        subject=lab.model.name,
    )  # fmt: skip


def _outputs_around_caching(
    model: PldrForCausalLM, rows: torch.Tensor, half: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of the deductive outputs "before", "after" and "anew".

    Of the first half of each passage; of what is in the cache after the second half was read with it; and of the whole
    passage. One passage at a time throughout: a GPU rounds batches of other sizes otherwise.
    """
    layers: Any = model.model.layers
    found: dict[str, list[DeductiveOutputs]] = {"before": [], "after": [], "anew": []}
    for row in rows:
        found["before"].append(deductive_outputs(model, row[None, :half]))
        found["anew"].append(deductive_outputs(model, row[None]))
        kept = {}
        for kind, g in (("A", False), ("G_LM", True)):
            cache: Any = make_cache(model.config, g=g)
            model(row[None, :half], past_key_values=cache)
            model(row[None, half:], past_key_values=cache)
            kept[kind] = [layer.operator_state for layer in cache.layers]
        from_A = [layer.self_attn.operator.energy_curvature(A) for layer, A in zip(layers, kept["A"], strict=True)]
        cached = DeductiveOutputs(*(torch.stack(kind) for kind in zip(*from_A, strict=True)))
        found["after"].append(cached._replace(G_LM=torch.stack(kept["G_LM"])))
    return {
        when: _statistics(DeductiveOutputs(*(torch.cat(kind, 1) for kind in zip(*outputs, strict=True))))
        for when, outputs in found.items()
    }


def _statistics(outputs: DeductiveOutputs) -> dict[str, dict[str, float]]:
    found = {}
    for name in DeductiveOutputs._fields:
        X = getattr(outputs, name).double()
        _, log = log_determinant(X)
        finite = log[torch.isfinite(log)]  # an exactly singular matrix has no logarithm
        found[name] = {
            "rms": float(X.square().mean((-1, -2)).sqrt().mean()),
            "log10_determinant": float(finite.mean()) if len(finite) else -math.inf,
            "singular": int(log.numel() - len(finite)),
        }
    return found


@torch.no_grad()
def _choices(modes: OperatorModes, rows: torch.Tensor, half: int) -> dict[str, Any]:
    """Log-likelihood of four second halves after each first half, in each mode."""
    end = half + min(16, half)
    scores: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for index, row in enumerate(rows):
        endings = torch.stack([rows[(index + shift) % len(rows), half:end] for shift in range(4)])
        whole = torch.cat((row[:half].expand(4, -1), endings), 1)
        for mode in MODES:
            log_probabilities = modes.logits(mode, whole, half)[:, :-1].double().log_softmax(-1)
            scores[mode].append(log_probabilities.gather(2, endings[..., None]).sum((1, 2)).tolist())
    found = {mode: torch.tensor(values, dtype=torch.float64) for mode, values in scores.items()}
    answers = {mode: values.argmax(1) for mode, values in found.items()}
    different = {mode: int((answer != answers["learned"]).sum()) for mode, answer in answers.items()}
    return {
        "questions": len(rows),
        "right": {mode: int((answer == 0).sum()) for mode, answer in answers.items()},
        "different": different,
        "differ": max(different.values()),
        "largest": {mode: float((values - found["learned"]).abs().max()) for mode, values in found.items()},
    }


def _choice_section(choices: dict[str, Any]) -> list[str]:
    rows = [
        [mode, f"{right} of {choices['questions']}", str(choices["different"][mode]), f"{choices['largest'][mode]:.1e}"]
        for mode, right in choices["right"].items()
    ]
    return [
        "Zero-shot-style choices: which of four second halves belongs to the first half, by log-likelihood.",
        table(["G_LM", "right", "choices that differ", "largest log-likelihood difference"], rows),
    ]


@torch.no_grad()
def transfer(lab: Lab) -> Finding:
    """A learned model's weights with a constant G_LM: its own (v51Gi), and the negative test with others."""
    model, tokenizer = lab.learned_model("transfer")
    rows = lab.passages(tokenizer, lab.size.passages + 1)
    calibration, rows = rows[:1], rows[1:]
    G_LM = stored_operator(frozen_copy(model, calibration))
    own, variants = "its own, frozen (v51Gi)", _other_operators(G_LM, lab.size.seeds)
    learned = [mean_loss(model, row[None]) for row in rows]
    loss = statistics.fmean(learned)
    gain = mean_loss(model, rows.reshape(-1, 2)) - loss
    kept = paired(learned, _losses(model, G_LM, rows))
    assert kept is not None  # there are two passages
    losses = {own: [loss + kept.value]} | {
        name: [statistics.fmean(_losses(model, each, rows)) for each in draws] for name, draws in variants.items()
    }
    harm = min(value - loss for name, values in losses.items() if name != own for value in values)
    p, (low, high) = kept.p_equivalent(INVARIANT_LOSS), kept.interval(2 * LEVEL)
    confirmed = p < LEVEL and harm > 100 * max(abs(kept.value), INVARIANT_LOSS)
    return Finding(
        "The learned operator replaces its network, and no other does",
        Verdict.CONFIRMED if confirmed else Verdict.NOT_CONFIRMED,
        f"its own operator as a constant moves the loss by {kept.value:+.1e} nats per token (90% interval {low:+.1e} to {high:+.1e}; "
        f"equivalent within {INVARIANT_LOSS:g} with p = {p:.2g}), every other one by at least {harm:.2f}",
        [
            f"Held-out loss of the trained weights with each constant, {len(rows)} passages of {rows.shape[1]} tokens. The "
            f"model itself: {loss:.4f}; its context gains it {gain:.2f} nats over one token of context. Equivalence is tested over "
            f"passages, by two one-sided tests with the margin that also says whether a run is invariant, {INVARIANT_LOSS:g} nats. "
            f"Random operators, uniform as published and normal, were drawn {len(lab.size.seeds)} times each.",
            table(["G_LM", "loss", "against the model, least to most"],
                  [[name, f"{statistics.fmean(values):.4f}", " to ".join(f"{value - loss:+.1e}" for value in dict.fromkeys((min(values), max(values))))]
                   for name, values in losses.items()]),
        ],
        {"loss": loss, "gain": gain, "losses": losses, "kept": kept.to_json() | {"p_equivalent": p, "margin": INVARIANT_LOSS}},
        subject=lab.model.name,
    )  # fmt: skip


def _other_operators(G_LM: torch.Tensor, seeds: Sequence[int]) -> dict[str, list[torch.Tensor]]:
    """What is tried in the place of a model's own G_LM [L, H, D, D]; random ones once for each seed."""
    scale = G_LM.square().mean((-1, -2), keepdim=True).sqrt()
    found = {
        "its own, heads in another order": [G_LM.roll(1, 1)],
        "identity": [torch.eye(G_LM.shape[-1]).to(G_LM).expand_as(G_LM)],
    }
    for kind, draw in (("uniform", torch.rand), ("normal", torch.randn)):
        drawn = [draw(G_LM.shape, generator=torch.Generator().manual_seed(seed)).to(G_LM) for seed in seeds]
        found[f"random {kind}"] = drawn
        found[f"random {kind}, scaled to its own RMS"] = [each * scale / each.square().mean().sqrt() for each in drawn]
    return found


def _losses(model: PldrForCausalLM, G_LM: torch.Tensor, rows: torch.Tensor) -> list[float]:
    """Passage by passage, with a constant operator."""
    frozen = frozen_copy(model, G_LM=G_LM)
    return [mean_loss(frozen, row[None]) for row in rows]


# --- all of them ----------------------------------------------------------------------------------------------------

CLAIMS: dict[str, Callable[[Lab], Finding]] = {
    "caching": caching,
    "fidelity": fidelity,
    "sdpa": sdpa,
    "invariance": invariance,
    "ablation": ablation,
    "transfer": transfer,
    "handoff": handoff,
}
# Claims about one trained model, which they do not train.
OF_A_MODEL = ("caching", "fidelity", "sdpa", "transfer")


def run_claim(claim: str, lab: Lab) -> Finding:
    """Run one claim, and write its page.

    Raises:
        ValueError: an unknown claim, or data or a model that can not work.
        ChildProcessError: a run failed.
    """
    if claim not in CLAIMS:
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}")
    finding = CLAIMS[claim](lab)
    lab.write(finding)
    return replace(finding, page=lab.folder / "README.md")


def reproduce(
    claim: str,
    *,
    size: str = "tiny",
    output: str | os.PathLike[str] = "reproduced",
    train: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    validation: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    parallel: int = 1,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    command: str = "",
) -> list[Finding]:
    """Reproduce a claim of the paper, as `pldr reproduce` does: train what it needs, measure, write tables and pictures.

    Args:
        claim: one of `CLAIMS`, or "all".
        size: one of `pldr.study.lab.SIZES`: tiny (minutes on a CPU), small (minutes on a GPU) or paper.
        output: folder for pages, pictures, numbers and trained runs; finished runs in it are kept.
        train, validation: training and held-out text, both or neither.
        tokenizer: of the runs.
        model: for caching, fidelity, sdpa and transfer, in place of the one that ships with pldr.
        parallel: runs at once.
        device: where models are measured.
        say: takes a line about what happens.
        command: what the pages say they were made with.

    Returns:
        A finding for each claim.

    Raises:
        ValueError, ChildProcessError: see `run_claim`; an option outside its range.
        ModuleNotFoundError: it needs the extra "train".
    """
    require("train", "accelerate", "matplotlib", "scipy")
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}, got {size!r}")
    if claim not in (*CLAIMS, "all"):
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}, all")
    if (train is None) != (validation is None):
        raise ValueError("train, validation: give both or neither")
    if parallel < 1:
        raise ValueError(f"parallel: must be at least 1, got {parallel}")
    usable_device(device)
    output, findings = Path(output), []
    for name in CLAIMS if claim == "all" else [claim]:
        data = default_data(size, held_out=name in OF_A_MODEL and model is None)
        if train is not None and validation is not None:
            data = {"train": names_of(train), "validation": names_of(validation), "tokenizer": data["tokenizer"]}
            for part in ("train", "validation"):  # a first look, before runs begin that can not work
                next(read_pieces(source_of(DataRecipe(**data), part), BadRows(), streaming=True), None)
        if tokenizer is not None:
            data["tokenizer"] = str(tokenizer)
        lab = Lab(
            SIZES[size], output / name, output / "runs", data, parallel, Path(model or STORIES), device, say, command
        )
        findings.append(run_claim(name, lab))
    return findings
