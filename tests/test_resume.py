"""Nothing is lost: runs that are stopped, killed, damaged or out of disk go on as if nothing had happened."""

import contextlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import toy_recipe, write_texts
from pldr import load_model, load_tokenizer
from pldr.cli import main
from pldr.data import rows
from pldr.files import process_mark, write_sums
from pldr.recipe import load_recipe
from pldr.training import TrainingInterrupted, checkpoint
from pldr.training.callbacks import ProgressBar
from pldr.training.checkpoint import SUMS, SavedTensors, checkpoints, merge_checkpoint, step_of
from pldr.training.randomness import read_random_states, save_random_states, set_random_states
from pldr.training.run import train
from pldr.training.trainer import PldrTrainer

VARIANTS = {
    "plain": {},
    "streamed": {"data__streaming": True, "data__shuffle_buffer": 3},
    "streamed by workers": {"data__streaming": True, "data__workers": 2},
    "padded": {"data__layout": "padded"},
    "accumulated": {"optimization__batch_size": 2, "optimization__accumulation": 2},
    "constant": {"model__config": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
                                   "max_position_embeddings": 64, "operator": "constant", "operator_trainable": True}},
    "regularised": {"optimization__dag_G_LM": 0.1},
    "handed off before": {"optimization__handoff_step": 4},
    "handed off after": {"optimization__handoff_step": 9},
    "saved in the background": {"async_save": True, "save_steps": 2, "optimization__handoff_step": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A stream has no end: its first batch would be hundreds of passes through the toy text."""
    monkeypatch.setattr(rows, "_BATCH_CHARACTERS", 2000)


def log(folder):
    """Every line, without the one number that no two runs share."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train_runtime"} for line in lines]


def losses(folder):
    return [(x["step"], x["loss"], x["accuracy"], x["global_loss"]) for x in log(folder) if "loss" in x]


def at_step(monkeypatch, step, act):
    """Do something where a step ends, before it is logged and saved."""
    original = ProgressBar.on_step_end

    def end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            act()

    monkeypatch.setattr(ProgressBar, "on_step_end", end)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    def stop():
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the handler runs between two byte codes of the main thread

    at_step(monkeypatch, step, stop)


