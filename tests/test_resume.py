"""Nothing is lost: runs that are stopped, killed, damaged or out of disk go on as if nothing had happened."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pldr import load_model, load_tokenizer
from pldr.data import rows
from pldr.recipe import load_recipe
from pldr.training import TrainingInterrupted
from pldr.training.callbacks import ProgressBar
from pldr.training.checkpoint import SavedTensors, checkpoints, step_of
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
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A stream has no end: its first batch would be hundreds of passes through the toy text."""
    monkeypatch.setattr(rows, "_BATCH_CHARACTERS", 2000)


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["accuracy"], line["global_loss"]) for line in lines if "loss" in line]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    original = ProgressBar.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs between two byte codes of the main thread

    monkeypatch.setattr(ProgressBar, "on_step_end", stop)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_same_run(write_recipe, tmp_path, monkeypatch, variant):
    """Bit for bit, with log lines that span the interruption: the losses, what they sum to, and the weights."""
    changes = VARIANTS[variant] | {"eval_steps": 5, "log_steps": 3}
    whole = load_recipe(write_recipe(**changes, output=str(tmp_path / "whole")))
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
    assert losses(recipe.output) == losses(whole.output)
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
        ({"optimization__learning_rate": 1e-4}, r"optimization.learning_rate was 0.003 .* and is 0.0001 now"),
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
    # The state of the random generators is read without executing anything (torch.load, weights_only).
    assert [path.name for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")] == [
        "rng_state.pth"
    ]
    names = {name.rpartition(".")[0] for name in SavedTensors(saved, "optimizer").names()}
    assert names == {name for name, _ in load_model(saved).named_parameters()}
    code, _, errors = run("merge", saved, tmp_path / "merged")
    assert code == 0, errors
    merged = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in one.items())
    assert len(load_tokenizer(tmp_path / "merged")) == merged["lm_head.weight"].shape[0]


@pytest.mark.parametrize("limit", [0, 2])
def test_steps_with_a_broken_loss(write_recipe, monkeypatch, limit):
    """Stop at the first, naming step, batch and checkpoint; or leave it out, weights and moments untouched."""
    recipe = load_recipe(write_recipe(save_steps=3, log_steps=1, optimization__skip_nonfinite=limit))
    original = PldrTrainer.compute_loss
    seen = {}

    def broken(trainer, model, inputs, *args, **kwargs):
        loss = original(trainer, model, inputs, *args, **kwargs)
        step = trainer.state.global_step + 1
        weight = model.lm_head.weight
        if model.training and step in (5, 6):
            seen[step] = (weight.detach().clone(), trainer.optimizer.state[weight]["exp_avg"].clone())
            return loss * float("nan" if step == 5 else "inf")
        if model.training and step == 7:
            seen[step] = (weight.detach().clone(), trainer.optimizer.state[weight]["exp_avg"].clone())
        return loss

    monkeypatch.setattr(PldrTrainer, "compute_loss", broken)
    if limit == 0:
        with pytest.raises(FloatingPointError, match=r"became nan at step 5 \(data rows \d+, \d+, \d+, \d+\); "
                                                     r"last good checkpoint: .*checkpoint-3; lower"):  # fmt: skip
            train(recipe, progress=False)
        assert [step_of(path) for path in checkpoints(recipe.output)] == [3]
        return
    summary = train(recipe, progress=False)
    assert summary["steps"] == 12
    for step in (6, 7):
        assert all(torch.equal(one, other) for one, other in zip(seen[5], seen[step], strict=True))
    lines = map(json.loads, (Path(recipe.output) / "log.jsonl").open())
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line][-1] == 2
    recipe.optimization.skip_nonfinite = 1
    with pytest.raises(FloatingPointError, match=r"the loss of 2 steps was NaN or infinite .*the last at step 6"):
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
    assert not (Path(recipe.output) / ".partial").exists()
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
    path = write_recipe(optimization__steps=5000)
    run = subprocess.Popen([sys.executable, "-m", "pldr", "train", str(path)], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.jsonl"
    while not log.is_file() or '"loss"' not in log.read_text():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "Traceback" not in errors
    (saved,) = checkpoints(tmp_path / "out")
    last = errors.strip().splitlines()[-1]
    assert f"stopped by SIGTERM after step {step_of(saved)} of 5000; saved in" in last


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
