"""The fixtures of more than one file. Plain functions that tests share are in helpers.py; no test file imports another.

`make test` runs files side by side, each file whole in one process (pytest-xdist, --dist loadfile). Every process makes the
fixtures of a session for itself: those here take less than a second; a dearer one belongs into the one file that uses it.
"""

import gc
import io
import os
import signal
import sys

# The models of tests are too small to share out among threads, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

from pldr import PldrConfig, PldrForCausalLM, load_model, load_tokenizer
from pldr.cli import main
from pldr.models.shipped import STORIES
from pldr.provenance import weights_digest
from pldr.tokenizer import train_sentencepiece

pytest.register_assert_rewrite("helpers")  # its assertions say what they compared, as those of tests do
from helpers import WORDS, toy_recipe, write_texts  # noqa: E402


def pytest_configure():
    """What a script starts in the background ignores Ctrl-C, and so would the processes that tests start and then interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """GPU tests are skipped without a GPU, unless PLDR_REQUIRE_GPU=1 says that there must be one."""
    if torch.cuda.is_available() or os.environ.get("PLDR_REQUIRE_GPU") == "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """The Trainer collects garbage at its end: a third of a toy run, unless it need not look at what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised data of tests does not land in the user's cache."""
    os.environ["PLDR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    """The library's own bars would be taken for what a command prints."""
    logging.disable_progress_bar()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `pldr ARGS…` in this process; returns (exit code, standard output, standard error)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["pldr", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def small_config():
    def make(**overrides):
        fields = {
            "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 85, "metric_learner_units": 2, "metric_learner_width": 24,
            "max_position_embeddings": 64, "eos_token_id": 3,
        }  # fmt: skip
        return PldrConfig(**(fields | overrides))

    return make


@pytest.fixture
def small_model(small_config):
    def make(seed=0, **overrides):
        torch.manual_seed(seed)
        return PldrForCausalLM(small_config(**overrides)).eval()

    return make


@pytest.fixture
def ids():
    """[3, 16] token ids without special tokens."""
    return torch.randint(4, 97, (3, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def toy_model_file(tmp_path_factory):
    """A SentencePiece model of 290 pieces, trained with the library's own function on a few sentences."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) + f" {n}." for n in range(400)
    ]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "toy.model", vocab_size=290)


@pytest.fixture(scope="session")
def toy_tokenizer(toy_model_file):
    return load_tokenizer(toy_model_file)


@pytest.fixture(scope="session")
def stories():
    """The model that ships with pldr and its tokenizer, loaded once; a test that changes the model changes a copy."""
    model = load_model(STORIES)
    before = weights_digest(model.state_dict())
    yield model, load_tokenizer(STORIES)
    assert weights_digest(model.state_dict()) == before, "a test changed the model that others use"


@pytest.fixture
def folder(tmp_path, toy_tokenizer):
    """A fresh model of the toy tokenizer's vocabulary, saved with it: tmp_path/model."""
    torch.manual_seed(0)
    config = PldrConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        metric_learner_units=2, metric_learner_width=24, max_position_embeddings=64,
    )  # fmt: skip
    PldrForCausalLM(config).save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path):
    """Twelve files of toy text: tmp_path/texts/00.txt to 11.txt."""
    return write_texts(tmp_path / "texts")


@pytest.fixture
def write_recipe(tmp_path, texts, toy_model_file):
    """Write tmp_path/recipe.yaml, a run of seconds into tmp_path/out; changes as `helpers.toy_recipe` takes them."""

    def write(**changes):
        (tmp_path / "recipe.yaml").write_text(
            toy_recipe(texts, toy_model_file, **({"output": tmp_path / "out"} | changes))
        )
        return tmp_path / "recipe.yaml"

    return write
