"""Fidelity after caching: deductive outputs worked out anew along a generation, against those cached from its prompt.

A cache that is read gives back what was put in, for any model. Whether that is what the model would compute now is another
question, which this asks at every step. Only layer 0 could be had from running sums of qᵀq: the queries of later layers depend on the
G_LM of earlier ones, which changes for all positions with every token. So each step is one forward of the whole sequence.

Shapes: B texts, T tokens, S steps, L layers, H heads, D head dimension.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pldr.deductive import deductive_outputs, log_determinant
from pldr.modeling_pldr import PldrForCausalLM
from pldr.operator import DeductiveOutputs
from pldr.study.lab import INVARIANT_VARIATION, SIZES, Finding, Lab, Verdict, default_data, table
from pldr.study.order import continuations

# Of a generation, the steps that tables show, and that the controls are measured at.
_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
_CONTROL_TEXTS = 4
# Texts that are worked out anew at one step.
_AT_ONCE = 8


@torch.no_grad()
def along_generation(
    model: PldrForCausalLM, ids: torch.Tensor, prompt: int, steps: Iterable[int]
) -> dict[str, dict[str, torch.Tensor]]:
    """How deductive outputs of prompt and continuation differ from those of the prompt alone, which a cache keeps.

    Args:
        model: with a learned operator.
        ids: [B, T], prompts and their continuations.
        prompt: tokens of the prompt.
        steps: numbers of continued tokens to work out anew with; at each for `_AT_ONCE` of the texts, in turn.

    Returns:
        By output and quantity [S, L], float64: "rmse", of all entries over texts and heads; "relative", that over the
        cached output's RMS; "rms" and "log10_determinant", by how much that of one head and text differs at most, and
        "mean_rms" and "mean_log10_determinant", by how much the mean over them does, where neither determinant is 0.
    """
    cached = {name: _measured(X) for name, X in deductive_outputs(model, ids[:, :prompt])._asdict().items()}
    found: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in cached}
    turns = max(1, len(ids) // _AT_ONCE)
    for step in steps:
        texts = slice(step % turns, None, turns)
        for name, X in deductive_outputs(model, ids[texts, : prompt + step])._asdict().items():
            (before, rms_before, log_before), (now, rms, log) = (x[:, texts] for x in cached[name]), _measured(X)
            rmse = _rms(now - before, (1, 2, 3, 4))
            of_rms, of_log = rms - rms_before, (log - log_before).nan_to_num(0.0, posinf=0.0, neginf=0.0)
            values = {
                "rmse": rmse,
                "relative": rmse / _rms(before, (1, 2, 3, 4)),
                "rms": of_rms.abs().amax((1, 2)), "log10_determinant": of_log.abs().amax((1, 2)),
                "mean_rms": of_rms.mean((1, 2)).abs(), "mean_log10_determinant": of_log.mean((1, 2)).abs(),
            }  # fmt: skip
            for quantity, value in values.items():
                found[name].setdefault(quantity, []).append(value.cpu())
    return {name: {q: torch.stack(values) for q, values in each.items()} for name, each in found.items()}


def _measured(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An output in float64, and of each text and head its RMS and the log10 of its determinant's magnitude, [L, B, H]."""
    return X.double(), _rms(X.double(), (3, 4)), log_determinant(X)[1]


