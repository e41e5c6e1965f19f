"""Classification, question answering and choices on the decoder stack."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import pldr
from helpers import TINY
from pldr import (
    PldrConfig,
    PldrForMultipleChoice,
    PldrForQuestionAnswering,
    PldrForSequenceClassification,
    PldrForTokenClassification,
    convert_checkpoint,
    freeze,
    load_model,
)
from pldr.checkpoints.load import load_with_head

LABELS = {"id2label": {0: "calm", 1: "stormy", 2: "foggy"}, "label2id": {"calm": 0, "stormy": 1, "foggy": 2}}
CLASSES = {
    "ForSequenceClassification": PldrForSequenceClassification,
    "ForTokenClassification": PldrForTokenClassification,
    "ForQuestionAnswering": PldrForQuestionAnswering,
}


def made(kind, **changes):
    torch.manual_seed(4)
    return kind(PldrConfig(**({"vocab_size": 50} | TINY | LABELS | changes))).eval()


def text(length, seed=0):
    return torch.randint(4, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def outputs(model, ids, **settings):
    with torch.no_grad():
        found = model(ids, **settings)
    return torch.stack((found.start_logits, found.end_logits), -1) if "start_logits" in found else found.logits


@pytest.mark.parametrize("operator", ["learned", "constant"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*CLASSES.values(), PldrForMultipleChoice])
def test_padding_on_either_side_changes_nothing(kind, side, operator):
    model = made(kind, operator=operator, operator_init="random")
    alone = [text(length, seed=length) for length in (5, 9)]
    padding = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(5, None)] = 0
    padded = torch.cat((padding, alone[0]) if side == "left" else (alone[0], padding), 1)
    batch = torch.cat((padded, alone[1]))
    if kind is PldrForMultipleChoice:
        together = outputs(model, batch[None], attention_mask=mask[None])[0]
        expected = [outputs(model, ids[None])[0, 0] for ids in alone]
    else:
        together, expected = outputs(model, batch, attention_mask=mask), [outputs(model, ids)[0] for ids in alone]
        if kind is not PldrForSequenceClassification:  # an output a token
            together = [row[kept.bool()] for row, kept in zip(together, mask, strict=True)]
    for found, right in zip(together, expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5), (found - right).abs().max()


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("operator", ["learned", "constant"])
def test_the_published_heads_are_written_and_read(head, operator, tmp_path):
    """By module names and label fields of the published port; the tensors of a head are a linear layer's there, too."""
    model = made(CLASSES[head], operator=operator, operator_init="random", classifier_dropout=0.2)
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "hub", to="hub")
    fields = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert fields["architectures"] == [f"Pldrllm{head}"]
    assert "auto_map" not in fields  # there is no code beside it
    assert fields["id2label"] == {"0": "calm", "1": "stormy", "2": "foggy"}
    assert fields["classifier_dropout"] == 0.2
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert not any(name.startswith(("final_layer", "model.")) for name in stored)
    name = "qa_outputs" if head == "ForQuestionAnswering" else "score"
    assert torch.equal(stored[f"{name}.weight"], model.get_submodule(name).weight)
    assert (f"{name}.bias" in stored) == (head != "ForSequenceClassification")
    ids = text(7)
    expected = outputs(model, ids)
    # What the published port computes of hidden states: a linear layer on each, of the last token alone for a whole text.
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        by_hand = hidden @ stored[f"{name}.weight"].T + stored.get(f"{name}.bias", 0)
    assert torch.allclose(expected, by_hand[:, -1] if head == "ForSequenceClassification" else by_hand, atol=1e-6)
    convert_checkpoint(tmp_path / "hub", tmp_path / "back")
    for folder in ("ours", "hub", "back"):
        for loaded in (load_with_head(tmp_path / folder), CLASSES[head].from_pretrained(tmp_path / folder).eval()):
            assert type(loaded) is CLASSES[head]
            assert loaded.config.id2label == LABELS["id2label"]
            assert torch.equal(outputs(loaded, ids), expected)


