"""`import pldr` alone makes its classes known, whatever was imported before, and imports nothing of others' for that."""

import subprocess
import sys

import pytest

CODE = """
import sys
{first}
import pldr
assert {light} or not {{"torch", "transformers", "lm_eval", "peft"}} & set(sys.modules)
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, pipeline
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(AutoConfig.from_pretrained({folder!r})) is pldr.PldrConfig
assert type(model) is pldr.PldrForCausalLM
assert type(AutoModelForTokenClassification.from_config(model.config)) is pldr.PldrForTokenClassification
assert transformers.PldrForCausalLM is sys.modules["transformers"].PldrForCausalLM is pldr.PldrForCausalLM
assert transformers.PldrForTokenClassification is pldr.PldrForTokenClassification
print(pipeline("text-generation", {folder!r})("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    ["", "import transformers", "from transformers import AutoModelForCausalLM", "import pldr.modeling_pldr"],
)
def test_transformers_knows_our_classes(folder, first):
    code = CODE.format(first=first, light=bool(first), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    assert "not supported" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import lm_eval.models"])
def test_the_harness_knows_our_model(first):
    pytest.importorskip("lm_eval", reason="extra eval")
    code = f"""
{first}
import pldr, lm_eval
from lm_eval.api.registry import get_model
print(get_model("pldr").__name__, get_model("hf").__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "PldrLM HFLM\n", done.stderr
