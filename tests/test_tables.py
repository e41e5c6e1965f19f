"""What is printed and drawn: the same numbers in a terminal, a pipe and a notebook, and names as they are, whatever is in them."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from pldr.checkpoints.convert import FrozenCheckpoint
from pldr.checkpoints.info import Info, model_facts
from pldr.data.vocabulary import TrainedTokenizer
from pldr.evaluation.evaluate import Evaluation
from pldr.files import printable, to_json
from pldr.plots import plot_operators
from pldr.study.lab import Finding, Verdict
from pldr.study.statistics import Analysis, analyse_model, summarise
from pldr.tables import (
    analysis_view,
    certificate_view,
    demo_view,
    evaluation_view,
    facts_view,
    layer_rows,
    show,
)
from pldr.training.run import TrainingSummary

# A file's or a task's name that rich would take for markup, for an error in markup or for a picture, or that a terminal
# would obey.
NAMES = ["[red]x[/red]", "[/]", "[link=x", ":smile:", "a\\[b]", "\x1b[31mx\x07\x9b\u202e"]


def certificate(name="model", reasons=()):
    measured = {"loss_difference": -2e-8, "loss_interval": [-3e-8, 1e-8], "kl_mean": 1e-13, "kl_99": 1e-12,
                "kl_max": 4e-12, "agreement": 0.9996, "logit_difference": 1e-5}  # fmt: skip
    report = {
        "passages": 4, "tokens": 4096, "loss": 4.25, "modes": {"cached": measured, "frozen": measured},
        "causality": {"learned": measured, "frozen": measured | {"agreement": 1.0}}, "variation": [3e-5, 2e-6],
        "calibration": {"spread": 7e-8}, "thresholds": {"loss": 1e-5, "agreement": 0.999},
        "certified": not reasons, "reasons": list(reasons),
    }  # fmt: skip
    return {"model": name, "date": "2026-01-02", "report": report}


def evaluation(name="piqa"):
    modes = ["learned", "cached", "frozen"]
    scores = {
        mode: {f"acc, {name}": 0.5 + index / 100, f"acc_stderr, {name}": 0.0123} for index, mode in enumerate(modes)
    }
    task = {"questions": 1838, "num_fewshot": 0, "scores": scores, "differ": {"cached": 3, "frozen": 4},
            "share_bound": {"cached": 0.0123, "frozen": 1.0}, "largest": {"cached": 1e-5, "frozen": float("inf")}}  # fmt: skip
    text = {"tokens": 12345, "nats_per_token": 1.5, "bits_per_byte": 0.75, "word_perplexity": None}
    return {
        "model": name, "operator": "learned", "modes": modes, "device": "cpu", "dtype": "float32", "tasks": {name: task},
        "groups": {name + " group": {"scores": scores}},
        "suite": {"averages": {mode: {"average": 0.625} for mode in modes}}, "texts": {name: dict.fromkeys(modes, text)},
        "warnings": [f"{name} is odd"],
    }  # fmt: skip


def demo(name="out", prompt="The sea", same=True):
    caches = {"no cache": "learned", "KV": "cached", "KV+G": "cached", "frozen G": "frozen", "engine": "frozen",
              "fewer": "compressed"}  # fmt: skip
    rows = [{"cache": cache, "mode": mode, "tokens_per_second": 100.0 * speed, "same_text": same, "text": f" and {prompt}"}
            for speed, (cache, mode) in enumerate(caches.items(), 1)]  # fmt: skip
    layer = {"layer": 0, "variation": 1e-6, "untrained_variation": 0.25, "log10_determinant": -223.4, "rank": 14.5}
    stories = {"losses": {"learned": 1.5, "cached": 1.5 + 1e-7, "frozen": 1.5 - 2e-6, "compressed": 1.6}, "operator": [layer], "head_dim": 64,
               "prompt": prompt, "generation": rows,
               "compression": {"ranks": [16], "kv_bytes_whole": 1000, "kv_bytes_compressed": 625}}  # fmt: skip
    return {"stories": stories, "folder": name, "seconds": 33.0}


def analysis(name="G_LM", source=""):
    X = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Analysis({"G_LM": summarise(X, "G_LM"), name: summarise(X, name)}, passages=3, length=8, source=source)


def facts(small_model, name="model"):
    return model_facts(small_model()) | {"dtype": name}


def results(model):
    """One of each of the smaller results, and what it says."""
    finding = Finding("A claim", Verdict.CONFIRMED, "it is so", ["A section."], {"x": 1.5}, subject="a model")
    task = {"questions": 2, "num_fewshot": 0, "scores": {"learned": {"acc": 1.0}, "frozen": {"acc": 0.5}},
            "differ": {"frozen": 1}, "share_bound": {"frozen": 0.5}, "largest": {"frozen": float("inf")}}  # fmt: skip
    evaluation = Evaluation(
        "m",
        "learned",
        ["learned", "frozen"],
        "cpu",
        "float32",
        tasks={"t": task},
        groups={},
        disagreement=0.5,
        truncated=2,
    )
    yield finding, "Confirmed for a model: it is so."
    yield evaluation, "warning: 2 contexts were longer than the model's and lost their beginning"
    yield TrainedTokenizer(Path("t"), "bpe", 1290, ""), "t: 1,290 pieces (bpe)"
    yield FrozenCheckpoint(Path("f"), model, 10**6), "(before: 1,000,000)"
    yield TrainingSummary({"output": "o", "tokens": 1234, "train_loss": 2.0}), "train_loss"
    yield Info(model_facts(model)), "KV-cache"


def test_every_result_prints_in_a_terminal_and_a_notebook_and_as_json(small_model):
    for result, text in results(small_model()):
        assert text in str(result)
        assert text in unescape(re.sub("<[^>]+>", "", result._repr_html_()))
        assert json.loads(to_json(result.to_json())) == json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert len(repr(result)) < 4000


@pytest.fixture
def printed(capsys):
    def call(renderable):
        show(renderable)
        return capsys.readouterr().out

    return call


def lines_of(text):
    """Each line with single spaces and without the lines of tables."""
    return [" ".join(re.sub(r"[━─┏┓┡┩└┘├┤┼╇┴┳┃│]", " ", line).split()) for line in text.splitlines()]


class TestPrintable:
    def test_text_has_every_row(self, small_model, ids):
        result = analyse_model(small_model(), ids)
        lines = lines_of(str(result))
        for name, statistics in result.tensors.items():
            start = lines.index(name)
            assert lines[start + 1].startswith("layer RMS min max")
            rows = [" ".join([str(layer), *row]) for layer, row in enumerate(layer_rows(statistics))]
            assert lines[start + 2 : start + 5] == [*rows, ""]
        start = lines.index("tokens A A_LM A_P G_LM")
        assert [line.split()[0] for line in lines[start + 1 : start + 6]] == ["1", "2", "4", "8", "16"]

    def test_html_is_the_text(self):
        result = analysis("<b>&[red]x[/red]")
        html = result._repr_html_()
        assert html.startswith("<pre>")
        assert "<b>" not in html
        assert "&lt;b&gt;&amp;[red]x[/red]" in html
        text, _, pictures = html.partition("</pre>")
        assert lines_of(unescape(re.sub(r"<[^>]*>", "", text))) == lines_of(str(result))
        assert "data:image/png" in pictures

    def test_what_is_around_it_does_not_matter(self, monkeypatch):
        """In a notebook rich would display by itself, and a terminal has its own width."""
        result, displayed = analysis(), []
        text, html = str(result), result._repr_html_()
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
        monkeypatch.setattr("rich.jupyter.display", lambda *arguments: displayed.append(arguments))
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("COLUMNS", "30")
        assert (str(result), result._repr_html_()) == (text, html)
        assert not displayed


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(small_model, printed, name):
    shown = printable(name)
    assert shown.isprintable()
    assert shown in printed(facts_view(facts(small_model, name)))
    assert printed(certificate_view(certificate(name, [name]))).count(shown) == 2
    # The model; the task among scores and differences, its metric twice, its group; the text; a warning.
    assert printed(evaluation_view(evaluation(name))).count(shown) == 8
    assert printed(analysis_view(analysis(name, source=name))).count(shown) == 2
    # The prompt and the text that continues it; the folder in two files and two commands.
    assert printed(demo_view(demo(name, name))).count(shown) == 6


def test_facts(small_model, printed):
    certified = facts(small_model) | {"certificate": certificate(), "certified_weights": True}
    lines = lines_of(printed(facts_view(certified)))
    assert "KV-cache 512 bytes per token" in lines
    assert "G-cache 4,096 bytes per sequence" in lines
    assert "certificate certified 2026-01-02, frozen -2.0e-08 nats per token" in lines
    lines = lines_of(printed(facts_view(certified | {"certified_weights": False})))
    assert "certificate of other weights; certify these again" in lines


def test_certificate(printed):
    text = printed(certificate_view(certificate()))
    lines = lines_of(text)
    assert "loss difference, nats per token -2.0e-08 -2.0e-08" in lines
    assert "logits before the middle, when later tokens change learned frozen" in lines
    assert "same greedy tokens 99.960% 100.000%" in lines
    assert "\ncertified: within 1e-05 nats per token, at least 99.9% same greedy tokens.\n" in text
    assert "\nnot certified (one; two): within" in printed(certificate_view(certificate(reasons=["one", "two"])))


def test_evaluation(printed):
    lines = lines_of(printed(evaluation_view(evaluation())))
    assert "piqa 1,838 0 acc, piqa 0.5000 0.5100 0.5200 0.0123" in lines
    assert "piqa group acc, piqa 0.5000 0.5100 0.5200 0.0123" in lines
    assert "average 0.6250 0.6250 0.6250" in lines
    assert "piqa cached 3 of 1,838 1.23% 1.0e-05" in lines
    assert "frozen 4 of 1,838 100.00% inf" in lines
    assert "frozen 12,345 1.500000 0.750000 too large" in lines
    alone = printed(evaluation_view(evaluation() | {"modes": ["frozen"], "texts": {}}))
    assert "against" not in alone
    assert "learned" not in alone


def test_demo(printed, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("sys.argv", [".venv/bin/pldr", "demo"])
    result = demo()
    text = printed(demo_view(result))
    lines = lines_of(text)
    assert "no cache 1.500000 100 1.0× the same" in lines
    assert "KV+G 1.500000 +1e-07 300 3.0× the same" in lines
    assert "frozen G 1.499998 -2e-06 400 4.0× the same" in lines
    assert "fewer 1.600000 +1e-01 600 6.0× the same" in lines
    assert "by layer, its cache 62% of the bytes." in " ".join(text.split())
    assert "layer 0 1.0e-06 2.5e-01 -223.4 14.5 of 64" in lines
    assert "G_LM does not depend on the text" in text
    assert "\n  .venv/bin/pldr info out/stories-frozen\n" in text
    assert ".venv/bin/pldr demo --train" in text
    assert "still depends on the text" in printed(demo_view(demo(same=False)))
    training = {"steps": 10, "tokens": 1000, "seconds": 9.0, "train_loss": 2.0, "validation_loss": 2.125}
    text = printed(demo_view(result | {"trained": result["stories"] | {"training": training}}))
    assert "10 steps (1,000 tokens) in 9 s: loss 2.00, held out 2.12 nats per token:" in text
    assert "demo --train" not in text


def test_numbers_and_paths_are_not_cut_in_a_pipe(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = lines_of(printed(evaluation_view(evaluation())))
    assert "piqa 1,838 0 acc, piqa 0.5000 0.5100 0.5200 0.0123" in lines
    path = "/".join(["folder"] * 30)
    assert f" info {path}/stories-frozen\n" in printed(demo_view(demo(path)))
    # Sentences are broken between words.
    assert all(len(line) <= 120 for line in printed(analysis_view(analysis())).splitlines())


def test_pictures_leave_pyplot_as_it_is(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_backend()
    pyplot.switch_backend("svg")  # a notebook's stands for it
    try:
        plot_operators({"G_LM": torch.eye(4).expand(1, 2, 4, 4)}, tmp_path / "G.png")
        assert (pyplot.get_backend(), pyplot.get_fignums()) == ("svg", [])
    finally:
        pyplot.switch_backend(before)
    assert (tmp_path / "G.png").read_bytes().startswith(b"\x89PNG")
