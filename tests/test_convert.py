import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import FIXTURES, shared
from pldr import (
    PldrForCausalLM,
    convert_checkpoint,
    deductive_outputs,
    freeze,
    freeze_checkpoint,
    load_model,
    load_predefined_G,
    load_tokenizer,
)
from pldr.checkpoints.load import load_with_tokenizer
from pldr.deductive import numerical_rank

CASES = ["v51-small", "v52-small", "v51G-identity", "v51G-random"]


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())


def shape_of(model):
    return {name: value for name, value in model.config.to_dict().items()
            if name not in ("dtype", "architectures", "operator_init", "_name_or_path")
            and not (model.config.operator == "constant" and name.startswith("metric_learner"))}  # fmt: skip


@pytest.mark.parametrize("to", ["hub", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_round_trips_are_bitwise(name, to, tmp_path):
    source = load_model(FIXTURES / name / "hub")
    source.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=to)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back")
    for step in ("ours", "theirs", "back"):
        model = load_model(tmp_path / step)
        assert same_state(model, source), step
        assert shape_of(model) == shape_of(source), step


@pytest.mark.parametrize("name", CASES)
def test_written_layouts_have_the_published_tensors(name, tmp_path):
    """Byte for byte what the published files hold: names, shapes, dtypes, values."""
    source = FIXTURES / name
    convert_checkpoint(source / "hub", tmp_path / "hub", to="hub")
    theirs, ours = (load_file(folder / "hub" / "model.safetensors") for folder in (source, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    published = json.loads((source / "hub" / "config.json").read_text())
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    # Without a metric learner its width, units and GLUs mean nothing; the library's version is another; the published code
    # is not beside the weights, and so it is not named (tests/test_code.py).
    unused = {"A_dff", "num_reslayerA", "num_denseA"} if published["custom_G_type"] else set()
    for key in published.keys() - {"transformers_version", "auto_map"} - unused:
        assert written[key] == published[key], key

    convert_checkpoint(source / "hub", tmp_path / "reference", to="reference")
    theirs, ours = (torch.load(folder / "model-checkpoint.pth", weights_only=True)["model_state_dict"]
                    for folder in (source, tmp_path / "reference"))  # fmt: skip
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    if (source / "predefined_G_LM.pkl").exists():
        written = load_predefined_G(tmp_path / "reference" / "predefined_G_LM.pkl")
        assert torch.equal(written, load_predefined_G(source / "predefined_G_LM.pkl"))


def test_hub_folder_through_from_pretrained(tmp_path):
    """No remote code, although config.json asks for it, and nothing of it is carried into our own layout."""
    for name in CASES:
        model, report = PldrForCausalLM.from_pretrained(FIXTURES / name / "hub", output_loading_info=True)
        assert not any(report.values()), name
        model.save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert "auto_map" not in saved
        assert saved["architectures"] == ["PldrForCausalLM"]
        assert all(key.startswith(("model.", "lm_head.")) for key in load_file(tmp_path / name / "model.safetensors"))


def test_bf16_and_frozen_models_round_trip(small_model, ids, tmp_path):
    model = freeze(small_model().to(torch.bfloat16), ids[:1])
    model.save_pretrained(tmp_path / "ours")
    for to in ("hub", "reference"):
        convert_checkpoint(tmp_path / "ours", tmp_path / to, to=to)
        assert same_state(load_model(tmp_path / to), model)
        assert load_model(tmp_path / to, dtype=torch.float32).dtype == torch.float32


def test_sharded_weights(tmp_path):
    model = load_model(FIXTURES / "v51-small" / "hub")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same_state(load_model(tmp_path), model)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who may read one may read all
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a file outside the folder"):
        load_model(tmp_path)


class TestPredefinedG:
    def test_published_pickle_of_cuda_tensors(self):
        loaded = load_predefined_G(shared("data/G_LM-PLDRv51-110M-1.pkl"))
        assert loaded.device.type == "cpu"
        expected = load_predefined_G(shared("data/G_LM-PLDRv51-110M-1.safetensors"))
        assert loaded.shape == (5, 14, 64, 64)
        assert torch.equal(loaded, expected)
        # Reported for this tensor, relative to the largest singular value.
        assert numerical_rank(loaded, 1e-2).double().mean().item() == pytest.approx(14.84, abs=0.01)
        assert numerical_rank(loaded, 1e-3).double().mean().item() == pytest.approx(18.47, abs=0.01)

    def test_golden_pickle(self):
        expected = load_file(FIXTURES / "v51G-random" / "expected.safetensors")["G"][:, 0]
        assert torch.equal(load_predefined_G(FIXTURES / "v51G-random" / "predefined_G_LM.pkl"), expected)

    def test_pairs_of_metric_and_operator(self, tmp_path):
        """The published inference code takes (A_LM, G_LM) pairs."""
        G_LM = torch.randn(2, 1, 2, 16, 16)
        (tmp_path / "pairs.pkl").write_bytes(pickle.dumps([(torch.zeros(1, 2, 16, 16), layer) for layer in G_LM]))
        assert torch.equal(load_predefined_G(tmp_path / "pairs.pkl"), G_LM[:, 0])

    def test_triples_of_a_dag_model(self, tmp_path):
        """[A_LM, G_LM, A_P], of which the last is not the operator."""
        A_LM, G_LM, A_P = torch.randn(3, 2, 1, 2, 16, 16)
        (tmp_path / "triples.pkl").write_bytes(
            pickle.dumps([list(layer) for layer in zip(A_LM, G_LM, A_P, strict=True)])
        )
        assert torch.equal(load_predefined_G(tmp_path / "triples.pkl"), G_LM[:, 0])

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (torch.randn(2, 16, 16).tril().softmax(-1), None),  # a row that sums to 1 is nothing special
            ((torch.zeros(2, 16, 16) - torch.inf).triu(1).softmax(-1), "these are attention weights"),
            (torch.randn(2, 16, 8), r"must be .* a layer has \(2, 16, 8\)"),
            ([torch.zeros(2, 8, 8), torch.zeros(2, 16, 16)], r"shapes \(2, 16, 16\) and \(2, 8, 8\)"),
            ([torch.zeros(2, 16, 16)] * 4, "a layer holds 4 .*known are G_LM"),
            ([torch.zeros(2, 16, 16), None], "a layer holds 2 .Tensor, NoneType.*known are G_LM"),
            ([], "a layer holds 0 .nothing.*known are G_LM"),
        ],
    )
    def test_what_else_a_pickle_may_hold_of_a_layer(self, tmp_path, layer, message):
        (tmp_path / "layers.pkl").write_bytes(pickle.dumps([layer, layer]))
        if message is None:
            load_predefined_G(tmp_path / "layers.pkl")
            return
        with pytest.raises(ValueError, match=message):
            load_predefined_G(tmp_path / "layers.pkl")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (pickle.dumps([1, 2]), "not one tensor per layer"),
            (pickle.dumps([]), "not one tensor per layer"),
            (pickle.dumps([torch.zeros(4, 4)]), "must be .layers, heads"),
            (pickle.dumps({"a": print}), "refused to load builtins.print"),
            (b"not a pickle", "not a pickle of tensors alone"),
            (b"", "not a pickle of tensors alone"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, content, message):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_predefined_G(tmp_path / "bad.pkl")


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


class TestUntrustedFiles:
    def test_payloads_do_not_run(self, tmp_path):
        """In a .pth, in a predefined operator, and in the storage bytes inside one."""
        target = tmp_path / "owned"
        pickle.loads(pickle.dumps(Payload(target)))  # noqa: S301 (shows that the payload works)
        assert target.exists()
        target.unlink()

        folder = tmp_path / "reference"
        shutil.copytree(FIXTURES / "v51-small", folder)
        for protocol_is_zip in (True, False):
            torch.save({"model_state_dict": {"x": Payload(target)}}, folder / "model-checkpoint.pth",
                       _use_new_zipfile_serialization=protocol_is_zip)  # fmt: skip
            with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
                load_model(folder)
        (folder / "model-checkpoint.pth").write_bytes(pickle.dumps(Payload(target)))
        with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
            load_model(folder)

        class Nested:
            def __reduce__(self):
                return (torch.storage._load_from_bytes, (pickle.dumps(Payload(target)),))

        for content in ([Payload(target)], [Nested()]):
            (tmp_path / "G.pkl").write_bytes(pickle.dumps(content))
            with pytest.raises(ValueError, match="not a pickle of tensors alone"):
                load_predefined_G(tmp_path / "G.pkl")
        assert not target.exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("hpdict={'num_layers': int(open('owned', 'w').write('x'))}", "num_layers.: int.* is not a literal"),
            ("hpdict={'num_layers': __import__('os').system('touch owned')}", "is not a literal"),
            ("hpdict={**open('owned', 'w')}", "is not a literal"),
            ("import os\nos.mkdir('owned')\n", "no dictionary 'hpdict"),
            ("hpdict=dict(num_layers=2)", "no dictionary 'hpdict"),
            ("hpdict={'num_layers': 2", "not a Python file"),
            ("hpdict={'num_layers': 2, 'd_model': 32}", "missing dff, input_vocab_size, max_seq_len, num_heads"),
        ],
    )
    def test_hyperparameters_are_read_not_run(self, tmp_path, monkeypatch, text, message):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(FIXTURES / "v51-small", tmp_path / "m")
        (tmp_path / "m" / "hyperparameters.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model("m")
        assert not (tmp_path / "owned").exists()

    def test_other_activations_are_refused(self, tmp_path):
        shutil.copytree(FIXTURES / "v51-small", tmp_path / "m")
        file = tmp_path / "m" / "hyperparameters.py"
        file.write_text(file.read_text().replace("F.silu", "'gelu'"))
        with pytest.raises(ValueError, match=r"activation must be F\.silu, got 'gelu'"):
            load_model(tmp_path / "m")


class TestDamagedFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        model = load_model(FIXTURES / "v51-small" / "hub")
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_missing_and_empty(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such model folder"):
            load_model(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"neither config\.json nor a \.pth"):
            load_model(tmp_path)

    def test_truncated(self, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="damaged safetensors"):
            load_model(folder)

    def test_one_flipped_bit_in_header_or_data(self, folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        for position in (0, 20, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[position] ^= 0x10
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"damaged|weights do not fit"):
                load_model(folder)
        file.write_bytes(content)
        load_model(folder)

    def test_values_that_are_not_finite(self, folder):
        state = load_file(folder / "model.safetensors")
        state["lm_head.bias"][3] = float("nan")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "SHA256SUMS").unlink()
        with pytest.raises(ValueError, match=r"lm_head\.bias holds NaN"):
            load_model(folder)

    def test_unknown_missing_and_misshaped_tensors_are_listed(self, folder):
        state = load_file(folder / "model.safetensors")
        del state["model.layers.1.mlp.up_proj.bias"]
        state["model.layers.7.extra"] = torch.zeros(2)
        state["lm_head.weight"] = torch.zeros(5, 32)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="weights do not fit") as error:
            load_model(folder)
        assert "1 missing (model.layers.1.mlp.up_proj.bias)" in str(error.value)
        assert "1 unknown (model.layers.7.extra)" in str(error.value)
        assert "1 mis-shaped (lm_head.weight (5, 32) instead of (97, 32))" in str(error.value)

    def test_reference_tensors_too(self, tmp_path):
        shutil.copytree(FIXTURES / "v51-small", tmp_path / "m")
        content = torch.load(tmp_path / "m" / "model-checkpoint.pth", weights_only=True)
        content["model_state_dict"].pop("final_layer.bias")
        content["model_state_dict"]["stray"] = torch.zeros(1)
        torch.save(content, tmp_path / "m" / "model-checkpoint.pth")
        with pytest.raises(ValueError, match=r"1 missing \(lm_head.bias\); 1 unknown \(stray\)"):
            load_model(tmp_path / "m")

    def test_configuration(self, folder):
        file = folder / "config.json"
        fields = json.loads(file.read_text())
        for change, message in [
            ({"model_type": "llama"}, "model_type must be 'pldrllm'"),
            ({"hidden_size": "big"}, "hidden_size"),
            ({"operator": "learnt"}, "operator must be one of"),
        ]:
            file.write_text(json.dumps(fields | change))
            with pytest.raises(ValueError, match=message):
                load_model(folder)
        file.write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            load_model(folder)

    def test_predefined_operator_missing(self, tmp_path):
        shutil.copytree(FIXTURES / "v51G-random", tmp_path / "m")
        (tmp_path / "m" / "predefined_G_LM.pkl").unlink()
        with pytest.raises(FileNotFoundError, match="needs its predefined operator"):
            load_model(tmp_path / "m")
        given = load_model(tmp_path / "m", g_lm=FIXTURES / "v51G-identity" / "predefined_G_LM.pkl")
        assert torch.equal(deductive_outputs(given, torch.tensor([[5]])).G_LM[0, 0, 0], torch.eye(16))

    def test_failed_conversion_leaves_nothing(self, folder, tmp_path):
        (folder / "model.safetensors").write_bytes(b"x" * 50)
        with pytest.raises(ValueError, match="damaged"):
            convert_checkpoint(folder, tmp_path / "out")
        with pytest.raises(ValueError, match=r"^to: must be one of"):
            convert_checkpoint(folder, tmp_path / "out", to="gguf")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


class TestStrictness:
    @pytest.fixture
    def folder(self, tmp_path):
        load_model(FIXTURES / "v51-small" / "hub").save_pretrained(tmp_path / "model", max_shard_size="100KB")
        return tmp_path / "model"

    def test_the_files_checked_are_the_files_loaded(self, folder):
        """A stray single file beside the shards would be what transformers reads."""
        save_file({"lm_head.bias": torch.zeros(97)}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"holds both model\.safetensors and"):
            load_model(folder)

    def test_every_file_must_be_in_the_sums(self, folder):
        sums = (folder / "SHA256SUMS").read_text().splitlines()
        (folder / "SHA256SUMS").write_text("\n".join(sums[1:]) + "\n")
        with pytest.raises(ValueError, match="does not list model-00001"):
            load_model(folder)

    def test_configuration_chooses_no_code(self, folder):
        """Attention kernels and quantisation backends named in a file would be fetched and run."""
        fields = json.loads((folder / "config.json").read_text())
        for name, value in [("attn_implementation", "owner/kernel"), ("quantization_config", {"quant_method": "x"})]:
            (folder / "config.json").write_text(json.dumps(fields | {name: value}))
            with pytest.raises(ValueError, match=rf"{name} is (not read from a file|read where its quant_method is)"):
                load_model(folder)
        (folder / "config.json").write_text(json.dumps(fields | {"_attn_implementation": "owner/kernel"}))
        assert load_model(folder).config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(
        "change",
        [{"layer_norm_eps": float("nan")}, {"rope_theta": float("inf")}, {"num_attention_heads": 0}, {"dtype": "garbage"},
         {"layer_types": ["x"]}, {"id2label": 3}],
    )  # fmt: skip
    def test_nonsense_in_the_configuration(self, folder, change):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_model(folder)

    @pytest.mark.parametrize(
        "index",
        ["[]", '{"weight_map": {"a": 5}}', "{", '{"weight_map": []}', json.dumps({"weight_map": {"a": "x" * 5000}})],
    )
    def test_nonsense_in_the_index(self, folder, index):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"damaged index|not valid JSON"):
            load_model(folder)

    def test_one_dtype(self, tmp_path):
        shutil.copytree(FIXTURES / "v51-small", tmp_path / "m")
        file = tmp_path / "m" / "hub" / "model.safetensors"
        state = load_file(file)
        state["final_layer.bias"] = state["final_layer.bias"].bfloat16()
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="must have one dtype, found bfloat16, float32"):
            load_model(tmp_path / "m" / "hub")
        content = torch.load(tmp_path / "m" / "model-checkpoint.pth", weights_only=True)
        content["model_state_dict"]["final_layer.bias"] = state["final_layer.bias"]
        torch.save(content, tmp_path / "m" / "model-checkpoint.pth")
        with pytest.raises(ValueError, match="must have one dtype, found bfloat16, float32"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize("state", [{}, {3: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, {"a": 5}])
    def test_nonsense_in_a_pth(self, tmp_path, state):
        shutil.copytree(FIXTURES / "v51G-random", tmp_path / "m")
        torch.save({"model_state_dict": state}, tmp_path / "m" / "model-checkpoint.pth")
        with pytest.raises(ValueError, match=r"no model_state_dict of named tensors|refused to load .*sparse_tensor"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize("content", [5, None, [()], {"a": 1}, torch.tensor(1.0), [torch.tensor(1.0)], ["ab"]])
    def test_nonsense_in_an_operator_file(self, tmp_path, content):
        (tmp_path / "G.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"not one tensor per layer|must be \[layers|a layer holds 0"):
            load_predefined_G(tmp_path / "G.pkl")

    def test_a_pickle_gets_no_hold_of_live_functions(self, tmp_path):
        before = torch._utils._rebuild_tensor_v2.__defaults__
        opcodes = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(X\x05\x00\x00\x00pwnedtstb."
        (tmp_path / "G.pkl").write_bytes(opcodes)
        with pytest.raises(ValueError, match="not a pickle of tensors alone"):
            load_predefined_G(tmp_path / "G.pkl")
        assert torch._utils._rebuild_tensor_v2.__defaults__ == before

    def test_hyperparameters_are_unambiguous(self, tmp_path):
        shutil.copytree(FIXTURES / "v51-small", tmp_path / "m")
        file = tmp_path / "m" / "hyperparameters.py"
        text = file.read_text()
        file.write_text(text + "\nhpdict['d_model'] = 64\n")
        with pytest.raises(ValueError, match="hpdict is used more than once"):
            load_model(tmp_path / "m")
        file.write_text(text)
        (tmp_path / "m" / "other-hyperparameters.py").write_text(text)
        with pytest.raises(ValueError, match=r"none is clearly that of model-checkpoint\.pth"):
            load_model(tmp_path / "m")
        (tmp_path / "m" / "model-hyperparameters.py").write_text(text)
        assert load_model(tmp_path / "m").config.num_hidden_layers == 2

    def test_what_a_layout_can_not_say(self, small_model, tmp_path):
        small_model(rope_theta=500.0).save_pretrained(tmp_path / "theta")
        with pytest.raises(ValueError, match=r"--to reference: rope_theta=500\.0 can not be expressed"):
            convert_checkpoint(tmp_path / "theta", tmp_path / "out", to="reference")
        assert not (tmp_path / "out").exists()
        fields = {"eos_token_id": 7, "pad_token_id": 5, "attention_dropout": 0.25}
        model = small_model(operator="constant", operator_init="random", operator_trainable=True, **fields)
        model.save_pretrained(tmp_path / "ours")
        for to in ("hub", "reference"):
            convert_checkpoint(tmp_path / "ours", tmp_path / to, to=to)
            back = load_model(tmp_path / to).config
            assert back.operator_trainable
            assert {name: getattr(back, name) for name in fields} == fields

    def test_an_identity_need_not_be_stored(self, tmp_path):
        shutil.copytree(FIXTURES / "v51G-identity" / "hub", tmp_path / "m")
        file = tmp_path / "m" / "model.safetensors"
        state = {name: tensor for name, tensor in load_file(file).items() if "past_G" not in name}
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="2 missing"):
            load_model(tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"custom_G_type": "identity"}))
        assert same_state(load_model(tmp_path / "m"), load_model(FIXTURES / "v51G-identity" / "hub"))

    def test_base_model_of_a_hub_folder(self):
        """`AutoModel`, without the head, also where G_LM is predefined."""
        from transformers import AutoModel

        for name in CASES:
            base = AutoModel.from_pretrained(FIXTURES / name / "hub")
            whole = load_model(FIXTURES / name / "hub").model.state_dict()
            assert all(torch.equal(tensor, whole[key]) for key, tensor in base.state_dict().items())


# --- a model with its tokenizer -------------------------------------------------------------------------------------


def test_model_and_tokenizer_from_files(small_model, toy_tokenizer, toy_model_file, tmp_path):
    model = small_model(vocab_size=290)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_with_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_with_tokenizer(tmp_path, tmp_path / "none.model")
    assert len(load_with_tokenizer(tmp_path, toy_model_file)[1]) == 290
    toy_tokenizer.save_pretrained(tmp_path)
    assert same_state(load_with_tokenizer(tmp_path)[0], model)
    loaded, tokenizer = load_with_tokenizer(str(tmp_path), dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert len(tokenizer) == 290


def test_model_and_tokenizer_that_are_loaded(small_model, toy_tokenizer, toy_model_file):
    """They are handed back as they are; another dtype is a copy's."""
    model = small_model(vocab_size=290)
    found = load_with_tokenizer(model, toy_tokenizer, device="cpu", dtype="float32")
    assert found[0] is model
    assert found[1] is toy_tokenizer
    assert len(load_with_tokenizer(model, toy_model_file)[1]) == 290
    other, _ = load_with_tokenizer(model, toy_tokenizer, dtype="bfloat16")
    assert other.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert load_with_tokenizer(other, toy_tokenizer)[0] is other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype: must be auto, float32 or bfloat16, got 'float16'"),
        ({"device": "no-such"}, "device: no-such can not be used here"),
        ({"device": "meta"}, "device: meta can not be used here"),
        ({"rope": "halves"}, "rope, g_lm: apply to files in the reference layout"),
        ({"tokenizer": None}, "tokenizer: a model that is loaded already has none beside it"),
    ],
)
def test_what_can_not_be_loaded_together(options, message, small_model, toy_tokenizer):
    with pytest.raises(ValueError, match=message):
        load_with_tokenizer(small_model(vocab_size=290), **({"tokenizer": toy_tokenizer} | options))
    with pytest.raises(ValueError, match="tokenizer: has 290 tokens, the model has vocab_size=97"):
        load_with_tokenizer(small_model(), toy_tokenizer)


# --- freezing -------------------------------------------------------------------------------------------------------


def test_freeze_checkpoint(small_model, toy_tokenizer, tmp_path):
    """What `freeze` does to a model, written with its tokenizer."""
    model = small_model(vocab_size=290)
    model.save_pretrained(tmp_path / "learned")
    toy_tokenizer.save_pretrained(tmp_path / "learned")
    texts = ["the cat sat on a mat", "a dog ran"]
    result = freeze_checkpoint(tmp_path / "learned", tmp_path / "frozen", prompts=texts, trainable=True)
    frozen, before = result.model, result.parameters_before
    assert before == model.num_parameters() > frozen.num_parameters()
    ids = [torch.tensor(toy_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    written = load_model(tmp_path / "frozen")
    assert same_state(written, freeze(model, ids, trainable=True))
    assert written.config.operator_trainable
    assert len(load_tokenizer(tmp_path / "frozen")) == 290

    one = freeze_checkpoint(tmp_path / "learned", tmp_path / "one", prompts=texts[0]).model
    assert not same_state(one, written)
    other = freeze_checkpoint(tmp_path / "learned", tmp_path / "other", g_lm=tmp_path / "frozen").model
    assert same_state(other, written)
    assert not other.config.operator_trainable


def test_what_freeze_checkpoint_refuses(small_model, toy_model_file, tmp_path):
    small_model(vocab_size=290).save_pretrained(tmp_path / "m")
    for arguments in ({}, {"prompts": []}, {"prompts": ["a"], "g_lm": tmp_path / "m"}):
        with pytest.raises(ValueError, match="pass either prompts"):
            freeze_checkpoint(tmp_path / "m", tmp_path / "out", **arguments)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        freeze_checkpoint(tmp_path / "m", tmp_path / "out", prompts="a cat")
    with pytest.raises(ValueError, match="prompt: is empty"):
        freeze_checkpoint(tmp_path / "m", tmp_path / "out", prompts=["a cat", ""], tokenizer=toy_model_file)
    with pytest.raises(ValueError, match="this model computes its G_LM"):
        freeze_checkpoint(tmp_path / "m", tmp_path / "out", g_lm=tmp_path / "m")
    with pytest.raises(FileExistsError, match="not empty"):
        freeze_checkpoint(tmp_path / "m", tmp_path / "m", prompts="a cat", tokenizer=toy_model_file)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
