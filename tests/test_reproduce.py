import copy
import dataclasses
import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml

from helpers import TINY, assert_close, fails
from pldr.deductive import deductive_outputs
from pldr.operator import DeductiveOutputs
from pldr.recipe import load_recipe
from pldr.study.claims import Groups, compare_runs, must_be_no_worse, must_differ, run_claim
from pldr.study.fidelity import along_generation, decimals
from pldr.study.lab import SIZES, Lab, Size, Verdict, default_data, state_of, table
from pldr.study.run import main as train_one
from pldr.study.sdpa import with_llama_attention

TOY = Size(
    {"model": {"config": TINY}, "optimization": {"steps": 4, "batch_size": 4, "warmup_steps": 3, "learning_rate": 3e-3,
                                                 "precision": "fp32"}},
    seeds=(1, 2), length=32, passages=6, generated=4,
    grid=((3e-3, 3, 1, 2, 24, 1), (1e30, 3, 2, 2, 24, 1)),
)  # fmt: skip
DIVERGES = {"optimization.learning_rate": 1e30, "optimization.clip_value": None}


@pytest.fixture
def lab_of_processes(tmp_path, texts, toy_model_file):
    """A lab whose runs take less than a second, beside the start of their processes."""
    data = {"train": [f"{texts}/0*.txt"], "validation": [f"{texts}/1*.txt"], "tokenizer": str(toy_model_file)}
    return lambda claim, **changes: Lab(TOY, tmp_path / claim, tmp_path / "runs", dict(data), command="test", **changes)


