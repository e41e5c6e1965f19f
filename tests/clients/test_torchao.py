"""Quantised folders: written by `pldr quantize` with torchao, read by `pldr` and by `from_pretrained`."""

import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from helpers import assert_close
from pldr import load_model, load_tokenizer, quantize
from pldr.checkpoints.certificate import is_about, read_certificate
from pldr.study.quantize import KINDS, write_quantized

PROMPT = "Once upon a time there was a little dog"
# Of the loss, nats per token, on two passages; and bytes of the weights that were quantised, of those before.
LOSS, SIZE = {"int8": 0.01, "fp8": 0.02, "int4": 0.1}, {"int8": 0.27, "fp8": 0.27, "int4": 0.17}


@pytest.fixture(scope="session")
def quantised(model_folder, tmp_path_factory):
    """`quantised(operator, kind)`: what `quantize` returns of `model_folder(operator)`, made once."""
    made = {}

    def quantization(operator, kind):
        if (operator, kind) not in made:
            folder = tmp_path_factory.mktemp("quantised") / f"{operator}-{kind}"
            made[operator, kind] = quantize(model_folder(operator), folder, to=kind, passages=2, length=128)
        return made[operator, kind]

    return quantization


@pytest.mark.parametrize("kind", KINDS)
def test_quantize(row, operator, kind, model_folder, quantised):
    """The certificate says what `load_model` shows; layers are smaller; operator, embedding and head are as they were."""
    row("torchao", f"`pldr quantize --to {kind}`, read by `pldr`", operator)
    made = quantised(operator, kind)
    model, before = load_model(made.folder), load_model(model_folder(operator))
    certificate = read_certificate(made.folder)
    assert is_about(certificate, model.state_dict())
    found = certificate["report"]["modes"]["quantized"]
    assert 0 < abs(found["loss_difference"]) < LOSS[kind]
    assert 0 < found["kl_mean"] < LOSS[kind]
    assert made.layers == {kind: 7 * 7}
    size = 0
    for name, tensor in before.state_dict().items():
        changed = not torch.equal(tensor, model.state_dict()[name])
        assert changed == (name.endswith("proj.weight") and ".operator." not in name), name
        size += tensor.nbytes * changed
    stored = load_file(made.folder / "model.safetensors")
    assert sum(tensor.nbytes for name, tensor in stored.items() if "_weight_" in name) < SIZE[kind] * size
    tokenizer = load_tokenizer(made.folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_from_pretrained(row, operator, kind, quantised):
    """The same numbers, in torchao's tensors; in seconds, also where a learned operator brings 1,748 tensors."""
    row("torchao", f"`pldr quantize --to {kind}`, read by `from_pretrained`", operator)
    folder = quantised(operator, kind).folder
    start = time.monotonic()
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert time.monotonic() - start < 60
    assert type(theirs.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(theirs(ids).logits, load_model(folder)(ids).logits, max_error=1e-3)


def test_from_pretrained_int4(row, quantised):
    """Is read, and computes where torchao has kernels: with CUDA and mslk, which no test has here."""
    refused = "is read; torchao multiplies it on CUDA alone: use `load_model`"
    row(
        "torchao",
        "`pldr quantize --to int4`, read by `from_pretrained`",
        "learned",
        "frozen",
        "factored",
        refused=refused,
    )
    for operator in ("learned", "frozen", "factored"):
        folder = quantised(operator, "int4").folder
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        weight, ours = theirs.model.layers[0].mlp.up_proj.weight, load_file(folder / "model.safetensors")
        assert type(weight).__name__ == "Int4Tensor"
        assert torch.equal(weight.qdata, ours["model.layers.0.mlp.up_proj._weight_qdata"])
        with pytest.raises((AttributeError, RuntimeError, NotImplementedError)):
            theirs(torch.tensor([[5]]))


def test_what_transformers_quantised(row, operator, model_folder, tmp_path):
    """A folder that `from_pretrained(quantization_config=…)` and `save_pretrained` wrote, with torchao's own choice of layers."""
    row("torchao", "int8 by `TorchAoConfig`, read by `pldr`", operator)
    from torchao.quantization import Int8WeightOnlyConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", ".*operator"])
    theirs = AutoModelForCausalLM.from_pretrained(model_folder(operator), quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(load_model(tmp_path / "theirs")(ids).logits, theirs(ids).logits, max_error=1e-3)


def test_widths_that_no_group_divides(row, tmp_path):
    """The published feed-forward width, 2389, and the metric learner's 170: these layers are kept in 8 bits."""
    from pldr import PldrConfig, PldrForCausalLM

    row("torchao", "`pldr quantize --to int4`: widths that no group divides have 8 bits", "learned")
    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig(vocab_size=40, hidden_size=128, num_attention_heads=2, num_hidden_layers=1,
                                       intermediate_size=2389, metric_learner_units=1)).eval()  # fmt: skip
    (tmp_path / "model").mkdir()
    layers = write_quantized(model, tmp_path / "model", "int4", operator=True)
    # q, k, v, o, gate and up, and of two GLUs gate and up; of each the layer behind, from 2389 or 170 inputs.
    assert layers == {"int4": 6 + 4, "int8": 1 + 2}
    read = load_model(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        difference = (read.state_dict()[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert difference < (0.1 if name.endswith("proj.weight") else 1e-9), name