def test_a_head_is_put_on_a_language_models_stack(small_model, tmp_path):
    small_model(operator="learned").save_pretrained(tmp_path)
    autos = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
    for auto, kind in zip(autos, CLASSES.values(), strict=True):
        model = auto.from_pretrained(tmp_path, num_labels=3)
        assert type(model) is kind
        stored = load_model(tmp_path).model.state_dict()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in model.model.state_dict().items())
    frozen = freeze(load_model(tmp_path), text(8))
    frozen.save_pretrained(tmp_path / "frozen")
    model = PldrForSequenceClassification.from_pretrained(tmp_path / "frozen", num_labels=2)
    assert model.config.operator == "constant"
    assert outputs(model, text(5)).shape == (1, 2)


@pytest.mark.parametrize("operator", ["learned", "constant"])
def test_a_head_learns(operator):
    """Which of two words a text holds: three passes over it are enough."""
    model = made(PldrForSequenceClassification, operator=operator, id2label=None, label2id=None).train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 50, (64, 8), generator=generator)
    labels = torch.randint(2, (64,), generator=generator)
    ids[torch.arange(64), torch.randint(8, (64,), generator=generator)] = 4 + labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.3


def test_choices_have_the_loss_of_their_scores():
    model = made(PldrForMultipleChoice)
    ids = torch.stack([torch.cat([text(6, seed=3 * b + c) for c in range(3)]) for b in range(2)])
    with torch.no_grad():
        found = model(ids, labels=torch.tensor([2, 0]))
    assert found.logits.shape == (2, 3)
    assert found.loss == pytest.approx(float(-found.logits.log_softmax(-1)[[0, 1], [2, 0]].mean()))


def test_pipelines_read_a_saved_head(toy_tokenizer, tmp_path):
    texts = ["the cat sat", "the dog who ran to town"]
    model = made(PldrForSequenceClassification, vocab_size=len(toy_tokenizer))
    model.save_pretrained(tmp_path / "texts")
    toy_tokenizer.save_pretrained(tmp_path / "texts")
    found = pipeline("text-classification", str(tmp_path / "texts"))(texts, batch_size=2, top_k=None)
    for text_, classes in zip(texts, found, strict=True):
        expected = outputs(model, toy_tokenizer(text_, return_tensors="pt")["input_ids"])[0].softmax(-1)
        for label in classes:
            assert label["score"] == pytest.approx(float(expected[LABELS["label2id"][label["label"]]]), abs=1e-5)
    made(PldrForTokenClassification, vocab_size=len(toy_tokenizer)).save_pretrained(tmp_path / "tokens")
    toy_tokenizer.save_pretrained(tmp_path / "tokens")
    words = pipeline("ner", str(tmp_path / "tokens"), aggregation_strategy="simple")(texts[1])
    assert {word["entity_group"] for word in words} <= set(LABELS["label2id"])
    assert words[-1]["end"] == len(texts[1])


@pytest.mark.slow
def test_the_example_classifies(monkeypatch, capsys, tmp_path):
    example = Path(__file__).parents[1] / "examples/classify_passages.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--epochs", "0.02", "--output", str(tmp_path / "classifier")])
    runpy.run_path(str(example), run_name="__main__")
    assert "844 passages to learn from, 69 others" in capsys.readouterr().out
    assert load_with_head(tmp_path / "classifier").config.id2label[3] == "The Moonstone"


def test_what_can_not_be_is_told(tmp_path):
    made(PldrForMultipleChoice).save_pretrained(tmp_path / "choices")
    for to in ("hub", "reference"):
        with pytest.raises(ValueError, match="has no class ForMultipleChoice"):
            convert_checkpoint(tmp_path / "choices", tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"is a PldrForMultipleChoice, not a language model; load it with pldr\."):
        pldr.load_model(tmp_path / "choices")
