import copy
import functools
import json
import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

import pldr
from helpers import FIXTURES, SENTENCE
from pldr import freeze, load_model, load_tokenizer
from pldr.checkpoints.certificate import read_certificate, write_certificate
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.deductive import deductive_outputs, variation
from pldr.models.shipped import HELD_OUT
from pldr.provenance import weights_digest, with_checksum
from pldr.study.certify import Certificate, Thresholds, compare_modes


@pytest.fixture
def trained(stories):
    """The shipped model, which was trained until G_LM no longer depends on the text; passages, and others to calibrate on."""
    model, tokenizer = stories
    rows = read_passages(Source([str(HELD_OUT)]), tokenizer, 64, 5)
    return model, rows[2:], rows[:2]


@pytest.fixture
def passages(ids):
    return torch.cat((ids, ids.flip(1)))


@pytest.fixture
def collapsed(folder):
    """The toy model with a metric learner that gives the same A for every text, in place of a long training."""
    model = load_model(folder)
    for layer in model.model.layers:
        norm = layer.self_attn.operator.metric_learner[-1].norm
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(f"{SENTENCE} . " * 40)
    return file


class TestVerdict:
    def test_a_model_trained_to_collapse_is_certified(self, trained):
        report, frozen = compare_modes(*trained)
        assert report.certified, report.reasons
        assert frozen.config.operator == "constant"
        assert report.causality["frozen"].logit_difference < 1e-4
        assert max(report.variation) < 1e-3

    def test_a_fresh_model_is_not(self, small_model, passages):
        report, _ = compare_modes(small_model(), passages[1:], passages[:1])
        assert not report.certified
        assert any(reason.startswith("frozen: loss may differ by") for reason in report.reasons)
        assert report.causality["learned"].logit_difference > 1e-3  # later tokens leak into earlier logits

    @pytest.mark.parametrize("scale", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
    def test_a_perturbed_constant_is_not(self, trained, scale):
        model, rows, calibration = trained
        frozen = freeze(copy.deepcopy(model), calibration)
        generator = torch.Generator().manual_seed(0)
        for layer in frozen.model.layers:
            G_LM = layer.self_attn.operator.G_LM
            G_LM += scale * G_LM.square().mean().sqrt() * torch.randn(G_LM.shape, generator=generator)
        report, same = compare_modes(model, rows, calibration, frozen=frozen)
        assert same is frozen
        assert report.certified == (scale == 0.0)
        assert all(reason.startswith("frozen") for reason in report.reasons)

    def test_thresholds_decide(self, small_model, passages):
        generous = Thresholds(loss=100.0, agreement=0.0)
        assert compare_modes(small_model(), passages[1:], passages[:1], thresholds=generous)[0].certified
        strict = Thresholds(loss=1e-12, agreement=0.0)
        report, _ = compare_modes(small_model(), passages[1:], passages[:1], thresholds=strict)
        assert len(report.reasons) == 2

    def test_bad_input(self, small_model, passages):
        model = small_model()
        with pytest.raises(ValueError, match="at least 2 passages"):
            compare_modes(model, passages[:1], passages[:1])
        with pytest.raises(ValueError, match="no passages to freeze"):
            compare_modes(model, passages, passages[:0])
        constant = freeze(small_model(), passages[:1])
        with pytest.raises(ValueError, match="constant already"):
            compare_modes(constant, passages, passages)
        with pytest.raises(ValueError, match="must have a constant operator"):
            compare_modes(model, passages, passages, frozen=small_model())


@torch.no_grad()
def test_every_number_against_a_plain_computation(small_model, passages):
    model = small_model()
    rows, calibration = passages[2:], passages[:2]
    report, _ = compare_modes(model, rows, calibration)
    frozen = freeze(small_model(), calibration)
    half = rows.shape[1] // 2

    def loss(logits, ids):
        return F.cross_entropy(logits[0, :-1].double(), ids[1:]).item()

    full = [model(row[None], use_cache=False).logits for row in rows]
    constant = [frozen(row[None], use_cache=False).logits for row in rows]
    cached = [freeze(small_model(), row[None, :half])(row[None], use_cache=False).logits for row in rows]
    mode = report.modes["frozen"]
    differences = [loss(b, row) - loss(a, row) for a, b, row in zip(full, constant, rows, strict=True)]
    assert mode.loss_difference == pytest.approx(sum(differences) / len(rows), abs=1e-6)
    low, high = mode.loss_interval
    assert min(differences) - 1e-9 <= low <= mode.loss_difference <= high <= max(differences) + 1e-9
    one, two = (torch.cat(logits, 1)[0].double().log_softmax(-1) for logits in (full, constant))
    kl = F.kl_div(two, one, log_target=True, reduction="none").sum(-1)
    assert mode.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert mode.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
    assert mode.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    assert mode.agreement == (one.argmax(-1) == two.argmax(-1)).double().mean().item()
    largest = max((a - b).abs().max().item() for a, b in zip(full, constant, strict=True))
    assert mode.logit_difference == pytest.approx(largest, rel=1e-4)

    mode = report.modes["cached"]
    differences = [
        loss(b[:, half:], row[half:]) - loss(a[:, half:], row[half:])
        for a, b, row in zip(full, cached, rows, strict=True)
    ]
    assert mode.loss_difference == pytest.approx(sum(differences) / len(rows), abs=1e-5)
    assert report.loss == pytest.approx(sum(loss(a, row) for a, row in zip(full, rows, strict=True)) / len(rows))
    assert report.variation == pytest.approx(variation(deductive_outputs(model, rows).G_LM).tolist())

    swapped = torch.cat((rows[:, :half], rows.roll(-1, 0)[:, half:]), 1)
    changed = [model(row[None], use_cache=False).logits[:, :half] for row in swapped]
    largest = max((a[:, :half] - b).abs().max().item() for a, b in zip(full, changed, strict=True))
    assert report.causality["learned"].logit_difference == pytest.approx(largest, rel=1e-4)
    alone = []
    for row in calibration:
        other = freeze(small_model(), row[None])
        logits = [other(r[None], use_cache=False).logits for r in rows]
        alone.append(sum(loss(b, r) - loss(a, r) for a, b, r in zip(full, logits, rows, strict=True)) / len(rows))
    assert report.calibration["loss_difference"] == pytest.approx(alone, abs=1e-6)
    assert report.calibration["spread"] == pytest.approx(max(alone) - min(alone), abs=1e-6)


class TestCertificate:
    @pytest.fixture
    def fields(self, small_model, passages):
        """What a certificate of the toy model says."""
        report, frozen = compare_modes(small_model(), passages[1:], passages[:1])
        digest = weights_digest(frozen.state_dict())
        return json.loads(json.dumps(Certificate(
            model="toy", weights=digest, frozen_weights=digest, data={"sources": []}, device="cpu", date="2026-01-02",
            report=report, frozen=frozen, tokenizer=None,
        ).to_json()))  # fmt: skip

    def test_the_checksum_shows_changes(self, tmp_path, fields):
        write_certificate(tmp_path, fields)
        assert read_certificate(tmp_path) == with_checksum(fields)
        fields = json.loads((tmp_path / "certificate.json").read_text())
        fields["report"]["certified"] = True
        (tmp_path / "certificate.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="do not match its checksum"):
            read_certificate(tmp_path)
        for damaged in ("", "[]", '"text"', "{"):
            (tmp_path / "certificate.json").write_text(damaged)
            with pytest.raises(ValueError, match="not a valid certificate"):
                read_certificate(tmp_path)
        assert read_certificate(tmp_path / "nowhere") is None
        with pytest.raises(ValueError, match=r"NaN|nan|JSON"):
            with_checksum({"loss": float("nan")})

    def test_every_field_must_be_there_and_of_its_type(self, tmp_path, fields):
        """Its checksum being right."""

        def places(value, path=()):
            for key, item in value.items():
                yield (*path, key)
                if isinstance(item, dict) and key not in ("data", "versions"):
                    yield from places(item, (*path, key))

        found = list(places(fields))
        assert len(found) > 40
        for *path, key in found:
            for value in (None, "\x1b[31m", [None], {}, 10**400):
                changed = copy.deepcopy(fields)
                part = functools.reduce(dict.get, path, changed)
                if value is None:
                    del part[key]
                elif type(value) is type(part[key]) and key != "kind":
                    continue
                else:
                    part[key] = value
                write_certificate(tmp_path, changed)
                name = ".".join([*path, key])
                wrong = rf"certificate \({name}(\.\w+|\[0\])* (is missing|must be .*, got .*)\)"
                with pytest.raises(ValueError, match=wrong):
                    read_certificate(tmp_path)

    def test_digest_is_of_names_shapes_types_and_bytes(self):
        a = {"x": torch.arange(6.0), "y": torch.ones(2, dtype=torch.bfloat16)}
        assert weights_digest(a) == weights_digest(dict(reversed(a.items())))
        for other in ({"x": torch.arange(6.0).view(2, 3), "y": a["y"]}, {"z": a["x"], "y": a["y"]},
                      {"x": a["x"], "y": a["y"].float()}, {"x": a["x"] + 1e-7, "y": a["y"]}):  # fmt: skip
            assert weights_digest(other) != weights_digest(a)

    def test_command_writes_a_frozen_model_that_knows_its_certificate(self, run, tmp_path, collapsed, text):
        arguments = ["certify", collapsed, text, "--passages", "3", "--calibration", "1", "--length", "32"]
        out = tmp_path / "frozen"
        code, shown, _ = run(*arguments, "--output", out)
        assert code == 0
        assert "certified: within 1e-05 nats per token" in " ".join(shown.split())
        certificate = read_certificate(out)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = load_model(out)
        assert certificate["frozen_weights"] == weights_digest(model.state_dict())
        assert certificate["weights"] == weights_digest(load_model(collapsed).state_dict())
        assert certificate["data"]["passages"] == 3
        code, shown, _ = run("info", out)
        assert "certified 20" in " ".join(shown.split())

        # The same, compared against the folder, as JSON; then with weights that are no longer those.
        code, shown, _ = run(*arguments, "--frozen", out, "--json")
        assert code == 0
        assert json.loads(shown)["report"]["certified"]
        model.model.layers[0].self_attn.operator.G_LM *= 1.5
        changed = tmp_path / "changed"
        model.save_pretrained(changed)
        load_tokenizer(collapsed).save_pretrained(changed)
        shutil.copy(out / "certificate.json", changed)
        with pytest.warns(UserWarning, match="says nothing about them"):
            load_model(changed)
        with pytest.warns(UserWarning, match="says nothing about them"):
            code, shown, _ = run("info", changed)
        assert "certificate of other weights; certify these again" in " ".join(shown.split())
        with pytest.warns(UserWarning, match="says nothing about them"):
            assert pldr.info(out).facts["certified_weights"] > pldr.info(changed).facts["certified_weights"]
        with pytest.warns(UserWarning, match="says nothing about them"):
            code, shown, _ = run(*arguments, "--frozen", changed)
        assert code == 1
        assert "not certified (frozen: loss may differ" in " ".join(shown.split())

    def test_not_certified_writes_nothing(self, run, tmp_path, folder, text):
        arguments = ["certify", folder, text, "--passages", "2", "--calibration", "1", "--length", "32",
                     "--output", tmp_path / "no"]  # fmt: skip
        code, shown, _ = run(*arguments)
        assert code == 1
        assert "not certified" in shown
        assert not (tmp_path / "no").exists()

    def test_errors_are_one_line_and_exit_code_2(self, run, tmp_path, folder, toy_tokenizer, text):
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "short.txt").write_text("the cat sat on a mat")

        def message(*arguments):
            code, out, err = run("certify", *arguments)
            assert (code, out) == (2, "")
            (line,) = [line for line in err.splitlines() if line]
            return line

        assert "less than one sequence" in message(folder, tmp_path / "empty.txt")
        assert "less than one sequence" in message(folder, tmp_path / "short.txt")
        assert "passages of 64 tokens, 1003 are asked for" in message(folder, text, "--passages", "999")
        assert "matches no file" in message(folder, tmp_path / "nothing.txt")
        assert "tokenizer: has 290 tokens" in message(FIXTURES / "v51-small", text, "--tokenizer", folder)
        frozen = freeze(load_model(folder), torch.arange(5, 20)[None])
        frozen.save_pretrained(tmp_path / "frozen")
        toy_tokenizer.save_pretrained(tmp_path / "frozen")
        assert "constant already" in message(tmp_path / "frozen", text, "--length", "16")
        assert "length: must be between" in message(folder, text, "--length", "1000")
        assert "at least 2" in message(folder, text, "--passages", "1")
        assert "choose one" in message(folder, text, "--frozen", folder, "--output", tmp_path / "x")
