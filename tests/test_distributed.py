"""Two processes on the CPU, as torchrun starts them, against one process on the same global batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import TINY
from pldr import load_model
from pldr.recipe import load_recipe
from pldr.training.checkpoint import checkpoints, step_of
from pldr.training.run import train

pytestmark = pytest.mark.slow
VARIANTS = {
    "dag": {"optimization__dag_G_LM": 0.1},
    "learned": {},
    "constant": {"model__config": TINY | {"operator": "constant", "operator_init": "random"}},
    "handed off": {"optimization__handoff_step": 10},
}

# The rounding of sums differs between one process and two. A high rate at the start amplifies that, a usual one does not.
GENTLE = {"optimization__learning_rate": 1e-5, "optimization__warmup_steps": 2}


def launch(path, *more, processes=2):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
               str(port), "-m", "pldr", "train", str(path), *more]  # fmt: skip
    environment = os.environ | {"PLDR_TRACEBACK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def finish(run):
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return output


def losses(folder):
    lines = map(json.loads, (Path(folder) / "log.jsonl").open())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_as_one(write_recipe, tmp_path, sharding, variant):
    changes = VARIANTS[variant] | GENTLE | {"optimization__steps": 20, "log_steps": 1, "eval_steps": 10}
    alone = load_recipe(write_recipe(**changes, output=str(tmp_path / "alone")))
    expected = train(alone, progress=False)
    path = write_recipe(**changes, optimization__batch_size=2, distributed={"sharding": sharding})
    summary = json.loads(finish(launch(path, "--json")))
    assert losses(tmp_path / "out") == pytest.approx(losses(alone.output), abs=1e-5)
    assert summary["tokens"] == expected["tokens"]
    for name in ("validation_loss", "validation_accuracy", "train_accuracy"):
        assert summary[name] == pytest.approx(expected[name], abs=1e-5), name
    one, other = load_model(tmp_path / "out").state_dict(), load_model(alone.output).state_dict()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-4), name


def test_sharded_checkpoints_load_on_another_number_of_processes(write_recipe, tmp_path):
    """Two processes, then one, then two; and merged to a model that one process can use."""
    changes = GENTLE | {"optimization__steps": 20, "log_steps": 1, "save_steps": 5, "keep_checkpoints": 4}
    alone = load_recipe(write_recipe(**changes, output=str(tmp_path / "alone")))
    train(alone, progress=False)
    path = write_recipe(**changes, optimization__batch_size=2, distributed={"sharding": "full"})
    finish(launch(path))
    saved = {step_of(checkpoint): checkpoint for checkpoint in checkpoints(tmp_path / "out")}
    assert sorted(file.name for file in saved[15].glob("*.safetensors")) == [
        "model-1-of-2.safetensors", "model-2-of-2.safetensors", "optimizer-1-of-2.safetensors",
        "optimizer-2-of-2.safetensors", "optimizer.safetensors",
    ]  # fmt: skip
    merged = tmp_path / "merged"
    subprocess.run(
        [sys.executable, "-m", "pldr", "merge", str(saved[15]), str(merged)], check=True, capture_output=True
    )
    reference = load_model(Path(alone.output) / "checkpoint-15").state_dict()
    for name, tensor in load_model(merged).state_dict().items():
        assert torch.allclose(tensor, reference[name], atol=1e-4), name

    expected = losses(alone.output)
    with pytest.raises(ValueError, match=r"sequences a step was 4 .* and is 2 now"):
        train(load_recipe(path), resume=saved[15], progress=False)
    # The same global batch on one process.
    train(load_recipe(path, ["optimization.batch_size=4"]), resume=saved[15], progress=False)
    assert losses(tmp_path / "out") == pytest.approx(expected, abs=1e-5)


def test_hybrid_sharding_and_offload(write_recipe, tmp_path):
    """Two replicas of one shard each: the code path, on two processes."""
    changes = GENTLE | {"optimization__steps": 12, "log_steps": 1}
    alone = load_recipe(write_recipe(**changes, output=str(tmp_path / "alone")))
    train(alone, progress=False)
    path = write_recipe(**changes, optimization__batch_size=2, distributed={"sharding": "hybrid", "replicas": 2},
                        save_steps=3)  # fmt: skip
    finish(launch(path))
    assert losses(tmp_path / "out") == pytest.approx(losses(alone.output), abs=1e-5)
    path = write_recipe(**changes, output=str(tmp_path / "other"), optimization__batch_size=2,
                        distributed={"sharding": "full"}, optimization__clip_value=None, optimization__clip_norm=1.0,
                        optimization__precision="bf16")  # fmt: skip
    finish(launch(path))
    assert losses(tmp_path / "other") == pytest.approx(losses(alone.output), abs=0.05)
    for settings, message in [({"sharding": "full", "cpu_offload": True}, "cpu_offload needs GPUs"),
                              ({"sharding": "hybrid", "replicas": 3}, "replicas=3 does not divide 2")]:  # fmt: skip
        run = launch(write_recipe(**changes, output=str(tmp_path / "no"), distributed=settings))
        assert message in run.communicate(timeout=120)[1]
        assert run.returncode == 1
        assert not (tmp_path / "no").exists()


def test_sigterm_to_both_saves_one_checkpoint(write_recipe, tmp_path):
    path = write_recipe(optimization__steps=5000, optimization__batch_size=2, distributed={"sharding": "full"})
    run = launch(path)
    log = tmp_path / "out" / "log.jsonl"
    while not log.is_file() or '"loss"' not in log.read_text():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert "stopped by SIGTERM" in errors
    (saved,) = checkpoints(tmp_path / "out")
    path = write_recipe(optimization__steps=5000, optimization__batch_size=2, distributed={"sharding": "none"})
    resumed = launch(path, "--resume")
    while step_of(checkpoints(tmp_path / "out")[0]) == step_of(saved):
        assert resumed.poll() is None, resumed.communicate()[1]
        if losses(tmp_path / "out")[-1:] and json.loads(log.read_text().splitlines()[-1])["step"] > step_of(saved):
            break
        time.sleep(0.1)
    resumed.kill()
    resumed.communicate()
