import copy
import dataclasses
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from matplotlib.image import imread

from helpers import TINY, assert_close, fails
from pldr.deductive import deductive_outputs
from pldr.operator import DeductiveOutputs
from pldr.plots import plot_curves, plot_operators
from pldr.recipe import OptimizationRecipe, load_recipe
from pldr.study.claims import run_claim
from pldr.study.fidelity import along_generation, decimals
from pldr.study.invariance import best_rule, find_condition, known_before, trajectory
from pldr.study.lab import SIZES, Cell, Lab, Size, Verdict, default_data, state_of, table
from pldr.study.operators import MARGIN, Sweep, compare_runs, judge, loss_at, sweep
from pldr.study.order import order_parameter
from pldr.study.run import main as train_one
from pldr.study.sdpa import with_llama_attention
from pldr.study.timing import seconds_per_step

TOY = Size(
    {"model": {"config": TINY}, "optimization": {"steps": 4, "batch_size": 4, "warmup_steps": 3, "learning_rate": 3e-3,
                                                 "precision": "fp32"}},
    seeds=(1, 2), cell_seeds=(1, 2), rates=(2e-3, 3e-3), extensions=2, length=32, passages=6, generated=4,
    cells=({"units": 1}, {"rate": 1e30}, {"data": 50}),
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
def test_ablation_and_handoff_share_runs_and_compare_variants(lab, monkeypatch):
    monkeypatch.setattr("pldr.study.lab.COLLAPSED_GAIN", -math.inf)  # four steps make no attention
    first = lab("ablation")
    run_claim("ablation", first)
    text, numbers = page(first)
    numbers = numbers["numbers"]
    runs, rates = numbers["runs"], numbers["rates"]
    for kind in set(runs) - {
        "DAG-regularised"
    }:  # the DAG loss of an untrained operator may overflow, which the table then shows
        tried = {float(rate): losses for rate, losses in numbers["sweeps"][kind].items()}
        losses = {rate: sum(losses) / 2 for rate, losses in tried.items() if None not in losses}
        assert len(losses) >= 2
        assert losses[rates[kind]] == min(losses.values())
        assert [row["run"] for row in runs[kind]] == [first.run_name(kind, rates[kind], seed) for seed in (1, 2)]
        assert [row["loss_to_choose"] for row in runs[kind]] == tried[rates[kind]]
        assert all(row["loss_to_choose"] != row["loss"] for row in runs[kind])
        assert f"| {kind} | 2 of 2 |" in text
    for part in ("at equal tokens", "at equal parameters", "at equal time"):
        assert f"{part} learned is " in text
    assert (first.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    configs = {
        kind: json.loads((first.runs / rows[0]["run"] / "config.json").read_text()) for kind, rows in runs.items()
    }
    constant = {kind for kind, config in configs.items() if config["operator"] == "constant"}
    assert constant == {"transferred", "uniform", "normal", "identity", "wider identity"}
    count = {
        kind: first.load(runs[kind][0]["run"])[0].num_parameters() for kind in ("learned", "identity", "wider identity")
    }
    assert count["wider identity"] == pytest.approx(count["learned"], rel=0.01)
    assert count["identity"] < 0.9 * count["learned"]

    learned = first.runs / runs["learned"][0]["run"] / "model.safetensors"
    before = learned.stat().st_mtime_ns
    second = lab("handoff")
    run_claim("handoff", second)
    text, numbers = page(second)
    judged = numbers["numbers"]["judged"]
    assert list(judged) == [
        "handed off at a quarter", "handed off at a half", "handed off at the end", "random uniform", "random normal",
    ]  # fmt: skip
    assert learned.stat().st_mtime_ns == before
    config = json.loads(
        (first.runs / first.run_name("handed off at a half", rates["learned"], 1) / "config.json").read_text()
    )
    assert config["operator_trainable"]


def test_a_run_is_known_again_wherever_its_folder_is_named_from(lab_of_processes, tmp_path, monkeypatch):
    here = lab_of_processes("ablation")
    (here.runs / "one").mkdir(parents=True)
    (here.runs / "one/config.json").write_text("{}")
    (here.runs / "one.yaml").write_text(yaml.safe_dump(here.recipe("one", {})))
    monkeypatch.chdir(tmp_path)
    there = dataclasses.replace(here, runs=Path("runs"))
    assert there.recipe("one", {}) != here.recipe("one", {})
    assert there._done("one", {})
    assert not there._done("one", {"seed": 7})


@pytest.mark.slow
def test_invariance_maps_every_condition_with_every_seed(lab):
    here = lab("invariance")
    run_claim("invariance", here)
    text, numbers = page(here)
    rows = numbers["numbers"]["runs"]
    assert len(rows) == 4 * 2
    assert {row["state"] for row in rows if row["cell"]["rate"] == 1e30} == {"diverged"}
    assert sum(numbers["numbers"]["counts"].values()) == 8
    for picture in ("invariance.png", "through-training.png"):
        assert (here.folder / picture).is_file()
    assert "| 1e+30 | 3 | 2 | 2 | 24 | 4 | 100 | 1 |" in text
    usual = next(row for row in rows if row["run"] == here.run_name("learned", 3e-3, 1))
    assert usual["trajectory"]["step"] == [1, 2, 3, 4]
    assert usual["known"]["row_gain at half time"] == usual["trajectory"]["row_gain"][1] > 0
    half = yaml.safe_load((here.runs / f"{here.run_name('learned-data50', 3e-3, 1)}.yaml").read_text())
    assert half["data"]["train_interval"] == "0%:50%"


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


class TestComparisons:
    def test_sweeps_go_on_beyond_their_edges(self):
        def of(*losses):
            return Sweep({2.0**index: each for index, each in enumerate(losses)})

        assert of((3.0,), (2.0,), (2.5,)).next_rate is None
        assert of((1.0,), (2.0,)).next_rate == 0.5
        assert of((2.0,), (1.0,)).next_rate == 4.0
        assert of((2.0,), (1.0,), (None,)).next_rate is None  # lost beyond
        assert (of((None,), (None,)).best, of((None,), (None,)).next_rate) == (None, None)
        assert of((2.0, 2.0), (1.0, None), (1.0, 2.0)).best == 4.0  # the mean, where no seed was lost
        assert of((2.0, 2.0), (1.0, 3.5)).best == 1.0

    def test_a_sweep_trains_them_and_stops(self, lab, monkeypatch):
        here, trained = lab("x"), []
        monkeypatch.setattr(here, "_train_one", lambda name, changes: trained.append(name))
        rate_of = lambda name: float(name.split("rate")[1].split("-seed")[0])  # noqa: E731
        monkeypatch.setattr(
            here, "measure", lambda name: {"diverged": False, "gain": 1.0, "loss_to_choose": -rate_of(name)}
        )
        found = sweep(here, {"learned": {}})["learned"]  # always better at a higher rate
        assert sorted(found.losses) == [2e-3, 3e-3, 6e-3, 1.2e-2]
        assert found.next_rate == 2.4e-2  # which the page calls an edge
        assert len(set(trained)) == 4 * len(TOY.cell_seeds)

    def test_variants_against_the_reference_by_hand(self):
        found = {
            "learned": [*measured("learned", 1.0, 2.0, 3.0), *measured("dead", 60.5, gain=0.0)],
            "far": measured("far", 12.0, 14.0, 16.0, 18.0),
            "near": measured("near", 1.5, 2.5),
            "same": measured("same", 1.0, 2.0, 3.0),
            "alone": [*measured("alone", 3.0), {"run": "x", "diverged": True}],
        }
        rows = compare_runs(found, "learned")
        assert {kind: row["apart"] for kind, row in rows.items()} == {
            "far": True, "near": False, "same": False, "alone": False,
        }  # fmt: skip
        far, same = rows["far"], rows["same"]
        assert far["difference"] == 13.0
        assert far["p_holm"] == pytest.approx(3 * far["p"])  # the least of three
        assert far["p_permutation"] == pytest.approx(1 / 35)  # of 7 over 3 ways, none but this
        assert far["interval"][0] < 13.0 < far["interval"][1]
        assert (same["difference"], same["p"], same["p_permutation"]) == (0.0, 1.0, 1.0)
        assert rows["alone"] == {"apart": False}

    def test_the_loss_at_a_step(self):
        log = [
            {"step": 10, "eval_loss": 5.0},
            {"step": 10, "loss": 9.0},
            {"step": 20, "eval_loss": 3.0},
            {"step": 20, "eval_loss": 3.0},
        ]
        assert [loss_at(log, step) for step in (5, 10, 15, 17.5, 20, 30)] == [5.0, 5.0, 4.0, 3.5, 3.0, 3.0]

    def test_equivalence_needs_pairs_and_the_margin(self):
        base = {seed: 4.0 + 0.1 * seed for seed in range(1, 6)}

        def shifted(by):
            return {seed: loss + by + 1e-4 * seed for seed, loss in base.items()}

        same, better, worse = judge(base, shifted(0.001)), judge(base, shifted(-0.3)), judge(base, shifted(0.1))
        assert (same["not worse"], same["equivalent"]) == (True, True)
        assert (better["not worse"], better["equivalent"]) == (True, False)
        assert (worse["not worse"], worse["equivalent"]) == (False, False)
        noisy = judge(base, {seed: loss + (-1) ** seed * 3 * MARGIN for seed, loss in base.items()})
        assert (noisy["not worse"], noisy["equivalent"]) == (None, False)  # not told apart is not the same
        assert judge(base, {1: 4.0})["not worse"] is None

    def test_the_check_of_the_handoff_fails_where_its_control_passes(self, lab, monkeypatch):
        here = dataclasses.replace(lab("handoff"), size=dataclasses.replace(TOY, seeds=(1, 2, 3)))
        monkeypatch.setattr(
            "pldr.study.operators.sweep", lambda *_: {"learned": Sweep({1.0: (1.0,), 2.0: (0.5,), 4.0: (2.0,)})}
        )
        runs = {
            kind: measured(kind, 1.0, 2.0, 3.001)
            for kind in ("learned", "handed off at a quarter", "handed off at a half")
        }
        monkeypatch.setattr("pldr.study.operators._train_seeds", lambda *_: runs)
        outcomes = []
        for of_random in (5.0, 0.0):
            after = {"handed off at the end": {1: 1.0, 2: 2.0, 3: 3.0},
                     **{f"random {kind}": {1: 1.0 + of_random, 2: 2.001 + of_random, 3: 3.0 + of_random}
                        for kind in ("uniform", "normal")}}  # fmt: skip
            monkeypatch.setattr("pldr.study.operators._after_training", lambda *_, after=after: after)
            run_claim("handoff", here)
            outcomes.append(page(here)[1])
        assert [each["outcome"] for each in outcomes] == [Verdict.CONFIRMED, Verdict.NOT_CONFIRMED]
        assert "the check is void, because it does not refuse: random uniform, random normal" in outcomes[1]["verdict"]


class TestCondition:
    @staticmethod
    def rows(outcome, cells=14, seeds=3):
        """Runs whose row gain at half time is the cell's number; other quantities say nothing."""
        return [
            {"cell": {"rate": float(cell)}, "seed": seed, "state": "invariant" if outcome(cell) else "varies",
             "known": {"noise": float((7 * cell + 5 * seed) % 11), "row_gain at half time": 0.1 * (cell + 1)}}
            for cell in range(cells) for seed in range(seeds)
        ]  # fmt: skip

    def test_a_rule_that_holds_predicts_runs_that_it_was_not_stated_from(self):
        words, found = find_condition(self.rows(lambda cell: cell < 5))
        assert (found["right"], found["of"], found["at_least"]) == (21, 21, False)
        assert 0.5 < found["bound"] < 0.75
        assert found["p_shuffled"] < 0.05
        assert found["interval"] == [pytest.approx(0.025 ** (1 / 21)), 1.0]
        assert "predicts which of 21 others" in words

    def test_outcomes_that_nothing_tells_are_not_predicted(self):
        words, found = find_condition(self.rows(lambda cell: cell in (0, 3, 4, 7, 10, 13)))
        assert found["p_shuffled"] > 0.05
        assert "does not predict" in words

    def test_lost_runs_are_left_out_and_one_outcome_is_no_condition(self):
        rows = self.rows(lambda cell: cell < 6)
        for row in rows[:3]:
            row["state"] = "collapsed"
        assert find_condition(rows)[1]["of"] in (18, 21)
        assert find_condition(self.rows(lambda cell: True))[1] == {}
        assert find_condition(self.rows(lambda cell: cell < 1, cells=3))[1] == {}

    def test_the_best_rule_by_hand(self):
        known = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 100.0}, {"a": 3.0, "b": 4.0}]
        rule = best_rule(known, [True, False, True])
        assert str(rule) == "b ≤ 20"  # the geometric middle of 4 and 100
        assert [rule.holds(each) for each in known] == [True, False, True]

    def test_what_is_known_before_the_second_half(self):
        log = [{"step": step, "loss": 1.0} for step in (5, 10)] + [
            {"step": step, "G_variation": [step, 1.0], "G_rank": [2.0, 3.0], "G_log10_determinant": [None, -9.0],
             "row_gain": [0.5, step / 100]} for step in (10, 20, 30, 30)
        ]  # fmt: skip
        followed = trajectory(log)
        assert followed["step"] == [10, 20, 30]
        assert followed["G_log10_determinant"] == [-9.0] * 3
        known = known_before(Cell(1e-3, 10, 2, 2, 24, 40), followed)
        assert (known["G_variation at half time"], known["row_gain at half time"]) == (20, 0.5)
        assert known["warm-up share"] == 0.25
        assert "row_gain at half time" not in known_before(Cell(1e-3, 10, 2, 2, 24, 16), followed)


