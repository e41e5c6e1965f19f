"""Weights in eight bits by bitsandbytes, while `from_pretrained` reads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pldr import load_model, load_tokenizer

pytest.importorskip("bitsandbytes")
PROMPT = "Once upon a time there was a little dog"


def in_eight_bits(folder, *, skip):
    """The layers that were quantised; the probabilities of the next tokens are nearly those of the model."""
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", *skip])
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found, wanted = (model(ids).logits.float().log_softmax(-1) for model in (theirs, load_model(folder)))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.05
    return [name for name, tensor in theirs.state_dict().items() if tensor.dtype == torch.int8]


def test_eight_bits(row, operator, model_folder):
    row("bitsandbytes", "int8 by `BitsAndBytesConfig`", operator)
    small = in_eight_bits(model_folder(operator), skip=[])
    assert (
        sum(".operator." not in name for name in small) == 7 * 6
    )  # bitsandbytes leaves subclasses of nn.Linear, such as the value projection, as they are
    assert any(".operator." in name for name in small) == (operator == "learned")


def test_without_the_metric_learner(row, model_folder):
    row("bitsandbytes", 'int8 by `BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", ".*operator"])`', "learned")
    small = in_eight_bits(model_folder("learned"), skip=[".*operator"])
    assert len(small) == 7 * 6  # bitsandbytes leaves subclasses of nn.Linear, such as the value projection, as they are
