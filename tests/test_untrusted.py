"""Files made to harm: nothing in them is run, memory and time stay in proportion to them, and the error is one line."""

import io
import json
import os
import pickle
import shutil
import signal
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import FIXTURES, fails, shared
from pldr import PldrConfig, load_model, load_predefined_G, load_tokenizer
from pldr.layouts import tensor_count
from pldr.provenance import weights_digest


@pytest.fixture(autouse=True)
def no_waiting():
    """A reader that hangs fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still reading after a minute"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tmp_path):
    load_model(FIXTURES / "v51-small" / "hub").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reference(tmp_path):
    shutil.copytree(FIXTURES / "v51-small", tmp_path / "reference")
    return tmp_path / "reference"


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- pickles --------------------------------------------------------------------------------------------------------


class Tensor:
    """Pickled as a tensor of any size, stride and offset, whatever its storage holds."""

    def __init__(self, storage, size, stride, offset=0):
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return (torch._utils._rebuild_tensor_v2, self.arguments)


class Bytes:
    """Pickled as a storage of these bytes."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return (torch.storage._load_from_bytes, (self.content,))


def stored(values, claim=None):
    """A storage as torch pickles it, that may say it has more values than there are."""
    stream = io.BytesIO()
    torch.save(torch.zeros(values)._typed_storage(), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    if claim is not None:
        content = content.replace(b"K" + bytes([values]), b"M" + struct.pack("<H", claim))
    return Bytes(content)


class Stored:
    """Stands for a storage of a zip file."""


def pth(file, *tensors, values=16, record=None, compression=zipfile.ZIP_STORED):
    """A .pth with tensors of one storage that says it has `values` values, and has the bytes of `record`."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", values) if isinstance(item, Stored) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"model_state_dict": {str(index): tensor for index, tensor in enumerate(tensors)}})
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x/data.pkl", stream.getvalue())
        archive.writestr("x/data/0", bytes(4 * values) if record is None else record)


SHAPES = [
    ((8, 32, 32), (1024, 32, 1), 0, "larger than what the file holds"),  # more than the storage: memory of the process
    ((4, 2, 2), (4, 2, 1), 1, "larger than what the file holds"),
    ((4, 2, 2), (4, 2, 1), -4, "no sizes"),
    ((4, -2, -2), (4, 2, 1), 0, "no sizes"),
    ((4, 2, 2.0), (4, 2, 1), 0, "no sizes"),
    ((1 << 40, 1, 1), (0, 1, 1), 0, "not contiguous"),
    ((4, 4, 4), (1, 1, 1), 0, "not contiguous"),
    ((4, 2, 2), (1, 4, 8), 0, "not contiguous"),
    ((4, 2, 2), (2, 1), 0, "shorter"),
]


@pytest.mark.parametrize(("size", "stride", "offset", "message"), SHAPES)
def test_tensors_that_are_not_what_is_stored(tmp_path, reference, size, stride, offset, message):
    (tmp_path / "G.pkl").write_bytes(pickle.dumps([Tensor(stored(16), size, stride, offset)]))
    with pytest.raises(ValueError, match=f"not a pickle of tensors alone .*{message}"):
        load_predefined_G(tmp_path / "G.pkl")
    pth(reference / "model-checkpoint.pth", Tensor(Stored(), size, stride, offset))
    with pytest.raises(ValueError, match=f"not a checkpoint of tensors alone .*{message}"):
        load_model(reference)


def test_what_is_whole_is_read(tmp_path, reference):
    """The same files with nothing wrong in them."""
    G_LM = torch.randn(2, 2, 4, 4)
    content = pickle.dumps([(layer[None], layer[None]) for layer in G_LM.unbind()])
    (tmp_path / "G.pkl").write_bytes(content)
    assert torch.equal(load_predefined_G(tmp_path / "G.pkl"), G_LM)
    pth(reference / "model-checkpoint.pth", Tensor(Stored(), (4, 1, 4), (4, 99, 1)))
    with pytest.raises(ValueError, match="asks for 139 tensors, and 1 are stored"):
        load_model(reference)


def test_storages_that_say_more_than_they_hold(tmp_path, reference):
    assert load_predefined_G_of(tmp_path, [Tensor(stored(16), (4, 2, 2), (4, 2, 1))]).shape == (1, 4, 2, 2)
    with pytest.raises(ValueError, match="a storage of 4096 values has 64 bytes"):
        load_predefined_G_of(tmp_path, [Tensor(stored(16, 4096), (16, 16, 16), (256, 16, 1))])
    pth(reference / "model-checkpoint.pth", Tensor(Stored(), (64, 64), (64, 1)), values=4096, record=bytes(64))
    with pytest.raises(ValueError, match="a storage of 4096 values has 64 bytes"):
        load_model(reference)


def load_predefined_G_of(tmp_path, content):
    (tmp_path / "G.pkl").write_bytes(pickle.dumps(content))
    return load_predefined_G(tmp_path / "G.pkl")


def test_small_pickles_of_much(tmp_path, reference):
    """One storage in a thousand tensors, compressed data, and a place for four thousand million objects."""
    storage = stored(4096)
    with pytest.raises(ValueError, match="larger than what the file holds"):
        load_predefined_G_of(tmp_path, [Tensor(storage, (1, 64, 64), (4096, 64, 1)) for _ in range(1000)])
    pth(reference / "model-checkpoint.pth", *[Tensor(Stored(), (64, 64), (64, 1)) for _ in range(1000)], values=4096)
    with pytest.raises(ValueError, match="larger than what the file holds"):
        load_model(reference)
    pth(reference / "model-checkpoint.pth", Tensor(Stored(), (4, 4), (4, 1)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        load_model(reference)
    (tmp_path / "G.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    with pytest.raises(ValueError, match="not one tensor per layer"):
        load_predefined_G(tmp_path / "G.pkl")
    with pytest.raises(ValueError, match="not one tensor per layer"):
        load_predefined_G_of(tmp_path, torch.empty(1 << 40, 0, 1))


def test_torchs_older_format_is_refused(reference):
    """It can name a storage whose bytes it leaves out."""
    file = reference / "model-checkpoint.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
        load_model(reference)


def test_errors_do_not_say_how_to_load_it_anyway(tmp_path, reference):
    torch.save({"model_state_dict": {"x": print}}, reference / "model-checkpoint.pth")
    with pytest.raises(ValueError, match=r"refused to load .*print") as error:
        load_model(reference)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", ["PLDRv51-110M-1", "RANDOM_NORMAL-paper", "IDENTITY-paper"])
def test_the_published_pickles_bit_for_bit(name):
    file = shared(f"data/G_LM-{name}.pkl")

    class Plain(pickle.Unpickler):  # torch's own reader, on the CPU
        def find_class(self, module, function):
            if function == "_load_from_bytes":
                return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return super().find_class(module, function)

    with file.open("rb") as stream:
        expected = torch.cat([layer[-1] if isinstance(layer, tuple) else layer for layer in Plain(stream).load()])
    assert torch.equal(load_predefined_G(file), expected)


def test_a_checkpoint_with_more_than_weights(reference):
    """An optimiser's state, parameters and numbers beside the weights, as training leaves them."""
    expected = load_model(reference).state_dict()
    file = reference / "model-checkpoint.pth"
    content = torch.load(file, weights_only=True)
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    module = torch.nn.Linear(2, 2)  # its state has metadata
    torch.save(
        content
        | {"optimizer_state_dict": optimizer.state_dict(), "epoch": 3, "other": module.state_dict(), "p": weight},
        file,
    )
    assert weights_digest(load_model(reference).state_dict()) == weights_digest(expected)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_numbers_that_are_no_weights(tmp_path, folder, reference, dtype):
    kind = getattr(torch, dtype)
    file = folder / "model.safetensors"
    save_file({name: tensor.to(kind) for name, tensor in load_file(file).items()}, file)
    (folder / "SHA256SUMS").unlink()
    content = torch.load(reference / "model-checkpoint.pth", weights_only=True)
    state = {name: tensor.to(kind) for name, tensor in content["model_state_dict"].items()}
    torch.save({"model_state_dict": state}, reference / "model-checkpoint.pth")
    for place in (folder, reference):
        with pytest.raises(ValueError, match=f"the tensors are {dtype}; weights are float32"):
            load_model(place)
    save_file({"G_LM": torch.ones(1, 1, 2, 2).to(kind)}, tmp_path / "G.safetensors")
    (tmp_path / "G.pkl").write_bytes(pickle.dumps(list(torch.ones(1, 1, 2, 2).to(kind))))
    for file in ("G.safetensors", "G.pkl"):
        with pytest.raises(ValueError, match=f"the tensors are {dtype}; weights are float32"):
            load_predefined_G(tmp_path / file)


# --- what else lies in a folder -------------------------------------------------------------------------------------


def test_an_adapter_is_not_applied_unseen(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: adapters are not applied"):
        load_model(folder)


def test_nothing_is_read_but_what_was_checked(folder, monkeypatch):
    """Neither generation settings nor whatever a later version of the library looks for: it is given no path."""
    before = weights_digest(load_model(folder).state_dict())
    (folder / "generation_config.json").write_text('{"do_sample": true, "repetition_penalty": 9.0}')
    (folder / "pytorch_model.bin").write_bytes(b"not weights")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    settings = load_model(folder).generation_config
    assert (settings.do_sample, settings.repetition_penalty) != (True, 9.0)
    assert weights_digest(load_model(folder).state_dict()) == before
    assert load_model(folder).name_or_path == str(folder)


def test_a_tensor_under_two_names(tmp_path):
    shutil.copytree(FIXTURES / "v51-small" / "hub", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.bias": state["final_layer.bias"] + 1}, file)
    with pytest.raises(ValueError, match=r"holds lm_head\.bias twice"):
        load_model(tmp_path / "m")


def test_a_packed_operator_of_other_sizes(tmp_path):
    shutil.copytree(FIXTURES / "v51G-random" / "hub", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"decoder.past_G_values": torch.zeros(1 << 40, 3, 1, 2, 16, 0)}, file)
    with pytest.raises(ValueError, match=r"past_G_values must be \(2, 3, 1, 2, 16, 16\), got \(1099511627776, 3"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "SHA256SUMS", "certificate.json", "adapter_config.json"]
)
@pytest.mark.filterwarnings("error")
def test_links_to_nowhere_are_not_files_that_are_absent(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)
    with pytest.raises((ValueError, OSError, UserWarning), match=name):
        load_model(folder)


def test_a_file_that_is_not_there_is_named(tmp_path, folder, reference):
    load_model(folder).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index\.json: names model-00002-of-00003\.safetensors, which is missing"
    ):
        load_model(tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(folder)
    file = reference / "hyperparameters.py"
    file.write_text(file.read_text().replace("d_model", "width"))
    with pytest.raises(ValueError, match=r"hyperparameters\.py: missing d_model"):
        load_model(reference)


def test_operators_that_do_not_fit_name_their_file(tmp_path):
    shutil.copytree(FIXTURES / "v51G-random", tmp_path / "m")
    file = tmp_path / "m" / "predefined_G_LM.pkl"
    file.write_bytes(pickle.dumps(list(torch.ones(3, 2, 16, 16))))
    with pytest.raises(ValueError, match=r"predefined_G_LM\.pkl, with hyperparameters\.py: G_LM: has 3 layers"):
        load_model(tmp_path / "m")
    file.write_bytes(pickle.dumps(list(torch.full((2, 2, 16, 16), torch.nan))))
    with pytest.raises(ValueError, match=r"predefined_G_LM\.pkl: G_LM: layer 0, head 0 holds NaN or infinite"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "SHA256SUMS", "anything", "subfolder/anything"])