@torch.no_grad()
def test_what_is_measured_of_a_run(lab):
    here = lab("x")
    here.train({"learned-1": {"seed": 1}})
    found = here.measure("learned-1")
    model, tokenizer = here.load("learned-1")
    to_choose, rows = here.halves(tokenizer)
    assert not any((one == other).all() for one in to_choose for other in rows)
    for part, key in ((rows, "loss"), (to_choose, "loss_to_choose")):
        loss = model(part[:, :-1], shift_labels=part[:, 1:], use_cache=False).loss.item()
        assert found[key] == pytest.approx(loss, abs=1e-5)
    pairs = rows.reshape(-1, 2)
    alone = model(pairs[:, :1], shift_labels=pairs[:, 1:], use_cache=False).loss.item()
    assert found["gain"] == pytest.approx(alone - found["loss"], abs=1e-5)
    assert len(found["variation"]) == 2
    half = here.size.length // 2
    assert found["order_parameter"] == order_parameter(model, rows[:8, :half], half)["G_LM"].tolist()
    assert min(found["order_parameter"]) > 0

    (here.runs / "learned-1.measured.json").write_text(
        (here.runs / "learned-1.measured.json").read_text().replace('"accuracy"', '"kept": 1, "accuracy"')
    )
    assert here.measure("learned-1")["kept"] == 1  # not measured again
    assert "kept" not in dataclasses.replace(here, size=dataclasses.replace(TOY, passages=5)).measure("learned-1")
    here.train({"learned-1": {"seed": 2}})
    assert here.measure("learned-1")["loss"] != found["loss"]


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