def _rms(X: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    return X.square().mean(tuple(dims)).sqrt()


def decimals(difference: float) -> int:
    """To how many decimals two numbers agree, 15 at most: they differ by half a unit of the last one or less."""
    return 15 if difference <= 0.5e-15 else max(0, math.floor(-math.log10(2 * difference)))


def fidelity(lab: Lab) -> Finding:
    """Deductive outputs worked out anew at every step of generations, against the cached ones, with two controls."""
    model, tokenizer = lab.learned_model("fidelity")
    prompt, steps = lab.size.length // 4, lab.size.generated
    if prompt + steps > model.config.max_position_embeddings:
        raise ValueError(
            f"reproduce fidelity: {prompt} + {steps} tokens are more than the model's context of "
            f"{model.config.max_position_embeddings}"
        )
    prompts = lab.passages(tokenizer)[:, :prompt]
    found = along_generation(model, continuations(model, prompts, steps), prompt, range(1, steps + 1))
    shown = [step for step in _SHOWN if step <= steps]
    controls = {name: _largest(found) for name, found in _controls(lab, model, prompts, shown).items()}
    largest = _largest(found)
    compared = ("rms", "log10_determinant", "mean_rms", "mean_log10_determinant")
    hold = {name: {q: decimals(each[q]) for q in compared} for name, each in largest.items()}
    exact = min(each[q] for each in hold.values() for q in ("mean_rms", "mean_log10_determinant"))
    passed = [name for name, each in controls.items() if each["G_LM"]["relative"] <= INVARIANT_VARIATION]
    kept = largest["G_LM"]["relative"] <= INVARIANT_VARIATION and not passed
    verdict = Verdict.CONFIRMED if kept and exact >= 15 else Verdict.CONDITIONS if kept else Verdict.NOT_CONFIRMED
    reason = (
        f"worked out anew at each of {steps} steps, G_LM differs from the cached one by {largest['G_LM']['relative']:.1e} of its "
        f"size at most (bound {INVARIANT_VARIATION:g}); mean RMS and mean log10 |det| agree to "
        + ", ".join(
            f"{each['mean_rms']} and {each['mean_log10_determinant']} decimals ({name})" for name, each in hold.items()
        )
        + (f"; the check is void, because it lets pass: {', '.join(passed)}" if passed else "; both controls fail")
    )
    sections = _sections(found, controls | {"the model": largest}, shown, len(prompts), prompt)
    numbers = {
        "prompts": len(prompts), "prompt_tokens": prompt, "steps": steps, "largest": largest, "decimals": hold, "controls": controls,
        "at_steps": shown, "by_step_and_layer": {
            name: {q: values[[step - 1 for step in shown]].tolist() for q, values in each.items()}
            for name, each in found.items()
        },
    }  # fmt: skip
    return Finding(
        "Deductive outputs keep their values after caching", verdict, reason, sections, numbers, lab.model.name
    )


def _controls(
    lab: Lab, model: PldrForCausalLM, prompts: torch.Tensor, shown: list[int]
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """What is found of models whose G_LM depends on the text: an untrained one, and one that is trained for a minute."""
    torch.manual_seed(0)
    untrained = PldrForCausalLM(copy.deepcopy(model.config)).to(model.device).eval()
    size = dataclasses.replace(SIZES["tiny"], length=min(lab.size.length, SIZES["tiny"].length))
    small = dataclasses.replace(lab, size=size, data=default_data("tiny"))
    changes: dict[str, Any] = {
        "model.config.max_position_embeddings": model.config.max_position_embeddings,
        "optimization.batch_size": 4, "eval_steps": None, "data.validation": [],
    }  # fmt: skip
    small.train({"varies": changes})
    loaded = small.load("varies")
    assert loaded is not None
    varies, tokenizer = loaded
    its = dataclasses.replace(lab, data=default_data("tiny")).passages(tokenizer, _CONTROL_TEXTS)[:, : prompts.shape[1]]
    of = {"untrained": (untrained, prompts[:_CONTROL_TEXTS]), f"trained for {size.usual.steps} steps": (varies, its)}
    return {
        name: along_generation(control, continuations(control, texts, shown[-1]), texts.shape[1], shown)
        for name, (control, texts) in of.items()
    }


def _largest(found: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    return {name: {q: float(values.max()) for q, values in each.items()} for name, each in found.items()}


def _sections(
    found: dict[str, dict[str, torch.Tensor]],
    models: dict[str, dict[str, dict[str, float]]],
    shown: list[int],
    texts: int,
    prompt: int,
) -> list[str]:
    by_layer: list[list[str]] = []
    for name in DeductiveOutputs._fields:
        for layer in range(found[name]["rmse"].shape[1]):
            worst = {q: float(values[:, layer].max()) for q, values in found[name].items()}
            pairs = [
                cell
                for q in ("rms", "log10_determinant")
                for cell in (
                    f"{worst[q]:.1e} ({worst[f'mean_{q}']:.1e})",
                    f"{decimals(worst[q])} ({decimals(worst[f'mean_{q}'])})",
                )
            ]
            by_layer.append([name, str(layer), f"{worst['rmse']:.1e}", f"{worst['relative']:.1e}", *pairs])
    by_step = [
        [str(step), *(f"{float(found[name]['relative'][step - 1].max()):.1e}" for name in DeductiveOutputs._fields)]
        for step in shown
    ]
    return [
        f"{texts} held-out prompts of {prompt} tokens, each continued by {shown[-1]} tokens (drawn at temperature 1, KV-cache and "
        f"G-cache). At every step the deductive outputs of {min(_AT_ONCE, texts)} of them, in turn, are worked out anew from the whole "
        "sequence, and compared with those of the prompt, which the cache keeps. Largest differences over steps: RMSE over texts, heads and entries, and its share of "
        "the cached tensor's RMS; RMS and log10 |det| of the worst head of the worst text, in brackets of their means over texts "
        "and heads, and to how many decimals they agree.",
        table(["tensor", "layer", "RMSE", "relative", "RMS differs by", "decimals", "log10 determinant differs by", "decimals"],
              by_layer),
        "The relative RMSE over the generation, of the worst layer.",
        table(["step", *DeductiveOutputs._fields], by_step),
        "The controls, whose G_LM depends on the text: the same numbers, largest over layers and steps. The check is that G_LM's "
        f"relative RMSE stays below {INVARIANT_VARIATION:g}; they must fail it.",
        table(
            ["model", "tensor", "relative RMSE", "RMS differs by", "log10 determinant differs by"],
            [[model, name, *(f"{each[name][q]:.1e}" for q in ("relative", "rms", "log10_determinant"))]
             for model, each in models.items() for name in DeductiveOutputs._fields],
        ),
        "That a cache gives back what was put into it is another check, of the implementation: `pldr reproduce caching`.",
    ]  # fmt: skip
