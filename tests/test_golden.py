"""Parity with the published implementation: fp32 on CPU, at the tolerances that the project states."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import FIXTURES, shared
from helpers import assert_close
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
        model = load_model(place, rope_pairing="halves" if name.startswith("v52") else None)
    return model, load_file(place / "expected.safetensors")


# Both compute the same sums in fp32; only their order differs.
LOGIT_ERROR = 2e-5
DEDUCTIVE_RATIO = 1e-4
LOSS_RATIO = 1e-5
GRADIENT_RATIO = 1e-3


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


@pytest.mark.parametrize("name", LEARNED)
def test_losses_and_gradients(name):
    model, expected = case(name)
    model.train()
    output = model(expected["input_ids"], use_cache=False, output_deductive_outputs=True)
    ce = F.cross_entropy(output.logits.flatten(0, 1), expected["labels"].flatten())
    layers = output.deductive_outputs
    dag = torch.stack([dag_loss(torch.stack([getattr(layer, kind) for layer in layers]))
                       for kind in ("A_LM", "A_P", "G_LM")])  # fmt: skip
    total = ce + 0.05 * dag.sum()
    assert_close(ce, expected["loss.ce"], rms_ratio=LOSS_RATIO, name="ce")
    for index, kind in enumerate(("A_LM", "A_P", "G_LM")):
        theirs = expected["loss.dag_A_LM_A_P_G"][index]
        assert_close(dag[index], theirs, rms_ratio=LOSS_RATIO, name=f"DAG loss of {kind}")
    assert_close(total, expected["loss.total_0.05"], rms_ratio=LOSS_RATIO, name="total")

    total.backward()
    ours = dict(model.named_parameters())
    published = ours_to_published(ours)
    assert {f"grad.{name}" for name in published.values()} == {key for key in expected if key.startswith("grad.")}
    for mine, theirs in published.items():
        assert_close(ours[mine].grad, expected[f"grad.{theirs}"], rms_ratio=GRADIENT_RATIO, name=theirs)


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
