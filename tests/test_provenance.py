"""The model card, and the certificate, that go with a model to the hub."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import hub

from helpers import certify
from pldr import freeze_checkpoint, load_model


@pytest.fixture
def pushed(monkeypatch):
    """What was sent to a hub that holds nothing: files by name."""
    files = {}

    def commit(operations, **_):
        for operation in operations:
            with operation.as_file() as stream:
                files[operation.path_in_repo] = stream.read()

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=commit)

    def missing(*_, **__):
        raise EntryNotFoundError("none")

    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub.ModelCard, "load", missing)
    return files


def card(files):
    return ModelCard(files["README.md"].decode())


def test_a_learned_model(small_model, pushed):
    small_model().push_to_hub("me/mine")
    found = card(pushed)
    assert found.data.tags == ["pldr-llm", "learned"]
    assert 'pldr.load_model("me/mine")' in found.text
    assert "a metric learner computes G_LM" in found.text
    assert "None is about these weights." in found.text
    assert {"config.json", "model.safetensors", "SHA256SUMS"} <= pushed.keys()
    assert "certificate.json" not in pushed


class TestFrozen:
    @pytest.fixture
    def certified(self, folder, tmp_path):
        freeze_checkpoint(folder, tmp_path / "frozen", prompts="the cat")
        certify(tmp_path / "frozen")
        return tmp_path / "frozen"

    def test_its_certificate_goes_along(self, certified, pushed):
        load_model(certified).push_to_hub("me/frozen")
        assert pushed["certificate.json"] == (certified / "certificate.json").read_bytes()
        assert card(pushed).data.tags == ["pldr-llm", "constant"]
        assert "**certified**, on 1 passages" in card(pushed).text
        assert "| frozen | +0.00e+00 | 0.00e+00 | 100.00% |" in card(pushed).text

    def test_unless_it_is_about_others(self, certified, pushed):
        model = load_model(certified)
        model.lm_head.weight.data += 1
        model.push_to_hub("me/frozen")
        assert "certificate.json" not in pushed
        assert "None is about these weights." in card(pushed).text

    def test_or_was_changed(self, certified, pushed):
        model = load_model(certified)
        file = certified / "certificate.json"
        file.write_text(file.read_text().replace('"certified": true', '"certified": false'))
        with pytest.raises(ValueError, match=r"certificate\.json: its contents do not match its checksum"):
            model.push_to_hub("me/frozen")
        assert not pushed

    def test_a_card_that_somebody_wrote_stays(self, certified, pushed, monkeypatch):
        monkeypatch.setattr(hub.ModelCard, "load", lambda *_, **__: ModelCard("---\nlanguage: en\n---\nMine."))
        load_model(certified).push_to_hub("me/frozen")
        assert card(pushed).text.strip() == "Mine."
        assert "certificate.json" in pushed


def test_the_recipe_of_a_run(folder, pushed, tmp_path):
    for step in (8, 12):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "recipe.json").write_text(
            f'{{"optimization": {{"steps": {step}}}, "data": {{"train": ["{tmp_path}/my/book.txt"]}}}}'
        )
    model = load_model(folder)
    model.name_or_path = str(tmp_path / "run")
    model.push_to_hub("me/run")
    assert '"steps": 12' in card(pushed).text
    assert '"book.txt"' in card(pushed).text
    assert str(tmp_path) not in card(pushed).text
