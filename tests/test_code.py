"""Folders of the hub layout with the model's own code, loaded where there are torch and transformers and nothing else."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoConfig

from helpers import fails
from pldr import PldrForSequenceClassification, convert_checkpoint, freeze, load_model, load_tokenizer
from pldr.operator import factor

CODE = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
answers = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__, type(model)
    ids = AutoTokenizer.from_pretrained(folder)("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        answers[folder] = model(ids).logits.tolist()
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state.shape[1] == ids.shape[1]
    text = pipeline("text-generation", folder, trust_remote_code=True)("the cat", max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder + "-saved")  # takes its code along
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder + "-saved")
    again = AutoModelForCausalLM.from_pretrained(folder + "-saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
try:
    import pldr
    raise SystemExit("pldr is here")
except ModuleNotFoundError:
    print(json.dumps(answers))
"""


def bare(folder, *packages):
    """A folder to import from that has these packages, what they need, and no other."""
    folder.mkdir()
    wanted, seen = list(packages), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for file in found.files or ():
            if file.parts[0] not in ("..", "__pycache__") and not (folder / file.parts[0]).exists():
                (folder / file.parts[0]).symlink_to(Path(found.locate_file(file.parts[0])))
        needs = map(Requirement, found.requires or ())
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return folder


@pytest.mark.slow
def test_a_folder_with_code_needs_transformers_alone(folder, tmp_path):
    model = load_model(folder)
    models = {"learned": model, "frozen": freeze(load_model(folder), torch.arange(4, 20))}
    factors = [torch.randn(2, 2, 16, rank, generator=torch.Generator().manual_seed(0)).unbind() for rank in (8, 16)]
    models["factored"] = factor(load_model(folder), factors)
    for name, model in models.items():
        model.save_pretrained(tmp_path / "ours")
        convert_checkpoint(tmp_path / "ours", tmp_path / name, to="hub", with_code=True, tokenizer=folder)
    site = bare(tmp_path / "site", "torch", "transformers")
    assert not any((site / name).exists() for name in ("pldr", "sentencepiece", "accelerate"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", CODE, *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    ids = load_tokenizer(folder)("the cat sat on a mat", return_tensors="pt").input_ids
    for name, model in models.items():
        with torch.no_grad():
            expected = model.eval()(ids).logits
        error = (torch.tensor(answers[str(tmp_path / name)]) - expected).abs().max()
        # A factored operator is written as its product, which rounds otherwise.
        assert error == 0 if name != "factored" else error < 1e-4


def test_the_folder_is_ours_too_and_its_code_is_not_run(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "hub", to="hub", with_code=True)
    (tmp_path / "hub" / "modeling_pldr.py").write_text("raise SystemExit('run')")
    loaded = load_model(tmp_path / "hub")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, load_model(folder)(ids).logits)
    assert loaded.config.auto_map == {}
    assert AutoConfig.from_pretrained(tmp_path / "hub").operator == "learned"


def test_without_code_none_is_named(folder, tmp_path, run):
    convert_checkpoint(folder, tmp_path / "hub", to="hub")
    assert "auto_map" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    fails(run("convert", folder, tmp_path / "o", "--with-code"), "--with-code: goes with to='hub' only")


def test_heads_have_their_code(folder, tmp_path):
    PldrForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(tmp_path / "head")
    convert_checkpoint(tmp_path / "head", tmp_path / "hub", to="hub", with_code=True, tokenizer=folder)
    named = json.loads((tmp_path / "hub" / "config.json").read_text())["auto_map"]
    assert named["AutoModelForSequenceClassification"] == "modeling_pldrllm.PldrllmForSequenceClassification"


def test_nothing_of_ours_is_imported_from_the_code(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "hub", to="hub", with_code=True)
    files = list((tmp_path / "hub").glob("*.py"))
    assert len(files) >= 14
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "pldr"], file.name
    assert not (tmp_path / "hub" / "registration.py").exists()


@pytest.mark.parametrize("to", ["pldr", "reference"])
def test_code_goes_with_the_hub_layout(folder, tmp_path, to):
    with pytest.raises(ValueError, match="with_code: goes with to='hub' only"):
        convert_checkpoint(folder, tmp_path / "out", to=to, with_code=True)
