"""The demo on a recipe of seconds, and the losses of the modes by separate computations."""

import json

import pytest
import torch

from pldr import freeze, load_model
from pldr.evaluation.modes import MODES, OperatorModes


@pytest.mark.slow
def test_demo_measures_what_it_says(write_recipe, tmp_path, monkeypatch):
    from pldr.study import demo

    monkeypatch.setattr(demo, "REFERENCE_PROMPT", "the cat sat on")
    for name, value in {"NEW_TOKENS": 12, "REPEATS": 1, "PASSAGES": 5, "STORY_LENGTH": 128}.items():
        monkeypatch.setattr(demo, name, value)
    path = write_recipe(optimization__steps=20, data__sequence_length=48)
    result = demo.run_demo(tmp_path / "demo", train=True, recipe=str(path))
    numbers = result.numbers
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == json.loads(json.dumps(numbers))
    for name, layers in (("stories", 7), ("trained", 2)):
        measured = numbers[name]
        assert (tmp_path / "demo" / f"{name}-G_LM.png").read_bytes().startswith(b"\x89PNG")
        kinds = [("no cache", "learned"), ("KV", "cached"), ("KV+G", "cached"), ("frozen G", "frozen")]
        kinds += [("engine", "frozen"), ("engine, fewer dimensions", "compressed")]
        assert [(row["cache"], row["mode"]) for row in measured["generation"]] == kinds
        assert all(len(row["token_ids"]) == 12 for row in measured["generation"])
        # KV and KV+G differ only in what they keep, never in what they compute.
        assert measured["generation"][1]["token_ids"] == measured["generation"][2]["token_ids"]
        assert measured["generation"][3]["token_ids"] == measured["generation"][4]["token_ids"]
        assert measured["compression"]["kv_bytes_compressed"] <= measured["compression"]["kv_bytes_whole"]
        assert len(measured["operator"]) == layers
        assert load_model(tmp_path / "demo" / f"{name}-frozen").config.operator == "constant"
    loss = numbers["stories"]["losses"]
    assert max(abs(loss[name] - loss["learned"]) for name in ("cached", "frozen")) <= 1e-5
    assert abs(loss["compressed"] - loss["frozen"]) <= 2e-4
    assert (
        numbers["stories"]["compression"]["kv_bytes_compressed"] < numbers["stories"]["compression"]["kv_bytes_whole"]
    )
    assert all(words in str(result) for words in ("on books it was not trained on", "frozen G"))


def test_the_losses_of_the_modes(small_model, ids):
    """By direct forwards, of all but the last token, which is a target: learned, cached from a prefix, frozen."""
    model, constant = small_model(), freeze(small_model(), ids[1:2])
    modes = OperatorModes(model, ids[1:2])
    result = {mode: modes.loss(mode, ids, 6) for mode in MODES}

    def direct(running, row):
        with torch.no_grad():
            logs = running(row[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        return -logs[torch.arange(6, 15), row[7:]].mean().item()

    expected = {
        "learned": [direct(model, row) for row in ids],
        "cached": [direct(freeze(small_model(), row[None, :6]), row) for row in ids],
        "frozen": [direct(constant, row) for row in ids],
    }
    for mode in MODES:
        assert result[mode] == pytest.approx(sum(expected[mode]) / 3, abs=1e-6), mode
    assert len({round(value, 6) for value in result.values()}) == 3