@pytest.fixture
def lab(lab_of_processes, monkeypatch):
    """The same, with each run in this process."""

    def run_here(command, **_):
        assert command[1:3] == ["-m", "pldr.study.run"]
        train_one(*command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("pldr.study.lab.subprocess", SimpleNamespace(run=run_here))
    return lab_of_processes


def page(lab):
    numbers = json.loads((lab.folder / "results.json").read_text())
    return (lab.folder / "README.md").read_text(), numbers


@pytest.mark.slow
def test_ablation_and_handoff_share_runs_and_compare_variants(lab):
    first = lab("ablation")
    run_claim("ablation", first)
    text, numbers = page(first)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6
    # The DAG loss of an untrained operator may overflow, which the table then shows.
    assert all(" 2 of 2 " in row for row in rows[2:] if "DAG" not in row)
    summary = numbers["numbers"]["summary"]
    runs = numbers["numbers"]["runs"]
    for kind in summary:
        if kind == "DAG-regularised":
            continue
        losses = [row["loss"] for row in runs[kind]]
        assert summary[kind]["loss"][0] == pytest.approx(sum(losses) / 2)
        assert summary[kind]["loss"][1] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
    assert text.startswith("# Operators train differently\n\n**")
    assert (first.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    operators = {
        name: json.loads((first.runs / f"{name}-1" / "config.json").read_text())["operator"]
        for name in ("learned", "transferred", "uniform", "normal", "identity")
    }
    assert [name for name, kind in operators.items() if kind == "constant"] == [
        "transferred",
        "uniform",
        "normal",
        "identity",
    ]

    before = (first.runs / "learned-1" / "model.safetensors").stat().st_mtime_ns
    second = dataclasses.replace(lab("handoff"), size=dataclasses.replace(TOY, seeds=(1,)))
    run_claim("handoff", second)
    text, _ = page(second)
    assert "handed off at a half" in text
    assert (first.runs / "learned-1" / "model.safetensors").stat().st_mtime_ns == before
    config = json.loads((first.runs / "handed-off-at-a-half-1" / "config.json").read_text())
    assert config["operator_trainable"]


@pytest.mark.slow
def test_invariance_maps_every_condition(lab):
    here = lab("invariance")
    run_claim("invariance", here)
    text, numbers = page(here)
    states = {row["run"]: row["state"] for row in numbers["numbers"]["runs"]}
    assert len(states) == 4
    assert states["rate1e+30-warmup3-R2-N2-W24-seed1"] == "diverged"
    assert sum(numbers["numbers"]["counts"].values()) == 4
    assert (here.folder / "invariance.png").is_file()
    assert "| 1e+30 | 3 | 2 | 2 | 24 | 1 |" in text


def test_states():
    good = {"diverged": False, "gain": 1.0, "variation": [1e-5, 1e-6], "frozen_difference": -1e-6}
    assert state_of(good) == "invariant"
    assert state_of(good | {"variation": [1e-5, 1e-2]}) == "varies"
    assert state_of(good | {"frozen_difference": -1e-3}) == "varies"
    assert state_of(good | {"gain": 0.001}) == "collapsed"
    assert state_of({"diverged": True}) == "diverged"
    assert state_of({"diverged": False, "gain": 1.0}) == "constant"


def measured(kind, *losses, gain=1.0):
    """What Lab.measure returns of runs."""
    return [{"run": f"{kind}-{index}", "diverged": False, "loss": loss, "accuracy": 0.5, "gain": gain}
            for index, loss in enumerate(losses)]  # fmt: skip


def test_runs_that_collapse_are_counted_but_not_averaged(lab):
    here = lab("comparison")

    found = {
        "learned": [*measured("learned", 4.0, 4.1), *measured("dead", 6.5, gain=0.0)],
        "far": measured("far", 5.0, 5.1, 5.05),
        "near": measured("near", 4.0, 4.2),
        "alone": [*measured("alone", 3.0), {"run": "x", "diverged": True}],
        "lost": [{"run": "y", "diverged": True}],
    }
    here.write(compare_runs(here, "Operators train differently", found, "learned", "text", judge=must_differ))
    text, numbers = page(here)
    assert "| learned | 2 of 3 (1 collapsed) | 4.0500 ± 0.0707 |" in text
    assert "| alone | 1 of 2 (1 diverged) | 3.0000 |" in text
    assert "| lost | 0 of 1 (1 diverged) |  |" in text
    assert ("**Confirmed under conditions: distinct from learned: far; not told apart from learned: near; too few runs to "
            "tell: alone, lost; lower mean loss than learned: alone.**") in text  # fmt: skip
    assert numbers["numbers"]["summary"]["alone"]["separation"] is None


def test_separation_is_welchs(lab):
    def separation(one, other):
        here, found = lab("x"), {"one": measured("one", *one), "other": measured("other", *other)}
        return compare_runs(here, "x", found, "one", "x", judge=must_differ).numbers["summary"]["other"]["separation"]

    # Means 2 and 5; variances 1 and 20/3.
    assert separation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]) == pytest.approx(3 / math.sqrt(1 / 3 + 20 / 3 / 4))
    assert separation([1.0], [2.0, 4.0, 6.0, 8.0]) is None
    assert separation([1.0, 1.0], [2.0, 2.0]) == math.inf
    assert separation([1.0, 1.0], [1.0, 1.0]) == 0


def test_verdicts_follow_from_the_groups():
    """Of distinct, near and unknown variants, and those with a lower mean loss; never from the words of a claim."""

    def verdicts(*groups):
        return must_differ(Groups(*groups)), must_be_no_worse(Groups(*groups))

    good, partly, no = Verdict.CONFIRMED, Verdict.CONDITIONS, Verdict.NOT_CONFIRMED
    assert verdicts(["a", "b"], [], [], []) == (good, no)
    assert verdicts(["a", "b"], [], [], ["a", "b"]) == (good, good)
    assert verdicts(["a"], ["b"], [], []) == (partly, partly)
    assert verdicts(["a"], [], ["b"], ["a"]) == (partly, partly)
    assert verdicts([], ["a", "b"], [], []) == (no, good)
    assert verdicts([], [], ["a"], [])[0] == no


