"""Quantised weights in files, read without torchao; with it, clients/test_torchao.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from helpers import assert_close, fails, quantised_by_hand
from pldr import convert_checkpoint, freeze_checkpoint, load_model, quantize
from pldr.checkpoints.certificate import (
    QUANTIZED_KIND,
    certificate_to_serve,
    read_certificate,
    weights_digest,
    write_certificate,
)
from pldr.checkpoints.quantized import expanded, packed_in_four_bits
from pldr.integrations import vllm as plugin
from test_vllm import certify, model_config


@pytest.fixture
def by_hand(folder, tmp_path):
    """A quantised folder, and what its weights stand for."""
    return tmp_path / "quantised", quantised_by_hand(folder, tmp_path / "quantised")


def changed(folder, name, change):
    """The same file with `change` done to what it says of a weight, and to its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kind = json.loads(metadata[name])
    change(kind, tensors)
    save_file(tensors, file, metadata | {name: json.dumps(kind)})
    (folder / "SHA256SUMS").unlink(missing_ok=True)


class TestReading:
    def test_every_kind_is_read_as_the_numbers_it_stands_for(self, by_hand, folder):
        place, expected = by_hand
        state, before = load_model(place).state_dict(), load_model(folder).state_dict()
        assert len(expected) == 3 * 2
        for name, tensor in state.items():
            assert tensor.dtype == torch.float32
            if name in expected:
                assert_close(tensor, expected[name], max_error=1e-6, name=name)
            else:
                assert torch.equal(tensor, before[name]), name

    def test_the_verbs_read_them(self, by_hand, tmp_path, run):
        place, _ = by_hand
        assert run("info", place)[0] == 0
        assert run("generate", place, "the cat", "--max-new-tokens", 3)[0] == 0
        freeze_checkpoint(place, tmp_path / "frozen", prompts="the cat")
        convert_checkpoint(place, tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        expected = load_model(place).state_dict()
        for name, tensor in load_model(tmp_path / "plain").state_dict().items():
            assert torch.equal(tensor, expected[name])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda kind, tensors: kind.update(_type="PickledTensor"), "its type is PickledTensor"),
            (lambda kind, tensors: kind["_data"].update(act_quant_kwargs={}), "how inputs are quantised"),
            (lambda kind, tensors: kind["_data"].update(block_size=[1, 5]), r"groups of \[1, 5\] in"),
            (lambda kind, tensors: kind["_data"].update(block_size=[1, 0]), r"groups of \[1, 0\] in"),
            (lambda kind, tensors: kind["_data"].update(dtype={"_type": "torch.dtype", "_data": "load"}), "stand for load"),
            (lambda kind, tensors: kind["_tensor_data_names"].remove("scale"), "'scale'"),
            (lambda kind, tensors: kind["_tensor_data_names"].append("more"), "_weight_more"),
            (lambda kind, tensors: tensors.update({Q + "scale": torch.ones(7, 1)}), r"\(7, 1\) scales of"),
            (lambda kind, tensors: tensors.update({Q + "qdata": torch.ones(32, 32)}), "its values are torch.float32"),
        ],
    )  # fmt: skip
    def test_parts_that_do_not_fit_are_refused(self, by_hand, change, message):
        place, _ = by_hand
        changed(place, "model.layers.0.self_attn.q_proj.weight", change)
        with pytest.raises(ValueError, match=rf"tensor model\.layers\.0\.self_attn\.q_proj\.weight .*{message}"):
            load_model(place)

    def test_a_list_of_tensors_that_is_none(self, by_hand):
        place, _ = by_hand
        with pytest.raises(ValueError, match="its metadata names no quantised tensors"):
            expanded({}, {"tensor_names": '{"a": 1}'}, place)


Q = "model.layers.0.self_attn.q_proj._weight_"


def test_four_bits_are_the_nearest_that_can_be_written():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0.5  # a group of one value
    parts = packed_in_four_bits(weight, 64)
    assert parts["qdata"].shape == (6, 64)
    assert parts["scale"].shape == parts["zero_point"].shape == (2, 6)
    kind = {"_type": "Int4Tensor", "_data": {"block_size": [1, 64]}, "_tensor_data_names": list(parts)}
    metadata = {"tensor_names": '["a.weight"]', "a.weight": json.dumps(kind)}
    values = expanded({f"a._weight_{name}": part for name, part in parts.items()}, metadata, "file")["a.weight"]
    half_a_step = parts["scale"].T.repeat_interleave(64, 1) / 2
    assert bool(((values - weight).abs() <= half_a_step * 1.001 + 1e-6).all())
    assert torch.equal(packed_in_four_bits(values, 64)["qdata"], parts["qdata"]) or bool((values[0, :64] == 0.5).all())


class TestRefusals:
    def test_of_the_verb(self, folder, tmp_path, run, monkeypatch):
        code, _, err = run("quantize", folder, tmp_path / "out", "--to", "int3")
        assert code == 2
        assert "int3" in err
        with pytest.raises(ValueError, match="to: must be one of int8, int4, fp8, got 'int3'"):
            quantize(folder, tmp_path / "out", to="int3")
        fails(run("quantize", folder, tmp_path / "out", "--passages", 1), "--passages: must be at least 2, got 1")
        monkeypatch.setattr("pldr.files.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"needs torchao: pip install 'pldr\[quantize\]'"):
            quantize(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_vllm(self, by_hand):
        place, _ = by_hand
        with pytest.raises(ValueError, match=r"has quantised weights.* --backend engine"):
            plugin.check_model(model_config(place))


class TestServing:
    """A certificate of quantised weights counts where it says that little changes, and holds one of the operator."""

    @pytest.fixture
    def quantised(self, folder, tmp_path):
        freeze_checkpoint(folder, tmp_path / "frozen", prompts="the cat")
        certify(tmp_path / "frozen")
        quantised_by_hand(tmp_path / "frozen", tmp_path / "quantised")
        (tmp_path / "quantised" / "certificate.json").unlink()

        def write(*, source=True, reasons=()):
            inner = read_certificate(tmp_path / "frozen")
            report = {"weights": "int8", "passages": 2, "tokens": 8, "loss": 1.0, "reasons": list(reasons), "certified": not reasons,
                      "modes": {"quantized": inner["report"]["modes"]["frozen"]},
                      "thresholds": {"loss": 0.1, "agreement": 0.9}}  # fmt: skip
            tensors = load_model(tmp_path / "quantised").state_dict()
            certificate = inner | {"kind": QUANTIZED_KIND, "report": report, "source": inner if source else {}}
            write_certificate(tmp_path / "quantised", certificate | {"frozen_weights": weights_digest(tensors)})
            return tmp_path / "quantised", "constant", tensors

        return write

    def test_of_a_certified_model(self, quantised):
        assert certificate_to_serve(*quantised(), required=True)["kind"] == QUANTIZED_KIND

    def test_that_changes_too_much(self, quantised):
        with pytest.raises(ValueError, match="quantisation changes too much: it does"):
            certificate_to_serve(*quantised(reasons=["it does"]), required=True)

    def test_of_an_operator_that_nobody_certified(self, quantised):
        with pytest.warns(UserWarning, match="about the quantisation alone"):
            assert certificate_to_serve(*quantised(source=False)) is None
