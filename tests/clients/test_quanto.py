"""optimum-quanto: weights of 8 bits, which it multiplies in plain PyTorch; those of 4 want an extension compiled at the first use."""

import pytest
import torch

quanto = pytest.importorskip("optimum.quanto")
from transformers import AutoModelForCausalLM, QuantoConfig

from pldr import load_model

IDS = torch.tensor([[5, 600, 70, 8, 900, 33, 12, 410]])


def by_configuration(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))


def by_hand(folder):
    model = load_model(folder)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


@pytest.mark.parametrize(
    ("quantised", "use"), [(by_configuration, "int8 by `QuantoConfig`"), (by_hand, "int8 by `quantize` and `freeze`")]
)
def test_eight_bits(row, operator, quantised, use, model_folder):
    """The probabilities of the next tokens are nearly those of the model."""
    row("optimum-quanto", use, operator)
    theirs, ours = quantised(model_folder(operator)).eval(), load_model(model_folder(operator))
    assert theirs.model.layers[0].self_attn.q_proj.weight.qtype is quanto.qint8
    with torch.no_grad():
        found, wanted = (model(IDS).logits.log_softmax(-1) for model in (theirs, ours))
    assert 0 < (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.01
    assert theirs.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 12)