@torch.no_grad()
def test_what_is_measured_of_a_run(lab):
    here = lab("x")
    here.train({"learned-1": {"seed": 1}})
    found = here.measure("learned-1")
    model, tokenizer = here.load("learned-1")
    rows = here.passages(tokenizer)
    loss = model(rows[:, :-1], shift_labels=rows[:, 1:], use_cache=False).loss.item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    pairs = rows.reshape(-1, 2)
    alone = model(pairs[:, :1], shift_labels=pairs[:, 1:], use_cache=False).loss.item()
    assert found["gain"] == pytest.approx(alone - found["loss"], abs=1e-5)
    assert len(found["variation"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["caching", "sdpa", "transfer"])
def test_claims_about_the_model_that_ships_with_pldr(lab, claim, monkeypatch):
    data = default_data("tiny", held_out=True)
    here = dataclasses.replace(lab(claim), size=dataclasses.replace(TOY, passages=4, length=16), data=data)
    run_claim(claim, here)
    text, numbers = page(here)
    assert "**Confirmed" in text
    if claim == "caching":
        found = numbers["numbers"]
        for name in ("A", "A_LM", "A_P", "G_LM"):
            assert found["before"][name]["rms"] == pytest.approx(found["after"][name]["rms"], abs=1e-15)
        assert found["choices"]["questions"] == 4


@pytest.mark.parametrize("claim", ["caching", "transfer"])
def test_claims_that_a_model_does_not_bear_out(lab, claim):
    """Hardly trained: its operator depends on the text."""
    here = lab(claim)
    here.train({"learned-1": {"seed": 1}})
    here.model = here.runs / "learned-1"
    run_claim(claim, here)
    assert "**Not confirmed" in page(here)[0]


@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
def test_llama_attention_is_the_identity_operator(small_model, ids, pairing):
    """Also with padding; and of another operator it is not."""
    model = small_model(operator="constant", rope_pairing=pairing, rope_theta=500.0)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.operator.G_LM[0, 0, 1] = 0.5  # one entry of one head
    with torch.no_grad():
        llama, own, changed = (
            m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            for m in (with_llama_attention(model), model, other)
        )
    assert_close(llama, own, max_error=1e-5)
    assert (llama - changed).abs().max() > 1e-3


class TestFidelity:
    def test_decimals_by_hand(self):
        assert [decimals(x) for x in (0.0, 1e-16, 4e-4, 5e-4, 6e-4, 0.6, 3.2)] == [15, 15, 3, 3, 2, 0, 0]

    def test_against_separate_forwards(self, small_model, ids):
        model, ids = small_model().double(), ids.repeat(6, 1)  # 18 texts, of which each step takes every second
        found = along_generation(model, ids, 5, [2, 3])
        for index, step in enumerate((2, 3)):
            texts = ids[step % 2 :: 2]
            before, now = (deductive_outputs(model, texts[:, :n]) for n in (5, 5 + step))
            for name in DeductiveOutputs._fields:
                X, Y = getattr(before, name)[1].double(), getattr(now, name)[1].double()  # of the second layer
                wanted = {
                    "rmse": (X - Y).square().mean().sqrt(),
                    "relative": (X - Y).norm() / X.norm(),
                    "rms": (X.norm(dim=(2, 3)) - Y.norm(dim=(2, 3))).abs().max() / 16,
                    "mean_rms": (X.norm(dim=(2, 3)) - Y.norm(dim=(2, 3))).mean().abs() / 16,
                    "log10_determinant": (torch.linalg.slogdet(X)[1] - torch.linalg.slogdet(Y)[1]).abs().max()
                    / math.log(10),
                }
                if name == "A":  # whose rows sum to zero without training, so that its determinant is rounding
                    del wanted["log10_determinant"]
                for quantity, value in wanted.items():
                    assert found[name][quantity][index, 1].item() == pytest.approx(value.item(), rel=1e-6), (
                        name,
                        quantity,
                    )

    def test_a_constant_G_passes_whatever_A_does(self, small_model, ids):
        model = small_model()
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.operator.energy_weight)
        found = along_generation(model, ids, 5, range(1, 9))
        assert found["G_LM"]["rmse"].max() == 0
        assert found["A"]["relative"].min() > 1e-3

    def test_of_the_model_that_ships_with_pldr(self, lab, monkeypatch):
        monkeypatch.setitem(SIZES, "tiny", TOY)  # of the control
        size = dataclasses.replace(TOY, passages=2, length=256)
        here = dataclasses.replace(lab("fidelity"), size=size, data=default_data("tiny", held_out=True))
        run_claim("fidelity", here)
        text, numbers = page(here)
        found = numbers["numbers"]
        assert "**Confirmed under conditions for stories-10m" in text
        assert "both controls fail" in text
        assert found["largest"]["G_LM"]["relative"] < 1e-3
        assert min(control["G_LM"]["relative"] for control in found["controls"].values()) > 1e-2
        assert len(found["controls"]) == 2
        assert found["at_steps"] == [1, 2, 4]

    def test_a_model_that_varies_is_not_confirmed(self, lab, monkeypatch):
        monkeypatch.setitem(SIZES, "tiny", TOY)
        here = lab("fidelity")
        here.train({"learned-1": {"seed": 1}})
        here.model = here.runs / "learned-1"
        run_claim("fidelity", here)
        assert "**Not confirmed" in page(here)[0]
        here.size = dataclasses.replace(TOY, generated=60)
        with pytest.raises(ValueError, match=r"fidelity: 8 \+ 60 tokens are more than the model's context of 64"):
            run_claim("fidelity", here)


