"""Export: what it refuses, and what stands in the folder. Other runtimes run it in clients/test_onnx.py."""

import pytest
import torch

from helpers import assert_close, fails
from pldr import export, freeze_checkpoint, load_model, load_tokenizer
from pldr.integrations import export as module
from test_vllm import certify


@pytest.fixture
def frozen(folder, tmp_path):
    freeze_checkpoint(folder, tmp_path / "frozen", prompts="the cat sat")
    return tmp_path / "frozen"


class TestRefusals:
    def test_a_learned_operator(self, folder, tmp_path, run):
        command = f'pldr freeze {folder} FROZEN --prompt "Any text will do."'
        fails(run("export", folder, tmp_path / "out", "--to", "torch"), command)
        assert not (tmp_path / "out").exists()

    def test_another_format(self, frozen, tmp_path, run):
        code, _, err = run("export", frozen, tmp_path / "out", "--to", "gguf")
        assert code == 2
        assert "gguf" in err
        with pytest.raises(ValueError, match="to: must be one of onnx, torch, got 'gguf'"):
            export(frozen, tmp_path / "out", to="gguf")

    def test_onnx_without_its_packages(self, frozen, tmp_path, monkeypatch):
        monkeypatch.setattr("pldr.files.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"needs onnx, .*: pip install 'pldr\[export\]'"):
            export(frozen, tmp_path / "out")

    @pytest.mark.slow
    def test_a_file_that_computes_something_else(self, frozen, tmp_path, monkeypatch):
        runner = module._torch_runner
        monkeypatch.setattr(
            module, "_torch_runner", lambda file: lambda *inputs: [x * 1.001 for x in runner(file)(*inputs)]
        )
        with pytest.raises(RuntimeError, match=r"logits of the written file differ by .* nothing is kept"):
            export(frozen, tmp_path / "out", to="torch")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_has_what_a_runtime_needs(frozen, tmp_path, run):
    certify(frozen)
    code, out, err = run("export", frozen, tmp_path / "out", "--to", "torch")
    assert code == 0, err
    assert "constant operator" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.pt2", "config.json", "tokenizer.json", "tokenizer_config.json", "certificate.json"}
    assert len(load_tokenizer(tmp_path / "out")) == 290
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path / "out")
    model = load_model(frozen, dtype="bfloat16")  # exported as a copy, in float32
    result = export(model, tmp_path / "loaded", to="torch", tokenizer=frozen)
    assert model.dtype == torch.bfloat16
    assert result.difference <= module.TOLERANCE * result.largest
    assert "certificate.json" not in {file.name for file in (tmp_path / "loaded").iterdir()}


def test_the_wrapped_model_is_the_model(frozen):
    """Without any exporter: a batch with padding, whole and step by step."""
    model = load_model(frozen)
    decoder = module.CachedDecoder(model)
    ids, mask, positions, empty = module._example(model.config, batch=2, tokens=9, past=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        whole = decoder(ids, mask, positions, empty)[0]
        cache, steps = empty, []
        for end in range(1, 10):
            new = slice(end - 1, end)
            logits, *cache = decoder(ids[:, new], mask[:, :end], positions[:, new], cache)
            steps.append(logits)
    for logits in (whole, torch.cat(steps, dim=1)):
        assert_close(logits[mask.bool()], expected[mask.bool()], max_error=2e-5)
    assert torch.isfinite(whole).all()