def test_pipes_in_a_model_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match=f"{name}: is a pipe or a device"):
        load_model(folder)


def test_pipes_and_devices_in_place_of_files(tmp_path, reference):
    for name in ("pipe.pth", "pipe.pkl", "pipe.model", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
    for read, name in ((load_model, "pipe.pth"), (load_tokenizer, "pipe.model"),
                       (load_predefined_G, "pipe.pkl"), (load_predefined_G, "pipe.safetensors")):  # fmt: skip
        with pytest.raises(OSError, match="is a pipe or a device"):
            read(tmp_path / name)
    (tmp_path / "zero.pkl").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="is a pipe or a device"):
        load_predefined_G(tmp_path / "zero.pkl")
    (reference / "hyperparameters.py").unlink()
    os.mkfifo(reference / "hyperparameters.py")
    with pytest.raises(OSError, match="is a pipe or a device"):
        load_model(reference / "model-checkpoint.pth")


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    {}, {"num_hidden_layers": 1, "metric_learner_units": 1, "metric_learner_glus": 1}, {"operator": "constant"},
    {"num_hidden_layers": 3, "metric_learner_units": 2, "metric_learner_glus": 4},
])  # fmt: skip
def test_tensors_are_counted_without_making_them(small_model, config):
    model = small_model(**config)
    assert tensor_count(model.config) == len(model.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1000}, "asks for 67,005 tensors, and 139 are stored"),
        ({"metric_learner_units": 4000}, "tensors, and 139 are stored"),
        ({"metric_learner_glus": 4000}, "tensors, and 139 are stored"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers must be at most 4,096, got 1,000,000"),
        ({"metric_learner_width": 10**12}, "metric_learner_width must be at most 1,048,576"),
        ({"vocab_size": 10**12}, "vocab_size must be at most"),
        ({"max_position_embeddings": 10**8}, "max_position_embeddings must be at most"),
        ({"max_position_embeddings": 1 << 24}, "a rotary table of more than 134,217,728 numbers"),
        ({"num_labels": 1_000_000}, "num_labels must be an integer from 1 to 65536"),
        ({"per_layer_config": {"0": {"hidden_size": 64}}}, r"unknown field\(s\) per_layer_config"),
        ({"dtype": "load"}, "dtype must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_sizes_that_no_tensor_has(folder, fields, message):
    """Refused before anything is made of them."""
    change(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_configuration_names_no_kernel():
    for name in ("eager", "sdpa", "flex_attention"):
        assert PldrConfig(attn_implementation=name)._attn_implementation == name
    for name in ("owner/kernel", {"": "owner/kernel"}):
        with pytest.raises(ValueError, match="attn_implementation must be one of"):
            PldrConfig(attn_implementation=name)
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' needs the package flash_attn"):
        PldrConfig(attn_implementation="flash_attention_2")


def test_a_recipe_names_no_kernel(run, write_recipe):
    fails(run("train", write_recipe(model={"config": {"attn_implementation": "owner/kernel"}})),
          "attn_implementation must be one of ('eager', 'sdpa', 'flex_attention', 'flash_attention_2', 'flash_attention_3'), got 'owner/kernel'")  # fmt: skip


# --- names ----------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_shown(run, folder):
    change(folder / "config.json", operator="\x1b]0;owned\x07\x9b31m")
    fails(run("info", folder), r"got '\x1b]0;owned\x07\x9b31m'")
    code, _, err = run("info", f"{folder}\x1b[31m")
    assert code == 1
    assert r"\x1b[31m: no such model folder" in err
    assert "\x1b" not in err


def test_names_need_not_be_utf8(run, folder, tmp_path):
    """Those of weights must; others are printed as escapes."""
    fails(
        run("convert", folder, f"{tmp_path}/out\udcff"), r"out\udcff: is not valid UTF-8; choose another output folder"
    )
    fails(run("info", f"{tmp_path}/none\udcff"), r"none\udcff: no such model folder")
    page = f"{tmp_path}/page\udcff.html"
    code, shown, _ = run("inspect", FIXTURES / "v51G-random" / "predefined_G_LM.pkl", "--html", page)
    assert code == 0
    assert shown.endswith("page\\udcff.html\n")
    assert os.path.exists(page)
