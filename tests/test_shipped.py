"""The model that ships with pldr keeps what its card says."""

import copy
import json
import lzma

import pytest
import torch

from helpers import shared
from pldr import freeze
from pldr.generation import generate_text
from pldr.models.shipped import STORIES


@pytest.fixture(scope="module")
def frozen(stories):
    model, tokenizer = stories
    calibration = "The old man went down to the harbour, and there he sat by the water until the boats came home. " * 4
    return freeze(copy.deepcopy(model), torch.tensor([tokenizer(calibration)["input_ids"]]))


@pytest.fixture(scope="module")
def held_out():
    with lzma.open(shared("data/books/val.jsonl.xz"), "rt") as books:
        return [json.loads(line)["text"] for line in books]


@pytest.fixture(scope="module")
def continuations(stories, frozen):
    """Greedy, some tokens of a prompt: without a cache, with keys and values kept, with G_LM kept too, with G_LM frozen."""
    model, tokenizer = stories
    modes = ((model, "none"), (model, "kv"), (model, "kv+g"), (frozen, "kv"))

    def of(prompt, tokens=32):
        settings = {"max_new_tokens": tokens, "ignore_end": True}
        return [generate_text(one, tokenizer, prompt, cache=cache, **settings).token_ids for one, cache in modes]

    return of


def test_files():
    sizes = [file.stat().st_size for file in STORIES.iterdir()]
    assert sum(sizes) <= 25e6
    assert max(sizes) <= 15e6
    card = (STORIES / "README.md").read_text()
    assert card.count("\n| ") >= 177
    config = json.loads((STORIES / "config.json").read_text())
    assert config["operator"] == "learned"
    assert config["dtype"] == "float32"  # what it is loaded as, also by transformers alone


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Once upon a time there was a little girl who", 12),
        *(
            pytest.param(prompt, 32, marks=pytest.mark.slow)
            for prompt in (
                "Once upon a time there was a little girl who",
                "The captain looked at the ship and said",
                "“Where are you going?” asked the",
            )
        ),
    ],
)
def test_every_mode_continues_alike(continuations, prompt, tokens):
    first, *others = continuations(prompt, tokens)
    assert all(other == first for other in others)


@pytest.mark.slow
@torch.no_grad()
def test_frozen_loss_on_held_out_books(stories, held_out):
    model, tokenizer = stories
    rows = []
    for text in held_out:
        start = len(text) // 3
        ids = tokenizer(text[start : start + 60_000])["input_ids"]
        rows += [ids[i : i + 512] for i in range(0, 8 * 512, 512)]
    passages = torch.tensor([row for row in rows if len(row) == 512])
    assert len(passages) >= 40
    frozen = freeze(copy.deepcopy(model), passages[:1])
    full, constant = (
        sum(float(m(part, labels=part, use_cache=False).loss) * len(part) for part in passages.split(8)) / len(passages)
        for m in (model, frozen)
    )
    assert full == pytest.approx(3.779, abs=1e-3)
    assert abs(constant - full) <= 1e-5


@pytest.mark.slow
def test_greedy_continuations_of_held_out_prompts(continuations, held_out):
    prompts = []
    for text in held_out:
        for part in range(1, 5):
            start = text.find(". ", len(text) * part // 6) + 2
            prompts.append(" ".join(text[start : start + 160].split()[:16]))
    same = [len({tuple(ids) for ids in continuations(prompt)}) == 1 for prompt in prompts[:20]]
    assert sum(same) >= 19
