"""Parity with the published implementation: fp32 on CPU, at the tolerances that the project states."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import FIXTURES, assert_close, shared
from pldr import dag_loss, deductive_outputs, load_model
from pldr.layouts import ours_to_published

LEARNED = ["v51-small", "v52-small", "v51-paper-dk", "v52-paper-dk"]
CONSTANT = ["v51G-identity", "v51G-random"]


def folder(name):
    return FIXTURES / name if (FIXTURES / name).is_dir() else shared(f"golden/{name}")


def case(name, layout="hub"):
    place = folder(name)
    if layout == "hub":
        model = load_model(place / "hub")
    else:
        model = load_model(place, rope="halves" if name.startswith("v52") else None)
    return model, load_file(place / "expected.safetensors")


# Both compute the same sums in fp32; only their order differs.
LOGIT_ERROR = 2e-5
DEDUCTIVE_RATIO = 1e-4
LOSS_RATIO = 1e-5
GRADIENT_RATIO = 1e-3
# Of float32 gradients against float64 ones, any processor: up to 1.4e-3 was seen.
ROUNDING_RATIO = 5e-3


@pytest.mark.parametrize("layout", ["hub", "reference"])
@pytest.mark.parametrize("name", LEARNED + CONSTANT)
def test_logits(name, layout):
    model, expected = case(name, layout)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert_close(logits, expected["logits"], max_error=LOGIT_ERROR, name="logits")


@pytest.mark.parametrize("name", LEARNED)
def test_deductive_outputs(name):
    model, expected = case(name)
    outputs = deductive_outputs(model, expected["input_ids"])
    for kind in ("A", "A_LM", "A_P", "G_LM"):
        for layer in range(model.config.num_hidden_layers):
            value = getattr(outputs, kind)[layer]
            assert_close(value, expected[f"{kind}.{layer}"], rms_ratio=DEDUCTIVE_RATIO, name=f"{kind}.{layer}")


@pytest.mark.parametrize("name", CONSTANT)
def test_predefined_operator(name):
    model, expected = case(name)
    G_LM = deductive_outputs(model, expected["input_ids"]).G_LM
    assert torch.equal(G_LM, expected["G"])


def losses(model, expected):
    """Cross-entropy, the DAG losses of A_LM, A_P and G_LM, and their total as v51-DAG training weighs them."""
    model.train()
    output = model(expected["input_ids"], use_cache=False, output_deductive_outputs=True)
    ce = F.cross_entropy(output.logits.flatten(0, 1), expected["labels"].flatten())
    layers = output.deductive_outputs
    dag = torch.stack([dag_loss(torch.stack([getattr(layer, kind) for layer in layers]))
                       for kind in ("A_LM", "A_P", "G_LM")])  # fmt: skip
    return ce, dag, ce + 0.05 * dag.sum()


def gradients(name, dtype):
    """Of the total loss, by published parameter name."""
    model, expected = case(name)
    model = model.to(dtype)
    losses(model, expected)[2].backward()
    parameters = dict(model.named_parameters())
    return {theirs: parameters[mine].grad for mine, theirs in ours_to_published(parameters).items()}


@pytest.mark.parametrize("name", LEARNED)
def test_losses(name):
    model, expected = case(name)
    ce, dag, total = losses(model, expected)
    assert_close(ce, expected["loss.ce"], rms_ratio=LOSS_RATIO, name="ce")
    batch = {"input_ids": expected["input_ids"], "shift_labels": expected["labels"]}  # as in training
    loss = model(**batch, use_cache=False, return_logits=False).loss
    assert_close(loss, expected["loss.ce"], rms_ratio=LOSS_RATIO, name="the training step's")
    for index, kind in enumerate(("A_LM", "A_P", "G_LM")):
        theirs = expected["loss.dag_A_LM_A_P_G"][index]
        assert_close(dag[index], theirs, rms_ratio=LOSS_RATIO, name=f"DAG loss of {kind}")
    assert_close(total, expected["loss.total_0.05"], rms_ratio=LOSS_RATIO, name="total")


@pytest.mark.parametrize("name", LEARNED)
def test_gradients(name):
    """The power law near zero amplifies rounding: on some processors float32 differs from float64 by more than the tolerance.

    There the same code in float64 is held against the goldens, within the same tolerance.
    """
    _, expected = case(name)
    single, double = gradients(name, torch.float32), gradients(name, torch.float64)
    assert {f"grad.{theirs}" for theirs in single} == {key for key in expected if key.startswith("grad.")}
    for theirs, exact in double.items():
        assert_close(single[theirs], exact.float(), rms_ratio=ROUNDING_RATIO, name=f"rounding of {theirs}")
        rounding = (single[theirs] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        compared = single[theirs] if rounding <= GRADIENT_RATIO else exact.float()
        assert_close(compared, expected[f"grad.{theirs}"], rms_ratio=GRADIENT_RATIO, name=theirs)


@pytest.mark.parametrize(("mode", "kv", "g"), [("none", False, False), ("kv", True, False), ("g", False, True),
                                               ("kv_g", True, True)])  # fmt: skip
@pytest.mark.parametrize("name", LEARNED)
def test_greedy_tokens(name, mode, kv, g):
    model, expected = case(name)
    tokens = model.generate(
        expected["prompt"], max_new_tokens=24, do_sample=False, eos_token_id=None, use_cache=kv, use_g_cache=g
    )
    assert torch.equal(tokens, expected[f"greedy.{mode}"])


def test_the_modes_differ_in_the_goldens():
    """Otherwise the test above could pass with a G-cache that does nothing."""
    expected = case("v51-small")[1]
    assert not torch.equal(expected["greedy.none"], expected["greedy.kv_g"])
