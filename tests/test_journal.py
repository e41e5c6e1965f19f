"""An evaluation that was stopped goes on where it was, and finds what it would have found."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from helpers import fails, write_benchmarks, yaml_task
from pldr import evaluate
from pldr.evaluation.journal import Journal, open_journal
from pldr.evaluation.modes import MODES, SEQUENTIAL
from pldr.evaluation.processes import Processes
from pldr.evaluation.published import read_benchmark
from pldr.evaluation.scoring import Scorer

pytest.importorskip("lm_eval", reason="extra eval")


@pytest.fixture
def settings(tmp_path):
    """What is scored, what is generated greedily and what is sampled, and a text; a batch of two at most."""
    data = write_benchmarks(tmp_path / "data")
    rows = tmp_path / "rows.jsonl"
    questions = [row | {"goal": goal} for row in read_benchmark("piqa", data)["validation"]
                 for goal in ("the cat", "who ran to see", "him at her red house")]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    drawn = {"do_sample": True, "temperature": 2.0}
    for name, kind, more in (
        ("choice", "multiple_choice", {}),
        ("greedy", "generate_until", {}),
        ("drawn", "generate_until", drawn),
    ):
        task = yaml_task(name, rows, output_type=kind)
        if kind == "generate_until":
            del task["doc_to_choice"]
            task |= {"doc_to_target": "{{sol1}}", "metric_list": [{"metric": "exact_match"}],
                     "generation_kwargs": {"until": ["."], "max_new_tokens": 6} | more}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 40)
    return {
        "files": [tmp_path / "text.txt"], "tasks": [str(tmp_path / f"{name}.yaml") for name in ("choice", "greedy", "drawn")],
        "allow_code": True, "compare": True, "mode": "sequential", "batch_size": 2,
    }  # fmt: skip


def told(evaluation):
    """All but how it came about."""
    return {k: v for k, v in evaluation.to_json().items() if k not in ("seconds", "resumed")}


@pytest.mark.slow
def test_what_is_stopped_again_and_again_is_what_is_not_stopped(folder, settings, tmp_path, monkeypatch):
    """Every score in every mode to the last bit, and every text that is generated or drawn."""
    whole = evaluate(folder, **settings)
    assert whole.resumed == 0
    add, added = Journal.add, []

    def stop(journal, call, answers):
        if len(added) % 20 == 19:
            added.append(None)
            raise KeyboardInterrupt
        added.append(call)
        add(journal, call, answers)

    monkeypatch.setattr(Journal, "add", stop)
    for stops in range(100):  # noqa: B007 (counted)
        try:
            evaluation = evaluate(folder, **settings, output=tmp_path / "out")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "evaluation.json").exists()
    assert stops > 2
    assert told(evaluation) == told(whole)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation.to_json()
    # And what is done is not done again.
    monkeypatch.setattr(Journal, "add", lambda *_: pytest.fail("a question was asked again"))
    again = evaluate(folder, **settings, output=tmp_path / "out")
    assert told(again) == told(whole)
    assert again.resumed > evaluation.resumed > 0


_KILLED = """
import os, signal, sys
from pldr.cli import main
from pldr.evaluation.journal import Journal

add = Journal.add

def kill(journal, call, answers):
    add(journal, call, answers)
    if sum(1 for line in journal.file.open()) == 5:
        journal.file.write_bytes(journal.file.read_bytes()[:-9])  # as if it was writing the line
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = kill
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_process_that_is_killed_while_it_writes(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat\n" * 40)
    options = [
        "eval",
        folder,
        "--perplexity",
        text,
        "--batch-size",
        1,
        "--window",
        16,
        "--stride",
        8,
        "--mode",
        "sequential",
        "--json",
    ]
    code, whole, _ = run(*options)
    assert code == 0
    options += ["--output", tmp_path / "out"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *map(str, options)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    code, resumed, err = run(*options)
    assert code == 0, err
    resumed, whole = json.loads(resumed), json.loads(whole)
    assert resumed.pop("resumed") > whole.pop("resumed") == 0
    assert resumed == whole
    code, out, _ = run(*options[:-3], *options[-2:])  # the table
    assert code == 0
    assert "answers are of an earlier run" in out


def test_another_evaluation_is_refused(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat\n" * 4)
    out = tmp_path / "out"
    ask = partial(run, "eval", folder, "--output", out)
    code, _, err = ask("--perplexity", text)
    assert code == 0, err
    settings = json.loads((out / "settings.json").read_text())
    for option, value, said in (
        ("--window", 32, "window None, here 32"),
        ("--mode", "cached", "modes ['frozen'], here ['cached']"),
        ("--dtype", "bfloat16", "weights"),
        ("--calibration", text, "calibration"),
    ):
        fails(ask("--perplexity", text, option, value), f"--output: {out} holds another evaluation ({said}")
    frozen = tmp_path / "frozen"
    assert run("freeze", folder, frozen, "--prompt", "the cat sat")[0] == 0
    fails(run("eval", frozen, "--perplexity", text, "--output", out), "another evaluation (weights")
    assert json.loads((out / "settings.json").read_text()) == settings
    fails(run("eval", folder, "--perplexity", text, "--output", folder), "exists and is not empty")
    (out / "answers-0.jsonl").write_text('{"call": "frozen", "answers": {"a": 1}}\n')
    fails(ask("--perplexity", text), "answers-0.jsonl, line 1: not a line of an evaluation")
    (tmp_path / ".out.lock-elsewhere-1").write_text("process 1 on elsewhere, since yesterday\n")
    fails(ask("--perplexity", text), "another run is in it (process 1 on elsewhere")


@pytest.mark.parametrize("mode", [*MODES, SEQUENTIAL])
def test_batches_that_are_known_are_not_scored_again(small_model, ids, tmp_path, mode, monkeypatch):
    """What two processes left is whole for one; where a batch is missing, it alone is scored."""
    pairs = [(list(range(5, 5 + length)), [10, 11, 12][:count]) for length in (3, 7, 7, 9) for count in (1, 3)] * 20
    scorer = partial(Scorer, small_model(), mode, calibration=ids, batch_size=2)
    whole = scorer().score(pairs)
    for rank in range(2):
        (tmp_path / "out").mkdir(exist_ok=True)
        processes = Processes(rank, 2)
        with pytest.raises(KeyError):  # the other's are not there
            scorer(processes=processes, journal=Journal(tmp_path / "out" / f"answers-{rank}.jsonl")).score(pairs)
    (tmp_path / "out" / "settings.json").write_text("{}")
    with open_journal(tmp_path / "out", {}, Processes()) as journal:
        assert scorer(journal=journal).score(pairs) == whole
        assert journal.recalled == len(pairs)
    second = tmp_path / "out" / "answers-1.jsonl"
    *kept, last = second.read_text().splitlines()
    second.write_bytes("\n".join(kept).encode() + "\nä".encode()[:-1])  # cut off within a character
    with open_journal(tmp_path / "out", {}, Processes()) as journal:
        assert scorer(journal=journal).score(pairs) == whole
        assert journal.recalled == len(pairs) - len(json.loads(last)["answers"])
        assert json.loads((tmp_path / "out" / "answers-0.jsonl").read_text().splitlines()[-1]) == json.loads(last)