def forked(work):
    """The exit code of a process that does something with all that is here and patched; -9: it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    process.kill()  # if it still runs
    process.join()
    return process.exitcode


def dead_mark():
    """`process_mark` of a process that is no more."""
    done = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    return f"{process_mark().rpartition('-')[0]}-{done.stdout.strip()}"


def leftovers(folder):
    """What hides in a folder and beside it, such as locks and half written files."""
    return sorted(path.name for place in (folder, folder.parent) if place.is_dir() for path in place.glob(".*"))


# The others differ in what they add to these.
FAST_VARIANTS = {"plain", "saved in the background", "handed off after"}


@pytest.mark.parametrize(
    "variant", [name if name in FAST_VARIANTS else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_a_resumed_run_is_the_same_run(write_recipe, tmp_path, monkeypatch, variant):
    """Bit for bit, with log lines that span the interruption: the losses, what they sum to, and the weights."""
    changes = VARIANTS[variant] | {"eval_steps": 5, "log_steps": 3}
    whole = load_recipe(write_recipe(**(changes | {"async_save": False}), output=str(tmp_path / "whole")))
    expected = train(whole, progress=False)
    recipe = load_recipe(write_recipe(**changes))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(TrainingInterrupted, match=r"stopped by SIGTERM after step [78] of 12; saved in .*--resume"):
            train(recipe, progress=False)
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        load_model(recipe.output)  # nothing that looks finished
    torch.manual_seed(0)
    summary = train(recipe, resume=True, progress=False)
    assert log(recipe.output) == log(whole.output)
    one, other = load_model(recipe.output).state_dict(), load_model(whole.output).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name in ("steps", "tokens", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        assert summary[name] == expected[name], name


def test_older_checkpoints_go_and_the_recipe_must_be_the_same(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(save_steps=3, keep_checkpoints=2))
    train(recipe, progress=False)
    assert [step_of(path) for path in checkpoints(recipe.output)] == [12, 9]
    assert not [path for path in Path(recipe.output).iterdir() if path.name.startswith(".")]
    for changes, message in [
        ({"optimization__learning_rate": 1e-4}, r"learning_rate was 0.003 for .*checkpoint-12 and is 0.0001 now"),
        ({"seed": 5}, "seed was 1234"),
        ({"data__sequence_length": 16}, "data.sequence_length was 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(load_recipe(write_recipe(save_steps=3, **changes)), resume=True, progress=False)
    # What does not change the losses may change.
    train(load_recipe(write_recipe(save_steps=4, log_steps=2)), resume=True, progress=False)
    older = checkpoints(recipe.output)[1]
    train(recipe, resume=older, progress=False)
    # What is newer than the one chosen gets out of the way, and what is written then is kept.
    assert step_of(checkpoints(recipe.output)[0]) == 12
    assert (Path(recipe.output) / "abandoned-checkpoint-12").is_dir()
    changed = load_recipe(write_recipe(save_steps=3), ["model.config.layer_norm_eps=1e-4"])
    with pytest.raises(ValueError, match=r"model.config.layer_norm_eps was None"):
        train(changed, resume=True, progress=False)
    with pytest.raises(ValueError, match="is not a checkpoint in the output folder"):
        train(recipe, resume=tmp_path, progress=False)
    recipe.output = str(tmp_path / "new")
    with pytest.raises(ValueError, match="holds no checkpoint to go on from"):
        train(recipe, resume=True, progress=False)


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(write_recipe):
    recipe = load_recipe(write_recipe(save_steps=4, keep_checkpoints=3))
    train(recipe, progress=False)
    newest, middle, oldest = checkpoints(recipe.output)
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint-12: damaged checkpoint \(optimizer.safetensors does not match its "
                                         rf"sum\); go on from the one before it: --resume-from {middle}"):  # fmt: skip
        train(recipe, resume=True, progress=False)
    (middle / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"--resume-from {oldest}"):
        train(recipe, resume=True, progress=False)
    shutil.rmtree(oldest)
    with pytest.raises(ValueError, match="no older checkpoint is whole"):
        train(recipe, resume=True, progress=False)


def test_a_checkpoint_is_a_model_and_holds_no_pickle(write_recipe, tmp_path, run):
    recipe = load_recipe(write_recipe(save_steps=12))
    train(recipe, progress=False)
    (saved,) = checkpoints(recipe.output)
    one, other = load_model(saved).state_dict(), load_model(recipe.output).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ".SHA256"}
    modes = {path.stat().st_mode & 0o777 for path in (*saved.iterdir(), *Path(recipe.output).glob("*.*"))}
    assert modes == {(tmp_path / "recipe.yaml").stat().st_mode & 0o777}, (
        "others may read what the user's other files are"
    )
    names = {name.rpartition(".")[0] for name in SavedTensors(saved, "optimizer").shapes}
    assert names == {name for name, _ in load_model(saved).named_parameters()}
    code, _, errors = run("merge", saved, tmp_path / "merged")
    assert code == 0, errors
    merged = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in one.items())
    assert len(load_tokenizer(tmp_path / "merged")) == merged["lm_head.weight"].shape[0]


def test_a_run_leaves_its_model_on_the_disk(write_recipe, monkeypatch):
    """As it does its checkpoints: a loss of power right behind it costs nothing."""
    synced, original = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino) or original(handle))
    recipe = load_recipe(write_recipe(save_steps=12))
    train(recipe, progress=False)
    (saved,) = checkpoints(recipe.output)
    model = [
        Path(recipe.output) / name for name in ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS")
    ]
    for place in (Path(recipe.output), *model, saved, *saved.iterdir()):
        assert place.stat().st_ino in synced, place


@pytest.fixture
def broken_steps(monkeypatch):
    """`broken_steps({step: factor})`: losses of training are multiplied so; what each step begins with is in the dict returned."""

    def break_them(factors):
        original, seen = PldrTrainer.compute_loss, {}

        def broken(trainer, model, inputs, *args, **kwargs):
            loss = original(trainer, model, inputs, *args, **kwargs)
            step = trainer.state.global_step + 1
            optimizer = trainer.optimizer.optimizer
            states = [value for p in trainer.model.parameters() for value in optimizer.state.get(p, {}).values()]
            seen.setdefault(step, [t.detach().clone() for t in (*trainer.model.parameters(), *states)])
            return loss * factors.get(step, 1.0)

        monkeypatch.setattr(PldrTrainer, "compute_loss", broken)
        return seen

    return break_them


def log_of(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").open()]


@pytest.mark.parametrize("bound", [{}, {"optimization__clip_value": None, "optimization__clip_norm": 1.0}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_broken_steps_are_skipped(write_recipe, broken_steps, bound, accumulation):
    """Weights, moments and counts of steps stay as they are, bit for bit; the log says which steps, and counts the others."""
    nan = float("nan")
    seen = broken_steps({5: nan, 6: float("inf"), 9: nan})
    recipe = load_recipe(write_recipe(log_steps=2, optimization__skip_nonfinite=2, optimization__batch_size=4 // accumulation,
                                      optimization__accumulation=accumulation, **bound))  # fmt: skip
    assert train(recipe, progress=False)["steps"] == 12

    def same(one, other):
        return len(seen[one]) == len(seen[other]) and all(map(torch.equal, seen[one], seen[other]))

    assert [step for step in range(2, 12) if same(step, step + 1)] == [5, 6, 9]
    lines = log_of(recipe)
    skipped = [line for line in lines if "skipped_loss" in line]
    assert [(line["step"], line["skipped_loss"]) for line in skipped] == [(5, "nan"), (6, "inf"), (9, "nan")]
    assert all(len(line["skipped_rows"]) == 4 for line in skipped)
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [2, 2, 3, 3]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 8, 10, 12]  # none of 5 and 6 counted
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[10] == pytest.approx(losses[8], rel=0.1)  # of step 10 alone, not half of it
    (final,) = [line["global_loss"] for line in lines if line.get("step") == 12 and "global_loss" in line]
    weights = {2: 2, 4: 2, 8: 2, 10: 1, 12: 2}
    assert final == pytest.approx(sum(losses[step] * count for step, count in weights.items()) / 9)


def test_too_many_broken_steps_in_a_row_stop(write_recipe, broken_steps):
    """One good step between them begins the count anew. The line names the last good checkpoint."""
    broken_steps(dict.fromkeys((4, 5, 7, 8, 9), float("nan")))
    recipe = load_recipe(write_recipe(save_steps=3, log_steps=2, optimization__skip_nonfinite=2))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped, and 2 may be \(optimization.skip_nonfinite\): the loss "
                                                 r"became nan at step 9 \(data rows \d+, \d+, \d+, \d+\); last good checkpoint: "
                                                 r".*checkpoint-6; lower"):  # fmt: skip
        train(recipe, progress=False)
    assert [step_of(path) for path in checkpoints(recipe.output)] == [6, 3]
    assert [line["step"] for line in log_of(recipe) if "skipped_loss" in line] == [4, 5, 7, 8, 9]
    recipe.optimization.skip_nonfinite = 3  # which may change when a run goes on, and is enough
    summary = train(recipe, resume=True, progress=False)
    assert summary["steps"] == 12
    assert [line["step"] for line in log_of(recipe) if "skipped_loss" in line] == [4, 5, 7, 8, 9]
    recipe.optimization.skip_nonfinite = 0
    with pytest.raises(FloatingPointError, match=r"^the loss became nan at step 4 .*checkpoint-3; lower"):
        train(recipe, overwrite=True, progress=False)


def test_the_count_in_a_row_goes_on_where_a_run_does(write_recipe, broken_steps):
    broken_steps(dict.fromkeys((6, 7, 8), float("nan")))
    recipe = load_recipe(write_recipe(save_steps=7, log_steps=5, optimization__skip_nonfinite=2))
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match=r"3 steps in a row .* at step 8 .*checkpoint-7"):
            train(recipe, resume=resume, progress=False)


def test_a_gradient_that_is_not_finite_is_skipped_too(write_recipe, monkeypatch):
    """Where the loss is finite, and also where bounding by value would make it finite again."""
    original = PldrTrainer.compute_loss

    def broken(trainer, model, inputs, *args, **kwargs):
        loss = original(trainer, model, inputs, *args, **kwargs)
        if trainer.state.global_step == 3:
            zero = model.lm_head.bias - model.lm_head.bias.detach()
            loss = loss + zero.abs().sqrt().sum()  # 0, of an infinite slope
        return loss

    monkeypatch.setattr(PldrTrainer, "compute_loss", broken)
    recipe = load_recipe(write_recipe(log_steps=1, optimization__skip_nonfinite=1))
    train(recipe, progress=False)
    (line,) = [line for line in log_of(recipe) if "skipped_loss" in line]
    assert line["step"] == 4
    assert float(line["skipped_loss"]) > 0
    recipe.optimization.skip_nonfinite = 0
    with pytest.raises(FloatingPointError, match="a gradient became NaN or infinite at step 4"):
        train(recipe, overwrite=True, progress=False)


def test_a_full_disk_leaves_the_old_checkpoint_whole(write_recipe, monkeypatch):
    """No file may grow beyond a limit, as on a disk that is full."""
    recipe = load_recipe(write_recipe(save_steps=5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = PldrTrainer._save_checkpoint

    def limited(trainer, *args):
        if trainer.state.global_step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        original(trainer, *args)

    monkeypatch.setattr(PldrTrainer, "_save_checkpoint", limited)
    try:
        with pytest.raises(OSError, match=r"checkpoint-10: could not be written \(.*\); .*checkpoint-5 is whole"):
            train(recipe, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [step_of(path) for path in checkpoints(recipe.output)] == [5]
    assert not list(Path(recipe.output).glob(".*"))
    monkeypatch.undo()
    assert train(recipe, resume=True, progress=False)["steps"] == 12


def test_overwriting_sets_the_old_run_aside(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe())
    train(recipe, progress=False)
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    recipe.optimization.learning_rate, recipe.optimization.clip_value = 1e30, None
    with pytest.raises(FloatingPointError):
        train(recipe, overwrite=True, progress=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept
    recipe.optimization.learning_rate = 1e-3
    train(recipe, overwrite=True, progress=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != kept
    assert not list(tmp_path.glob(".out*"))


def test_a_failure_touches_no_other_run(write_recipe, tmp_path, monkeypatch):
    """Not even where the folder above both was made for the one that fails."""
    recipe = load_recipe(write_recipe(output=str(tmp_path / "runs" / "a" / "b")))
    original = PldrTrainer.compute_loss

    def broken(trainer, *args, **kwargs):
        (tmp_path / "runs" / "other").mkdir(exist_ok=True)
        return original(trainer, *args, **kwargs) * float("nan")

    monkeypatch.setattr(PldrTrainer, "compute_loss", broken)
    with pytest.raises(FloatingPointError):
        train(recipe, progress=False)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_failure_after_the_last_step_keeps_the_model(write_recipe, monkeypatch):
    recipe = load_recipe(write_recipe())

    def fail(*args, **kwargs):
        raise OSError("no room for an evaluation")

    monkeypatch.setattr(PldrTrainer, "evaluate", fail)
    with pytest.raises(OSError, match="no room"):
        train(recipe, progress=False)
    assert load_model(recipe.output).num_parameters() > 0


@pytest.mark.parametrize("variant", ["plain", "streamed"])
def test_resuming_after_the_last_step_only_writes_the_model(write_recipe, variant):
    recipe = load_recipe(write_recipe(**VARIANTS[variant], save_steps=6))
    expected = train(recipe, progress=False)
    folder = Path(recipe.output)
    model = load_model(folder).state_dict()
    (folder / "config.json").unlink()
    summary = train(recipe, resume=True, progress=False)
    for name in ("steps", "tokens", "train_loss", "validation_loss"):
        assert summary[name] == expected[name], name
    assert all(torch.equal(tensor, model[name]) for name, tensor in load_model(folder).state_dict().items())


def test_the_loss_of_a_resumed_run_too_short_to_log(write_recipe, tmp_path, monkeypatch):
    whole = train(load_recipe(write_recipe(log_steps=500, output=str(tmp_path / "whole"))), progress=False)
    recipe = load_recipe(write_recipe(log_steps=500))
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(TrainingInterrupted):
            train(recipe, progress=False)
    summary = train(recipe, resume=True, progress=False)
    assert summary["train_loss"] == whole["train_loss"]
    assert summary["train_accuracy"] == whole["train_accuracy"]


def test_broken_weights_are_no_checkpoint(write_recipe, monkeypatch):
    """A step can break the weights with a loss that is still a number."""
    recipe = load_recipe(write_recipe(save_steps=5))
    original = PldrTrainer.training_step

    def step(trainer, model, *args, **kwargs):
        loss = original(trainer, model, *args, **kwargs)
        if trainer.state.global_step == 9:
            model.lm_head.bias.data[0] = float("nan")
        return loss

    monkeypatch.setattr(PldrTrainer, "training_step", step)
    with pytest.raises(
        FloatingPointError, match=r"weights became NaN .* by step 10; last good checkpoint: .*checkpoint-5"
    ):
        train(recipe, progress=False)
    assert [step_of(path) for path in checkpoints(recipe.output)] == [5]


def test_sigterm_saves_and_says_so(write_recipe, tmp_path):
    def command():
        sys.stderr = (tmp_path / "errors").open("w", buffering=1)
        sys.argv = ["pldr", "train", str(write_recipe(optimization__steps=5000))]
        main()

    run = multiprocessing.get_context("fork").Process(target=command)
    run.start()
    log_file = tmp_path / "out" / "log.jsonl"
    while not log_file.is_file() or '"loss"' not in log_file.read_text():
        assert run.is_alive(), (tmp_path / "errors").read_text()
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    run.join(60)
    assert run.exitcode == 143
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    (saved,) = checkpoints(tmp_path / "out")
    last = errors.strip().splitlines()[-1]
    assert f"stopped by SIGTERM after step {step_of(saved)} of 5000; saved in" in last


class TestTheFolderIsOneRuns:
    def test_a_second_run_is_refused_and_the_first_goes_on(self, write_recipe, tmp_path, monkeypatch):
        changes = {"save_steps": 3}
        whole = load_recipe(write_recipe(**changes, output=str(tmp_path / "whole")))
        train(whole, progress=False)
        recipe = load_recipe(write_recipe(**changes))
        (tmp_path / "link").symlink_to("out")

        def second_runs():
            monkeypatch.undo()
            for name in ("out", "link"):
                for how in ({"overwrite": True}, {"resume": True}, {"resume": "auto"}):
                    again = load_recipe(write_recipe(**changes, output=str(tmp_path / name)))
                    with pytest.raises(FileExistsError, match=message):
                        train(again, progress=False, **how)

        message = (
            rf"out: another run is in it \(process {os.getpid()} on {platform.node()}, since 20\d\d-.*\); wait for it, stop "
            rf"it, or choose another output; if there is no such process any more, delete {tmp_path}/\.out\.lock-"
        )
        seen = []
        at_step(monkeypatch, 5, lambda: seen.append(forked(second_runs)))
        train(recipe, progress=False)
        assert seen == [0]
        assert log(recipe.output) == log(whole.output)
        assert leftovers(tmp_path / "out") == []

    def test_a_dead_run_is_no_obstacle_and_one_elsewhere_is(self, write_recipe, tmp_path):
        recipe = load_recipe(write_recipe(optimization__steps=3))
        (tmp_path / f".out.lock-{dead_mark()}").write_text("process 1 on this machine, since yesterday\n")
        (tmp_path / ".out2.lock-elsewhere-1").write_text("another folder's\n")
        train(recipe, progress=False)
        assert leftovers(tmp_path / "out") == [".out2.lock-elsewhere-1"]
        (tmp_path / ".out.lock-elsewhere-1").write_text("process 1 on elsewhere, since yesterday\n")
        before = (tmp_path / "out" / "log.jsonl").read_bytes()
        with pytest.raises(FileExistsError, match="process 1 on elsewhere, since yesterday"):
            train(recipe, overwrite=True, progress=False)
        assert (tmp_path / "out" / "log.jsonl").read_bytes() == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, FloatingPointError])
    def test_it_is_free_again_however_a_run_ends(self, write_recipe, tmp_path, monkeypatch, error):
        def fail():
            raise error

        at_step(monkeypatch, 2, fail)
        with pytest.raises(error):
            train(load_recipe(write_recipe(output=str(tmp_path / "a" / "out"))), progress=False)
        assert not (tmp_path / "a").exists()
        assert leftovers(tmp_path / "out") == []

    def test_checkpoints_of_another_recipe_are_told(self, write_recipe, tmp_path):
        """Whatever has happened to the folder: each checkpoint says what it is of."""
        recipe = load_recipe(write_recipe(save_steps=6))
        train(recipe, progress=False)
        other = load_recipe(write_recipe(save_steps=6, seed=5, output=str(tmp_path / "other")))
        train(other, progress=False)
        shutil.copytree(tmp_path / "out" / "checkpoint-6", tmp_path / "other" / "checkpoint-6", dirs_exist_ok=True)
        with pytest.raises(ValueError, match=r"seed was 1234 for .*other/checkpoint-6 and is 5 now"):
            train(other, resume=tmp_path / "other" / "checkpoint-6", progress=False)

    def test_a_link_to_a_folder_stays_one(self, write_recipe, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "old").touch()
        (tmp_path / "out").symlink_to("disk")
        recipe = load_recipe(write_recipe(save_steps=6))
        train(recipe, overwrite=True, progress=False)
        assert (tmp_path / "out").is_symlink()
        assert not (tmp_path / "disk" / "old").exists()
        train(recipe, resume=tmp_path / "disk" / "checkpoint-6", progress=False)
        assert load_model(tmp_path / "disk").num_parameters() > 0

    def test_what_killed_runs_left_is_tidied(self, write_recipe, tmp_path, monkeypatch):
        recipe, out, dead = load_recipe(write_recipe(save_steps=6)), tmp_path / "out", dead_mark()
        train(recipe, progress=False)
        kept = (out / "model.safetensors").read_bytes()
        for place in (out / f".model.partial-{dead}-a", out / f".checkpoint.partial-{dead}-b" / "checkpoint-9"):
            place.mkdir(parents=True)
        train(recipe, resume=True, progress=False)
        assert leftovers(out) == []

        recipe.optimization.learning_rate = 1e-3
        with monkeypatch.context() as patch:
            at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
            assert forked(lambda: train(recipe, overwrite=True, progress=False)) == -signal.SIGKILL
        assert [name.split("-")[0] for name in leftovers(out)] == [".out.lock", ".out.old"]
        with pytest.raises(FileExistsError, match="is not empty"):
            train(recipe, progress=False)
        assert (out / "model.safetensors").read_bytes() == kept  # it is back
        assert leftovers(out) == []

        with monkeypatch.context() as patch:
            at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
            assert forked(lambda: train(recipe, overwrite=True, progress=False)) == -signal.SIGKILL
        train(recipe, resume=True, progress=False)  # the new one, which had a checkpoint
        assert (out / "model.safetensors").read_bytes() != kept
        assert leftovers(out) == []

    def test_auto_goes_on_where_there_is_a_checkpoint_and_begins_elsewhere(
        self, write_recipe, tmp_path, monkeypatch, run
    ):
        path = write_recipe(save_steps=6)
        recipe, out = load_recipe(path), tmp_path / "out"
        for kill in (3, 9):  # before the first checkpoint, and after
            with monkeypatch.context() as patch:
                at_step(patch, kill, lambda: os.kill(os.getpid(), signal.SIGKILL))
                assert forked(lambda: train(recipe, resume="auto", progress=False)) == -signal.SIGKILL
            assert bool(checkpoints(out)) == (kill == 9)
        at_step(monkeypatch, 6, lambda: pytest.fail("began anew"))
        code, _, errors = run("train", path, "--resume-from", "auto")
        assert code == 0, errors
        whole = load_recipe(write_recipe(save_steps=6, output=str(tmp_path / "whole")))
        monkeypatch.undo()
        train(whole, resume="auto", progress=False)
        assert log(out) == log(whole.output)
        for path in checkpoints(out):
            shutil.rmtree(path)
        for folder in (out, tmp_path / "texts"):  # a model, and somebody's texts
            recipe.output = str(folder)
            with pytest.raises(FileExistsError, match="is not empty"):
                train(recipe, resume="auto", progress=False)

    @pytest.mark.parametrize(
        ("step", "changes"),
        [
            (5, {"log_steps": 1}),
            (5, {"log_steps": 500, "save_steps": 6}),
            (5, {"log_steps": 500, "save_steps": 6, "async_save": True}),
            (5, {"log_steps": 500, "eval_steps": 6}),
            (12, {"log_steps": 500}),
        ],
    )
    def test_a_folder_that_is_removed_ends_the_run(self, write_recipe, tmp_path, monkeypatch, run, step, changes):
        path = write_recipe(**changes)
        at_step(monkeypatch, step, lambda: shutil.rmtree(tmp_path / "out"))
        code, out, errors = run("train", path)
        *bar, message = errors.splitlines()
        assert (code, out, len(bar)) == (1, "", 1), errors
        assert message == f"pldr: {tmp_path}/out: was removed or renamed during the run, which ends here"
        assert not (tmp_path / "out").exists()
        assert leftovers(tmp_path / "out") == []


class TestTheLogSaysEverythingOnce:
    def test_also_what_comes_after_the_last_checkpoint(self, write_recipe, tmp_path, monkeypatch):
        """A run that fails, or is killed, after the evaluation at its end has logged that already."""
        whole = load_recipe(write_recipe(save_steps=6, eval_steps=6, output=str(tmp_path / "whole")))
        train(whole, progress=False)
        recipe = load_recipe(write_recipe(save_steps=6, eval_steps=6))
        original = PldrTrainer.evaluate

        def evaluate(trainer, *args, **kwargs):
            found = original(trainer, *args, **kwargs)
            if not trainer.is_in_train:
                raise OSError("no room for another word")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(PldrTrainer, "evaluate", evaluate)
            with pytest.raises(OSError, match="no room"):
                train(recipe, progress=False)
        train(recipe, resume=True, progress=False)
        written = [line for line in log(whole.output) if "total_flos" not in line]  # of a call that took steps
        assert log(recipe.output) == written

    @pytest.mark.parametrize("saved_first", [False, True])
    def test_in_whichever_order_a_step_is_logged_and_saved(self, write_recipe, monkeypatch, saved_first):
        recipe = load_recipe(write_recipe(save_steps=6, log_steps=3))
        original = PldrTrainer._maybe_log_save_evaluate

        def swapped(trainer, *args, **kwargs):
            should_log, trainer.control.should_log = trainer.control.should_log, False
            original(trainer, *args, **kwargs)
            trainer.control.should_log = should_log
            original(trainer, *args, **kwargs)

        if saved_first:
            monkeypatch.setattr(PldrTrainer, "_maybe_log_save_evaluate", swapped)
        with monkeypatch.context() as patch:
            stop_at(patch, 5)  # noted where step 6 ends
            with pytest.raises(TrainingInterrupted):
                train(recipe, progress=False)
        assert [step for step, *_ in losses(recipe.output)] == [3, 6]
        train(recipe, resume=True, progress=False)
        # A line that the checkpoint does not know of is no longer there: the next one has its losses.
        assert [step for step, *_ in losses(recipe.output)] == ([3, 9, 12] if saved_first else [3, 6, 9, 12])


@pytest.fixture(scope="class")
def finished(tmp_path_factory, toy_model_file):
    """A folder with a run's recipe, and its output with three checkpoints, for copies to be damaged."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"save_steps": 4, "keep_checkpoints": 3, "output": "out"}
    (folder / "recipe.yaml").write_text(toy_recipe(write_texts(folder / "texts"), toy_model_file, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("recipe.yaml"), progress=False)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_a_checkpoint_of_other_rows_is_refused_but_merged(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(save_steps=12))
    train(recipe, progress=False)
    (saved,) = checkpoints(recipe.output)
    edit(saved / "recipe.json", lambda r: r.pop("row_length") and None)
    write_sums(saved, [path for path in saved.iterdir() if path.name != SUMS], SUMS)
    with pytest.raises(ValueError, match=r"checkpoint-12: is of an earlier version, whose rows of data .* pldr merge"):
        train(recipe, resume=True, progress=False)
    assert merge_checkpoint(saved, tmp_path / "merged").num_parameters() > 0


def rename_tensor(path):
    tensors = load_file(path)
    name = "lm_head.weight.exp_avg"
    tensors[f"other.{name}"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_tensor(folder, name, change):
    """Of the random states; without a change, one less."""
    states = load_file(folder / "random-0.safetensors")
    state = states.pop(name)
    save_file(states | ({} if change is None else {name: change(state)}), folder / "random-0.safetensors")


def flip_unlisted(folder):
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    write_sums(folder, [path for path in folder.iterdir() if path.name not in (SUMS, file.name)], SUMS)


class TestDamage:
    """Of a checkpoint whose sums were made to fit, too."""

    DAMAGES: ClassVar = {
        "one flipped and not listed": (flip_unlisted, f"{SUMS} does not list optimizer.safetensors"),
        "a file too many": (lambda c: (c / "model-1-of-1.safetensors").touch(), f"{SUMS} does not list model-1-of-1"),
        "optimiser renamed": (lambda c: rename_tensor(c / "optimizer.safetensors"),
                              r"optimizer: 2 tensors are missing, unknown .* the first lm_head.weight.exp_avg"),
        "no optimiser": (lambda c: save_file({}, c / "optimizer.safetensors"), r"optimizer: \d+ tensors are missing"),
        "model renamed": (lambda c: rename_tensor(c / "optimizer.safetensors") or
                          os.replace(c / "optimizer.safetensors", c / "model.safetensors"), "optimizer tensors"),
        "no random state": (lambda c: (c / "random-0.safetensors").unlink(), "random-0.safetensors is missing"),
        "many random states": (lambda c: edit(c / "recipe.json", lambda r: r.update(processes=300_000_000)),
                               "random-1.safetensors is missing"),
        "many shards": (lambda c: (c / "model.safetensors").rename(c / "model-1-of-300000000.safetensors"),
                        "1 of 300000000 model files are there"),
        "no recipe": (lambda c: (c / "recipe.json").unlink(), "recipe.json is missing"),
        "another step": (lambda c: edit(c / "trainer_state.json", lambda s: s.update(global_step=8)),
                         "it was written after step 8"),
        "no totals": (lambda c: edit(c / "run.json", lambda s: s.pop("totals") and None), "run.json: totals is missing"),
        "another form": (lambda c: edit(c / "run.json", lambda s: [1]), r"run.json: it must be an object, got \[1\]"),
        "sums of another type": (lambda c: edit(c / "run.json", lambda s: s["totals"].update(loss=[1])),
                                 r"run.json: totals.loss must be a finite number, got \[1\]"),
        "sums of a later step": (lambda c: edit(c / "run.json", lambda s: s.update(last_logged=13)),
                                 "run.json is of another step"),
        "sums of more": (lambda c: edit(c / "run.json", lambda s: s.update(guesses=[1, 1, 1])),
                         "run.json is of another step"),
        "a recipe of another form": (lambda c: edit(c / "recipe.json", lambda r: r.update(optimization=None)),
                                     "recipe.json: optimization is missing"),
        "processes that are none": (lambda c: edit(c / "recipe.json", lambda r: r.update(processes=True)),
                                    "recipe.json: processes must be a count, got True"),
        "steps as a text": (lambda c: edit(c / "trainer_state.json", lambda s: s.update(save_steps="4")),
                            "trainer_state.json: save_steps must be a count, got '4'"),
        "every 0 steps": (lambda c: edit(c / "trainer_state.json", lambda s: s.update(logging_steps=0)),
                          "trainer_state.json: something is due every 0 steps"),
        "a state unknown": (lambda c: edit(c / "trainer_state.json", lambda s: s.update(other=1)),
                            "trainer_state.json: other is unknown"),
        "no random state at all": (lambda c: (c / "random-0.safetensors").write_bytes(b"x"),
                                   "random-0.safetensors: damaged random states"),
        "random state of none": (lambda c: edit_tensor(c, "python", None), "holds no random state 'python'"),
        "random state of another size": (lambda c: edit_tensor(c, "torch", lambda s: s[:-1]), "torch: torch.uint8"),
        "random state of another type": (lambda c: edit_tensor(c, "gauss", lambda s: s.float()), "gauss: torch.float32"),
        # The generators themselves would read what lies behind their words.
        "random place": (lambda c: edit_tensor(c, "numpy", lambda s: torch.cat((s[:-1], s[-1:] + 625))), "numpy: no state"),
        "random words": (lambda c: edit_tensor(c, "python", lambda s: -s), "python: no state of its generator"),
        "random bytes": (lambda c: edit_tensor(c, "torch", lambda s: s * 0 + 255), "random-0.safetensors: damaged"),
    }  # fmt: skip

    @pytest.mark.parametrize("name", DAMAGES)
    def test_is_named(self, finished, tmp_path, monkeypatch, name):
        damage, message = self.DAMAGES[name]
        shutil.copytree(finished, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        (newest, older, _), recipe = checkpoints("out"), load_recipe("recipe.yaml")
        damage(newest)
        if "does not list" not in message:
            write_sums(newest, [path for path in newest.iterdir() if path.name != SUMS], SUMS)
        advice = rf"; go on from the one before it: --resume-from {older}"
        with pytest.raises(ValueError, match=rf"out/checkpoint-12: damaged checkpoint \(.*{message}.*\){advice}"):
            train(recipe, resume=True, progress=False)
        with pytest.raises(ValueError, match=message):
            merge_checkpoint(newest, "merged")
        assert not Path("merged").exists()

    def test_a_folder_of_another_steps_name(self, finished, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        Path("out/checkpoint-12").rename("out/checkpoint-13")
        with pytest.raises(ValueError, match=r"checkpoint-13: damaged checkpoint \(it was written after step 12\)"):
            train(load_recipe("recipe.yaml"), resume=True, progress=False)
        Path("out/checkpoint-13").rename("out/mine")
        assert merge_checkpoint("out/mine", "merged").num_parameters() > 0

    def test_weights_that_are_not_finite(self, finished, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        newest, log = checkpoints("out")[0], Path("out/log.jsonl").read_bytes()
        tensors = load_file(newest / "model.safetensors")
        tensors["lm_head.weight"][3, 4] = float("nan")
        save_file(tensors, newest / "model.safetensors", metadata={"format": "pt"})
        write_sums(newest, [path for path in newest.iterdir() if path.name != SUMS], SUMS)
        with pytest.raises(
            ValueError,
            match=r"checkpoint-12: damaged checkpoint \(tensor lm_head.weight holds NaN or infinite values\); go on from",
        ):
            merge_checkpoint(newest, "merged")
        with pytest.raises(
            ValueError,
            match=r"checkpoint-12: damaged checkpoint \(tensor lm_head.weight holds NaN or infinite values\); go on from",
        ):
            train(load_recipe("recipe.yaml"), resume=True, progress=False)
        assert Path("out/log.jsonl").read_bytes() == log

    @pytest.mark.parametrize(
        "line", ["[1]", "1", '{"loss": 1}', '{"step": "1"}', '{"loss', '{"step": 9' + "9" * 5000 + "}", "[" * 99999]
    )
    def test_a_log_that_is_none(self, finished, tmp_path, monkeypatch, line):
        shutil.copytree(finished, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        lines = Path("out/log.jsonl").read_text().splitlines()
        Path("out/log.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
        with pytest.raises(ValueError, match=r"out/log.jsonl: line 2 is not an object with a step; remove it"):
            train(load_recipe("recipe.yaml"), resume=True, progress=False)

    @pytest.mark.parametrize("name", ["log.jsonl", "tokenizer.json", "config.json"])
    @pytest.mark.parametrize(
        "put", [os.mkfifo, os.mkdir, lambda place: place.symlink_to(place), lambda place: place.symlink_to("/dev/zero")]
    )
    def test_what_is_no_file_where_one_is_written(self, finished, tmp_path, monkeypatch, name, put):
        shutil.copytree(finished, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        log = Path("out/log.jsonl").read_bytes()
        Path("out", name).unlink(missing_ok=True)
        put(Path("out", name))
        older = checkpoints("out")[1]
        with pytest.raises(OSError, match=rf"out/{name}: is no file, but where the run writes one; move it away"):
            train(load_recipe("recipe.yaml"), resume=older, progress=False)
        assert len(checkpoints("out")) == 3
        assert name == "log.jsonl" or Path("out/log.jsonl").read_bytes() == log


class TestRandomStates:
    def test_every_generator_goes_on_where_it_was(self, tmp_path):
        def draw():
            # Of the normal numbers, which are made in pairs, the second is held back.
            return (
                random.random(),
                random.gauss(0, 1),
                np.random.rand(),
                np.random.standard_normal(),
                torch.rand(3).tolist(),
            )

        for _ in range(2):  # with and without a number held back
            draw()
            save_random_states(tmp_path / "random")
            expected = [draw() for _ in range(400)]  # more than there are words of a state
            set_random_states(read_random_states(tmp_path / "random"))
            assert [draw() for _ in range(400)] == expected
            random.gauss(0, 1)
            np.random.standard_normal()

    def test_of_a_gpu_where_there_is_one(self, tmp_path, monkeypatch):
        """A run of a GPU can go on without one, and the other way round."""
        state, found, original = torch.arange(16, dtype=torch.uint8), [], torch.Generator
        save_random_states(tmp_path / "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_rng_state", lambda: state)
            patch.setattr(torch.cuda, "set_rng_state", found.append)
            patch.setattr(torch, "Generator", lambda device: original() if device == "cpu" else Philox())
            save_random_states(tmp_path / "gpu")
            set_random_states(read_random_states(tmp_path / "cpu"))
            assert not found
            set_random_states(read_random_states(tmp_path / "gpu"))
            assert torch.equal(found.pop(), state)
            state[0] = 99
            save_random_states(tmp_path / "gpu")
            with pytest.raises(ValueError, match=r"gpu: damaged random states \(offset\)"):
                read_random_states(tmp_path / "gpu")
        set_random_states(read_random_states(tmp_path / "gpu"))
        assert not found


class Philox:
    """A GPU's generator, which takes some states only."""

    def set_state(self, state):
        if state[0] == 99:
            raise RuntimeError("offset")


class TestSavingInTheBackground:
    """The variant of `test_a_resumed_run_is_the_same_run` says that it changes no number."""

    CHANGES: ClassVar = {"async_save": True, "save_steps": 4, "keep_checkpoints": 3, "log_steps": 1}

    def test_steps_go_on_meanwhile_and_one_copy_is_held(self, write_recipe, tmp_path, monkeypatch):
        at_once = load_recipe(write_recipe(**(self.CHANGES | {"async_save": False}), output=str(tmp_path / "whole")))
        train(at_once, progress=False)
        later, original, seen = threading.Event(), checkpoint._save_file, []

        def slow(tensors, file):
            assert file.parent.name != "checkpoint-4" or later.wait(30), "the training waits for the writer"
            original(tensors, file)

        def save(writer, *args):
            seen.append(writer._pending)
            return original_save(writer, *args)

        original_save = checkpoint.CheckpointWriter.save
        monkeypatch.setattr(checkpoint, "_save_file", slow)
        monkeypatch.setattr(checkpoint.CheckpointWriter, "save", save)
        recipe = load_recipe(write_recipe(**self.CHANGES))
        at_step(monkeypatch, 7, later.set)
        train(recipe, progress=False)
        assert seen == [None] * 6  # copies of model and optimiser are made when nothing is being written
        assert [step_of(path) for path in checkpoints(recipe.output)] == [12, 8, 4]
        for saved in checkpoints(recipe.output):  # they are of the step, whatever came after it
            for name in ("model.safetensors", "optimizer.safetensors"):
                assert (saved / name).read_bytes() == (tmp_path / "whole" / saved.name / name).read_bytes()

    def test_an_error_ends_the_run_after_the_step(self, write_recipe, monkeypatch):
        original, step = checkpoint._save_file, PldrTrainer.training_step

        def fail(tensors, file):
            if file.parent.name == "checkpoint-8":
                raise OSError("no room")
            original(tensors, file)

        def after_writing(trainer, *args):
            if trainer.writer._pending is not None:
                trainer.writer._pending.exception(30)
            return step(trainer, *args)

        monkeypatch.setattr(checkpoint, "_save_file", fail)
        monkeypatch.setattr(PldrTrainer, "training_step", after_writing)
        recipe = load_recipe(write_recipe(**self.CHANGES))
        with pytest.raises(
            OSError, match=r"out/checkpoint-8: could not be written \(no room\); .*checkpoint-4 is whole"
        ):
            train(recipe, progress=False)
        assert losses(recipe.output)[-1][0] == 8
        assert leftovers(Path(recipe.output)) == []

    def test_killed_while_it_writes(self, write_recipe, tmp_path, monkeypatch):
        """The older checkpoint is whole, and the run goes on from it."""
        whole = load_recipe(write_recipe(**self.CHANGES, output=str(tmp_path / "whole")))
        train(whole, progress=False)
        recipe, original = load_recipe(write_recipe(**self.CHANGES)), checkpoint._save_file

        def killed(tensors, file):
            original(tensors, file)
            if file.parent.name == "checkpoint-8":
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_save_file", killed)
            assert forked(lambda: train(recipe, progress=False)) == -signal.SIGKILL
        assert [step_of(path) for path in checkpoints(recipe.output)] == [4]
        assert ".checkpoint.partial" in " ".join(leftovers(tmp_path / "out"))
        train(recipe, resume=True, progress=False)
        assert log(recipe.output) == log(whole.output)
        assert leftovers(tmp_path / "out") == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this platform has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_hangs_up(write_recipe, monkeypatch, ignored):
    """As at SIGTERM; under nohup, which ignores it, the run goes on."""
    stop_at(monkeypatch, 7, signal.SIGHUP)
    recipe = load_recipe(write_recipe())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            assert train(recipe, progress=False)["steps"] == 12
        else:
            with pytest.raises(TrainingInterrupted, match=r"stopped by SIGHUP after step [78] of 12; saved in"):
                train(recipe, progress=False)
            assert len(checkpoints(recipe.output)) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no terminals that can be made")
def test_a_terminal_that_is_closed(write_recipe, tmp_path):
    """With the progress bar in it, and nowhere left to say that a checkpoint was written."""
    import pty

    path, log_file = write_recipe(optimization__steps=50000, log_steps=1), tmp_path / "out" / "log.jsonl"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "pldr", "train", str(path)])
    while not log_file.is_file():
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)  # or it would be full
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    (saved,) = checkpoints(tmp_path / "out")
    assert losses(tmp_path / "out")[-1][0] == step_of(saved)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("clock", ["time", "perf_counter"])
def test_clocks_that_are_set_back_or_stand_still(write_recipe, monkeypatch, clock):
    """No duration is negative, and none of nothing is divided by."""
    ticks = iter(range(10**9, 0, -100))
    monkeypatch.setattr(time, clock, (lambda: float(next(ticks))) if clock == "time" else (lambda: 5.0))
    recipe = load_recipe(write_recipe(save_steps=6))
    summary = train(recipe, progress=True)
    monkeypatch.undo()
    lines = [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]
    (runtime,) = [line["train_runtime"] for line in lines if "train_runtime" in line]
    assert not [name for line in lines for name in line if "per_second" in name]
    if clock == "time":
        assert 0 < runtime == summary["seconds"] < 60
        assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / runtime)
    else:
        assert runtime == summary["seconds"] == summary["tokens_per_second"] == 0


@pytest.mark.slow
def test_killed_at_ten_random_moments(write_recipe, tmp_path):
    """SIGKILL, also while a checkpoint is written: at most the steps since the last one are done again."""
    seed = int(os.environ.get("PLDR_KILL_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"the same moments again: PLDR_KILL_SEED={seed}")  # noqa: T201
    generator = random.Random(seed)
    steps, every = 150, 3
    changes = {"optimization__steps": steps, "save_steps": every, "log_steps": 1}
    whole = load_recipe(write_recipe(**changes, output=str(tmp_path / "whole")))
    seconds = train(whole, progress=False)["seconds"] * every / steps  # from one checkpoint to the next
    recipe, out = load_recipe(write_recipe(**changes)), tmp_path / "out"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pldr.training.run"])  # each of them starts with everything imported

    def newest():
        return step_of(checkpoints(out)[0]) if checkpoints(out) else 0

    for _ in range(10):
        before = newest()
        run = processes.Process(target=train, args=(recipe,), kwargs={"resume": before > 0, "progress": False})
        run.start()
        while run.is_alive() and newest() <= before:
            time.sleep(0.001)
        time.sleep(generator.random() * 2 * seconds)
        assert run.is_alive(), f"ended by itself, with exit code {run.exitcode}"
        run.kill()
        run.join()
        assert losses(out)[-1][0] - newest() <= every
    train(recipe, resume=True, progress=False)
    assert losses(out) == losses(whole.output)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in Path(whole.output).iterdir())
