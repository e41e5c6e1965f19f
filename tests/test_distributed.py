"""Two processes on the CPU, as torchrun starts them, against one process on the same global batch."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from helpers import TINY, toy_recipe, write_texts
from pldr import load_model
from pldr.files import read_sums
from pldr.recipe import load_recipe
from pldr.training.checkpoint import SUMS, check_checkpoint, checkpoints, merge_checkpoint, step_of
from pldr.training.run import train

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_parallel.py"

# Two processes sum in another order than one, and so round otherwise. A constant operator does not mind. A learned one
# does: AdamW divides each gradient by its own size, so that those which are all rounding become whole steps, and the power
# law multiplies what they change. With an epsilon far above the gradients a step is proportional to the gradient: twenty
# steps then differ by 3e-6 at most with either order of the sums (four seeds), and by 3e-4 or more where half of the
# gradient is left out, or is not divided by two. So the comparison of a learned operator is made there.
SHARED = {
    "optimization__steps": 20, "optimization__learning_rate": 1e-5, "optimization__epsilon": 1.0,
    "optimization__warmup_steps": 2, "log_steps": 1, "eval_steps": 6,
}  # fmt: skip
VARIANTS = {
    "dag": {"optimization__dag_G_LM": 0.1, "optimization__learning_rate": 3e-6},
    "learned": {"save_steps": 3, "keep_checkpoints": 4},
    "constant": {
        "model__config": TINY | {"operator": "constant", "operator_init": "random"},
        "optimization__learning_rate": 1e-3, "optimization__epsilon": 1e-5,
    },
    "handed off": {"optimization__handoff_step": 6},
}  # fmt: skip
RESTARTED = {"optimization__steps": 150, "save_steps": 5, "distributed": {"sharding": "none"}, "async_save": True}
# Two processes of half the batch each: the same run as one.
PAIRS = {
    (variant, sharding): changes | {"distributed": {"sharding": sharding}}
    for variant, changes in VARIANTS.items()
    for sharding in ("none", "full")
} | {
    # Two replicas of one shard each: the code path, on two processes.
    ("learned", "hybrid"): {"distributed": {"sharding": "hybrid", "replicas": 2}, "save_steps": 3},
    ("learned", "kept"): VARIANTS["learned"] | {"distributed": {"sharding": "full", "reshard": False}},
    ("learned", "background"): VARIANTS["learned"] | {"distributed": {"sharding": "full"}, "async_save": True},
    ("learned", "unbroken"): RESTARTED,
    ("learned", "bf16"): {
        "distributed": {"sharding": "full"}, "optimization__clip_value": None, "optimization__clip_norm": 1.0,
        "optimization__precision": "bf16",
    },
    ("no", "offload"): {"distributed": {"sharding": "full", "cpu_offload": True}},
    ("no", "replicas"): {"distributed": {"sharding": "hybrid", "replicas": 3}},
}  # fmt: skip

# All runs of two processes in one start of them. An error comes in both, before they wait for each other.
TRAIN_ALL = """
import json, os, sys
from pldr.recipe import load_recipe
from pldr.training.run import train
for path in sys.argv[1:]:
    try:
        summary = train(load_recipe(path), progress=False)
    except ValueError as error:
        summary = {"error": str(error)}
    if os.environ["RANK"] == "0":
        with open(path + ".json", "w") as stream:
            json.dump(summary, stream)
"""


BREAK_ONE = """
import os, sys
from pldr.recipe import load_recipe
from pldr.training.run import train
from pldr.training.trainer import PldrTrainer
original = PldrTrainer.compute_loss
def broken(trainer, *args, **kwargs):
    loss = original(trainer, *args, **kwargs)
    return loss * float("nan") if os.environ["RANK"] == "1" and trainer.state.global_step in (2, 3) else loss
