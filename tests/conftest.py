import os
from pathlib import Path

# The models of tests are too small to share out among threads, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

from pldr import PldrConfig, PldrForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("PLDR_SHARED", Path(__file__).parents[2] / "shared"))

# What the toy tokenizer and the toy texts are made of.
SENTENCE = "the cat sat on a mat and saw that dog who ran to see him at her red house in old town"
WORDS = SENTENCE.split()


def pytest_collection_modifyitems(items):
    """GPU tests are skipped without a GPU, unless PLDR_REQUIRE_GPU=1 says that there must be one."""
    if torch.cuda.is_available() or os.environ.get("PLDR_REQUIRE_GPU") == "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def shared(path: str) -> Path:
    """A file of the development data, or a skip where that is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"development data not here: {path}")
    return SHARED / path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised data of tests does not land in the user's cache."""
    os.environ["PLDR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    """The library's own bars would be taken for what a command prints."""
    logging.disable_progress_bar()


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
    from pldr.tokenizer import train_sentencepiece

    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) + f" {n}." for n in range(400)
    ]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "toy.model", vocab_size=290)


@pytest.fixture(scope="session")
def toy_tokenizer(toy_model_file):
    from pldr.tokenizer import load_tokenizer

    return load_tokenizer(toy_model_file)