def test_finished_runs_are_kept_but_not_taken_for_others_of_the_same_name(lab):
    here = lab("x")
    here.train({"good": {}, "bad": DIVERGES})
    assert here.load("good") is not None
    assert here.load("bad") is None
    assert here.measure("bad") == {"run": "bad", "diverged": True}
    files = (here.runs / "good" / "model.safetensors", here.runs / "bad.diverged.json")

    def times():
        return [file.stat().st_mtime_ns for file in files]

    before = times()
    here.train({"good": {}, "bad": DIVERGES})
    assert times() == before
    here.train({"good": {"seed": 5}, "bad": DIVERGES})
    assert (times()[0] != before[0], times()[1]) == (True, before[1])


@pytest.mark.slow
def test_runs_in_processes_of_their_own(lab_of_processes):
    here = lab_of_processes("x", parallel=2)
    here.train({"good": {}, "bad": DIVERGES})
    assert here.load("good") is not None
    assert here.diverged("bad") is not None
    assert here.load("bad") is None
    with pytest.raises(ChildProcessError, match=r"broken: .*matches no file"):
        here.train({"broken": {"data.train": ["nothing.txt"]}})


@pytest.mark.parametrize("size", SIZES)
def test_recipes_of_every_size_are_valid(size, tmp_path):
    here = Lab(SIZES[size], tmp_path, tmp_path, default_data(size))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(here.recipe("run", {"optimization.dag_A_P": 0.05})))
    assert load_recipe(tmp_path / "r.yaml").optimization.dag_A_P == 0.05
    assert len(SIZES[size].seeds) >= (2 if size == "tiny" else 3)


def test_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_errors(run, tmp_path):
    fails(run("reproduce", "caching", "--train", "x"), "give both or neither")
    fails(run("reproduce", "caching", "--parallel", "0"), "at least 1")
    fails(run("reproduce", "caching", "--device", "warp"), "device: warp can not be used here")
    missing = ("--train", tmp_path / "nofile", "--validation", tmp_path / "nofile", "--output", tmp_path / "o")
    fails(run("reproduce", "ablation", *missing), "nofile matches no file")
    assert not (tmp_path / "o").exists()
    fails(run("reproduce", "transfer", "--model", tmp_path / "no", "--output", tmp_path / "o"), "no such model folder")
    assert not (tmp_path / "o").exists()