PldrTrainer.compute_loss = broken
train(load_recipe(sys.argv[1]), progress=False)
"""


def launch(*arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), *map(str, arguments)]  # fmt: skip
    environment = os.environ | {"PLDR_TRACEBACK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def launched(*arguments, restarts=0):
    """Two processes, which end with the block: SIGTERM reaches them through torchrun, SIGKILL would not."""
    run = launch(*arguments, restarts=restarts)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()
            run.communicate(timeout=120)


def finish(run):
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return output


def logged(folder, name="loss"):
    return [line[name] for line in map(json.loads, (folder / "log.jsonl").open()) if "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_model_file):
    """A folder for each run, NAME-HOW or NAME-alone, and a function that writes and names its recipe."""
    root = tmp_path_factory.mktemp("runs")
    texts = write_texts(root / "texts")

    def write(name, how, **changes):
        output = root / f"{name}-{how}".replace(" ", "-")
        file = output.with_suffix(".yaml")
        file.write_text(toy_recipe(texts, toy_model_file, output=output, **(SHARED | changes)))
        return file, output

    return write


@pytest.fixture(scope="module")
def alone(runs):
    """Folder and summary of each variant in one process."""

    def run(name):
        file, folder = runs(name, "alone", **VARIANTS[name])
        return folder, train(load_recipe(file), progress=False)

    return {name: run(name) for name in VARIANTS}


@pytest.fixture(scope="module")
def pairs(runs, tmp_path_factory):
    """Folder and summary of each run of `PAIRS`."""
    script = tmp_path_factory.mktemp("script") / "train_all.py"
    script.write_text(TRAIN_ALL)
    written = {key: runs(*key, optimization__batch_size=2, **changes) for key, changes in PAIRS.items()}
    with launched(script, *(file for file, _ in written.values())) as run:
        finish(run)
    return {key: (folder, json.loads(open(f"{file}.json").read())) for key, (file, folder) in written.items()}


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_as_one(alone, pairs, sharding, variant):
    (one, expected), (two, summary) = alone[variant], pairs[variant, sharding]
    assert logged(two) == pytest.approx(logged(one), abs=1e-5)
    assert summary["tokens"] == expected["tokens"]
    for name in ("validation_loss", "validation_accuracy", "train_accuracy"):
        assert summary[name] == pytest.approx(expected[name], abs=1e-5), name
    reference = load_model(one).state_dict()
    for name, tensor in load_model(two).state_dict().items():
        assert torch.allclose(tensor, reference[name], atol=1e-6 if variant in ("dag", "learned") else 1e-4), name


def test_hybrid_sharding_and_bf16(alone, pairs):
    (one, _), (hybrid, _), (bf16, _) = alone["learned"], pairs["learned", "hybrid"], pairs["learned", "bf16"]
    assert logged(hybrid) == pytest.approx(logged(one), abs=1e-5)
    assert logged(bf16) == pytest.approx(logged(one), abs=0.05)


def test_saving_in_the_background_changes_nothing(pairs):
    """Threads of two processes, each with its shards, that wait for each other."""
    (at_once, _), (background, _) = pairs["learned", "full"], pairs["learned", "background"]
    assert logged(background) == logged(at_once)
    assert [step_of(path) for path in checkpoints(background)] == [20, 18, 15, 12]
    for saved in checkpoints(background):
        check_checkpoint(saved)
        files = {path.name for path in saved.glob("*.safetensors")}
        assert len(files) == 8, "weights, moments and random states of both, and what is whole"
        assert {read_sums(saved, SUMS)[name] for name in files} == {
            read_sums(at_once / saved.name, SUMS)[name] for name in files
        }
    assert not list(background.glob(".*"))


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_step_that_breaks_in_one_process_is_skipped_by_both(runs, tmp_path, sharding):
    """Also where each holds a part of the gradients. Weights and moments stay as they are, bit for bit."""
    changes = {"optimization__batch_size": 2, "optimization__steps": 6, "optimization__warmup_steps": 1, "log_steps": 3,
               "save_steps": 1, "keep_checkpoints": 6, "distributed": {"sharding": sharding}}  # fmt: skip
    file, out = runs("learned", f"broken-{sharding}", **changes)
    script = tmp_path / "break.py"
    script.write_text(BREAK_ONE)
    with launched(script, file) as run:
        finish(run)
    sums = {step_of(saved): read_sums(saved, SUMS) for saved in checkpoints(out)}
    tensors = {
        step: {n: s for n, s in found.items() if n.startswith(("model", "optimizer"))} for step, found in sums.items()
    }
    assert tensors[2] == tensors[3] == tensors[4]
    assert all(tensors[2][name] != tensors[5][name] for name in tensors[2] if name.endswith("safetensors"))
    lines = [line for line in map(json.loads, (out / "log.jsonl").open()) if "skipped_loss" in line]
    assert [(line["step"], line["skipped_loss"], len(line["skipped_rows"])) for line in lines] == [
        (3, "nan", 4),
        (4, "nan", 4),
    ]
    assert all(math.isfinite(loss) for loss in logged(out))


def test_weights_that_stay_gathered_are_the_same(pairs):
    (cut, _), (kept, _) = pairs["learned", "full"], pairs["learned", "kept"]
    assert logged(kept) == logged(cut)


def test_what_two_processes_can_not_do(pairs):
    for (name, how), message in [(("no", "offload"), "cpu_offload needs GPUs"),
                                 (("no", "replicas"), "replicas=3 does not divide 2")]:  # fmt: skip
        folder, summary = pairs[name, how]
        assert message in summary["error"]
        assert not folder.exists()


def test_sharded_checkpoints_load_on_another_number_of_processes(alone, pairs, tmp_path):
    """Of two processes, on one; and merged to a model that one process can use."""
    (one, _), (two, _) = alone["learned"], pairs["learned", "full"]
    copy = shutil.copytree(two, tmp_path / "copy")
    saved = copy / "checkpoint-12"
    assert sorted(file.name for file in saved.glob("*.safetensors")) == [
        "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors", "optimizer-1-of-2.safetensors",
        "optimizer-2-of-2.safetensors", "optimizer.safetensors", "random-0.safetensors", "random-1.safetensors",
    ]  # fmt: skip
    merge_checkpoint(saved, tmp_path / "merged")
    reference = load_model(one / "checkpoint-12").state_dict()
    for name, tensor in load_model(tmp_path / "merged").state_dict().items():
        assert torch.allclose(tensor, reference[name], atol=1e-4), name

    recipe = load_recipe(two.with_suffix(".yaml"), [f"output={copy}"])
    with pytest.raises(ValueError, match=r"sequences per step was 4 .* and is 2 now"):
        train(recipe, resume=saved, progress=False)
    recipe.optimization.batch_size = 4  # the same global batch on one process
    train(recipe, resume=saved, progress=False)
    assert logged(copy) == pytest.approx(logged(one), abs=1e-5)


def test_sigterm_to_both_saves_one_checkpoint(write_recipe, tmp_path):
    """Which two processes that share nothing then go on from, to the end."""
    changes = {"optimization__steps": 60, "optimization__batch_size": 2, "log_steps": 1}
    out = tmp_path / "out"
    with launched("-m", "pldr", "train", write_recipe(**changes, distributed={"sharding": "full"})) as run:
        while not (out / "log.jsonl").is_file() or not logged(out):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=120)
    assert "stopped by SIGTERM" in errors
    (saved,) = checkpoints(out)
    assert logged(out, "step") == list(range(1, step_of(saved) + 1))
    assert step_of(saved) < 60
    with launched("-m", "pldr", "train", write_recipe(**changes, distributed={"sharding": "none"}), "--resume") as run:
        finish(run)
    assert logged(out, "step") == list(range(1, 61))
    assert load_model(out).config.operator == "learned"


def test_a_run_survives_the_loss_of_a_process(pairs, runs):
    """First of the main one, whose lock stays behind, then of the other: torchrun starts both again, and each time they
    go on from the last checkpoint, to what an unbroken run comes to."""
    whole, _ = pairs["learned", "unbroken"]
    file, out = runs("learned", "restarted", optimization__batch_size=2, **RESTARTED)

    def main_process():
        return {int(path.name.rpartition("-")[2]) for path in out.parent.glob(f".{out.name}.lock-*-*")}

    with launched("-m", "pldr", "train", file, "--resume-from", "auto", restarts=3) as run:
        killed = set()
        for lost in ("main", "other"):
            reached = step_of(checkpoints(out)[0]) if checkpoints(out) else 0
            while not (main_process() - killed and checkpoints(out) and step_of(checkpoints(out)[0]) > reached):
                assert run.poll() is None, run.communicate()[1]
                time.sleep(0.01)
            (main,) = main_process() - killed
            children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout
            victim = main if lost == "main" else next(pid for pid in map(int, children.split()) if pid != main)
            os.kill(victim, signal.SIGKILL)
            killed.add(main)
        finish(run)
    assert logged(out, "step") == list(range(1, 151))
    assert logged(out) == logged(whole)
    assert not list(out.parent.glob(f".{out.name}*"))


def test_the_measurement_of_two_gpus(tmp_path):
    """benchmarks/bench_parallel.py whole, on two processes of the CPU: what it compares is the same, what it times is there."""
    record = tmp_path / "record.json"
    sizes = {"batch": 2, "length": 64, "warmup": 2, "windows": 2, "steps": 2, "output": record, "work": tmp_path}
    command = [
        sys.executable,
        BENCHMARK,
        "--tiny",
        "--no-compile",
        *(f"--{key}={value}" for key, value in sizes.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(record.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert {"commit", "device", "date", "torch"} <= found.keys()
    operators, shardings = ("learned", "constant", "handed off"), ("none", "full", "hybrid")
    halves, rows = found["parity"][:2], found["parity"][2:]
    assert {(row["operator"], row["sharding"]) for row in rows} == {*product(operators, shardings)}
    assert min(row["largest_difference"] for row in halves) > 1e-4
    assert all(row["holds"] for row in found["parity"])
    assert max(row["largest_difference"] for row in rows) <= 1e-5
    assert [row["holds"] for row in found["checkpoint"]] == [True] * 3
    (scores,) = found["eval"]
    assert scores["holds"]
    assert set(scores["perplexity"]) == {"learned", "cached", "frozen"} <= set(scores["tasks"]["piqa"]["scores"])
    assert [row["sharding"] for row in found["scaling"]] == ["none"] * 4 + ["full"] * 2 + ["hybrid"] * 2
    for row in found["scaling"]:
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert ("efficiency" in row) == (row["processes"] == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