def test_a_sweep_that_was_stopped_goes_on(lab, monkeypatch):
    """What a run that was killed leaves is no run; those that had ended are not done again."""
    here, started = lab("x"), []
    runs = {name: {"seed": seed} for seed, name in enumerate("abc")}

    def run_here(command, **_):
        name = command[3].removesuffix(".yaml").rpartition("/")[2]
        started.append(name)
        if name == "b" and started.count("b") == 1:
            (here.runs / name).mkdir()
            (here.runs / name / "log.jsonl").write_text('{"step": 1}\n')
            raise KeyboardInterrupt
        train_one(*command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("pldr.study.lab.subprocess", SimpleNamespace(run=run_here))
    with pytest.raises(KeyboardInterrupt):
        here.train(runs)
    done = set(started) - {"b"}
    first = {name: (here.runs / name / "model.safetensors").stat().st_mtime_ns for name in done}
    here.train(runs)
    assert sorted(started) == sorted([*runs, "b"])
    assert all((here.runs / name / "model.safetensors").stat().st_mtime_ns == when for name, when in first.items())
    assert all(here.load(name) is not None for name in runs)


def test_runs_at_once_share_the_cores(lab_of_processes, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")  # what somebody sets stays
    environment = lab_of_processes("x", parallel=5)._environment()
    assert (environment["OMP_NUM_THREADS"], environment["TORCHINDUCTOR_COMPILE_THREADS"]) == ("3", "7")
    assert "OMP_NUM_THREADS" not in lab_of_processes("x")._environment()

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # and the GPUs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    here = lab_of_processes("x", parallel=5)
    assert [here._environment()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["3", "5", "3"]


@pytest.mark.slow
def test_runs_in_processes_of_their_own(lab_of_processes):
    here = lab_of_processes("x", parallel=2)
    found = here.measured({"good": {}, "bad": DIVERGES})
    assert found["good"]["loss"] > 0
    assert found == {name: here.measure(name) for name in found}
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
    wanted = (2, 2, 2) if size == "tiny" else (5, 3, 4)
    assert all(
        len(got) >= least
        for got, least in zip((SIZES[size].seeds, SIZES[size].cell_seeds, SIZES[size].rates), wanted, strict=True)
    )
    assert SIZES[size].rates == tuple(sorted(SIZES[size].rates))
    for differs in SIZES[size].cells:
        assert SIZES[size].usual._replace(**differs) != SIZES[size].usual


def test_a_step_of_training_is_timed(small_model):
    models = {"learned": small_model(), "identity": small_model(operator="constant")}
    before = {name: model.lm_head.weight.detach().clone() for name, model in models.items()}
    found = seconds_per_step(models, OptimizationRecipe(batch_size=2, precision="fp32"), 8)
    assert list(found) == ["learned", "identity"]
    assert min(found.values()) > 0
    assert not any(torch.equal(before[name], model.lm_head.weight) for name, model in models.items())


def test_pictures_have_no_background_of_their_own(tmp_path):
    """Pages are light or dark; what is no data is of a grey that reads on both."""
    log = [{"step": step, "loss": 1.0 + step, "eval_loss": 2.0, "eval_accuracy": 0.5} for step in (1, 2)]
    plot_curves({"learned": [log]}, tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")  # [height, width, red green blue alpha], 0 to 1
    assert pixels[0, 0, 3] == 0
    drawn = pixels[pixels[..., 3] == 1][:, :3]
    grey = drawn[(drawn.max(1) - drawn.min(1)) < 0.02]
    assert len(grey) > 100
    assert 0.4 < grey.min() <= grey.max() < 0.6
    plot_operators({"G_LM": torch.eye(4).expand(1, 2, 4, 4)}, tmp_path / "G.png", title="of two heads")
    pixels = imread(tmp_path / "G.png")
    assert pixels[0, 0, 3] == 0
    drawn = pixels[pixels[..., 3] == 1][:, :3]
    assert drawn[(drawn.max(1) - drawn.min(1)) < 0.02].min() > 0.4


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
