"""Checkpoints of a training run: folders `checkpoint-STEP` that are there whole or not at all, without a pickle.

A checkpoint holds the model and the optimiser by parameter name, in safetensors: one file each, or, where a run is
sharded, one file each a rank (`model-2-of-4.safetensors`), every tensor cut along its first dimension. Either loads on
any number of ranks. The recipe that it was made with is part of it.
"""

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerState
from transformers.initialization import no_init_weights

from pldr.checkpoints.load import check_tensors, read_config
from pldr.configuration_pldr import PldrConfig
from pldr.files import (
    check_output,
    one_line,
    parse_json,
    process_mark,
    read_sums,
    read_text,
    settle,
    sha256,
    sync,
    whole_folder,
    write_sums,
)
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tokenizer import load_tokenizer
from pldr.training.processes import on_main
from pldr.training.randomness import random_file, read_random_states

_NAME = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"(?P<kind>\w+)-(?P<rank>\d+)-of-(?P<ranks>\d+)\.safetensors")
SUMS = "CHECKPOINT.SHA256"
RECIPE = "recipe.json"  # and the number of processes
STATE = "run.json"  # what the Trainer forgets
_TRAINER_STATE = "trainer_state.json"
# What is read of each; see `pldr.files.check_shape`.
_LOSSES = {"loss": float, "accuracy": float}
_SHAPES: dict[str, Any] = {
    RECIPE: {"processes": int, "data": dict, "optimization": {"batch_size": int, "accumulation": int}},
    STATE: {
        "totals": {"sequences": int, "steps": int, "counted": (int,), "skipped": int, "skipped_in_a_row": (int,), **_LOSSES},
        "guesses": [float], "tr_loss": float, "last": (_LOSSES,), "last_logged": int, "log_lines": int,
    },
    _TRAINER_STATE: {
        **dict.fromkeys(("global_step", "logging_steps", "eval_steps", "save_steps", "num_input_tokens_seen"), int),
        **dict.fromkeys(("best_global_step", "best_metric", "best_model_checkpoint"), None),
        "epoch": float, "total_flos": float, "train_batch_size": int, "log_history": [dict], "stateful_callbacks": dict,
    },
}  # fmt: skip


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(
        (p for p in Path(run).glob("checkpoint-*") if _step_in(p.name) is not None), key=step_of, reverse=True
    )


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    step = _step_in(checkpoint.name)
    assert step is not None
    return step


def _step_in(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def abandon_newer(checkpoint: Path) -> None:
    """Put checkpoints newer than the one that a run goes on from out of its way, as `abandoned-checkpoint-STEP`."""
    for newer in checkpoints(checkpoint.parent):
        if step_of(newer) > step_of(checkpoint):
            target = newer.with_name(f"abandoned-{newer.name}")
            if target.exists():
                shutil.rmtree(target)
            os.replace(newer, target)


# --- is it whole? ---------------------------------------------------------------------------------------------------


def check_checkpoint(checkpoint: Path) -> None:
    """
    Raises:
        ValueError: a file is missing, was added or does not match its sum; or what is in them does not belong together.
            The checkpoint before is named, if there is one.
    """
    fault = _fault(checkpoint)
    if fault is None:
        return
    step = _step_in(checkpoint.name)
    older = [path for path in checkpoints(checkpoint.parent) if step is not None and step_of(path) < step]
    whole = next((path for path in older if _fault(path) is None), None)
    advice = f"go on from the one before it: --resume-from {whole}" if whole else "no older checkpoint is whole"
    raise ValueError(f"{checkpoint}: damaged checkpoint ({fault}); {advice}")


def _fault(checkpoint: Path) -> str | None:
    try:
        return _wrong_file(checkpoint) or _missing_file(checkpoint) or _wrong_content(checkpoint)
    except (ValueError, OSError, SafetensorError) as error:
        return one_line(error)


def _wrong_file(checkpoint: Path) -> str | None:
    if not (checkpoint / SUMS).is_file():
        return f"no {SUMS}"
    sums = read_sums(checkpoint, SUMS)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()} - {SUMS}
    for name in sorted(sums.keys() | files):
        if name not in files:
            return f"{name} is missing"
        if name not in sums:
            return f"{SUMS} does not list {name}"
        if sha256(checkpoint / name) != sums[name]:
            return f"{name} does not match its sum"
    return None


def _missing_file(checkpoint: Path) -> str | None:
    def names() -> Iterator[str]:
        yield from ("config.json", *_SHAPES)
        yield from map(random_file, range(_read(checkpoint, RECIPE)["processes"]))

    for name in names():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for kind in ("model", "optimizer"):
        try:
            SavedTensors(checkpoint, kind)
        except ValueError as error:
            return one_line(error)
    return None


def _read(checkpoint: Path, name: str) -> Any:
    """What one of the JSON files holds, as it must be."""
    return parse_json(read_text(checkpoint / name), name, _SHAPES[name])


def _wrong_content(checkpoint: Path) -> str | None:
    state, its = _read(checkpoint, STATE), _read(checkpoint, _TRAINER_STATE)
    if unknown := sorted(its.keys() - {field.name for field in dataclasses.fields(TrainerState)}):
        return f"{_TRAINER_STATE}: {unknown[0]} is unknown"
    step = its["global_step"]
    named = _step_in(checkpoint.name.removeprefix("abandoned-"))
    if named is not None and named != step:
        return f"it was written after step {step}"
    if min(its[f"{name}_steps"] for name in ("logging", "eval", "save")) < 1:
        return f"{_TRAINER_STATE}: something is due every 0 steps"
    if max(state["totals"]["steps"], state["last_logged"]) > step or len(state["guesses"]) != 2:
        return f"{STATE} is of another step"
    for rank in range(_read(checkpoint, RECIPE)["processes"]):
        read_random_states(checkpoint / random_file(rank))
    config, model = read_config(checkpoint), SavedTensors(checkpoint, "model")
    check_tensors(model.shapes, config, "model")
    for name in model.shapes:
        if not bool(torch.isfinite(model[name]).all()):
            return f"tensor {name} holds NaN or infinite values"
    found, expected = SavedTensors(checkpoint, "optimizer").shapes, _optimizer_shapes(config)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if not wrong:
        return None
    return f"optimizer: {len(wrong)} tensors are missing, unknown or mis-shaped, the first {wrong[0]}"


def _optimizer_shapes(config: PldrConfig) -> dict[str, tuple[int, ...]]:
    """What `optimizer_tensors` gives of a model, by name and shape."""
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in PldrForCausalLM(config).named_parameters()}
    moments = {f"{name}.{key}": shape for name, shape in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
    return moments | {f"{name}.step": () for name in parameters}


# --- writing --------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other: at once, or in the background while training goes on.

    In the background, weights and optimiser (this process's share) are copied to the host and written from there. The
    next checkpoint waits for that, so that there is one copy at most. Use it as a context, whose end waits, too.

    Args:
        run: folder of the run.
        process: this process among those of the run, which all write at the same steps.
        keep: how many of the newest checkpoints stay.
        background: whether the training goes on meanwhile.
    """

    def __init__(self, run: Path, process: PartialState, *, keep: int, background: bool) -> None:
        self.run, self.process, self.keep = run, process, keep
        self._tensors: list[tuple[Path, dict[str, torch.Tensor]]] = []  # to be written in the background
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        # The threads of several processes wait for each other, apart from what the training sends.
        together = background and process.num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=24)) if together else None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # which waits
        if kind is None:
            self.wait()

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to fill with the checkpoint of a step, which moves to its place after the block.

        Raises:
            OSError: the disk is full, or the like; older checkpoints are then still there. In the background, the next
                `check` or `wait` raises it.
        """
        self.wait()
        target = self.run / f"checkpoint-{step}"
        with _explained(target):
            partial = on_main(self.process, lambda: _make_partial(target))
            try:
                yield partial
            except BaseException:
                self._drop(partial)
                raise
        if self._pool is None:
            self._finish(partial, target)
        else:
            self._pending = self._pool.submit(self._finish, partial, target)

    def save(self, tensors: dict[str, torch.Tensor], partial: Path, kind: str) -> None:
        """Write this process's share of tensors; in the background, copy it now.

        Args:
            tensors: whole or distributed (DTensor, cut along its first dimension) ones.
            partial: the folder of `checkpoint`.
            kind: first part of the file's name.
        """
        for file, share in _shares(tensors, kind, self.process).items():
            if self._pool is None:
                _save_file({name: tensor.cpu().contiguous() for name, tensor in share.items()}, partial / file)
            else:
                copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in share.items()}
                self._tensors.append((partial / file, copies))

    def check(self) -> None:
        """Raises OSError: what was written in the background could not be."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self, partial: Path, target: Path) -> None:
        try:
            with _explained(target):
                while self._tensors:
                    file, tensors = self._tensors.pop()
                    _save_file(tensors, file)
                self._meet()
                if self.process.is_main_process:
                    _commit(partial, target, self.keep)
                self._meet()
        finally:
            self._tensors.clear()
            self._drop(partial)

    def _meet(self) -> None:
        """Wait until every process is here."""
        if self._group is None:
            self.process.wait_for_everyone()
        else:
            torch.distributed.barrier(self._group)

    def _drop(self, partial: Path) -> None:
        if self.process.is_main_process:
            shutil.rmtree(partial.parent, ignore_errors=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Errors of writing say which checkpoint it was, and which one is whole."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        saved = checkpoints(target.parent)
        last = f"{saved[0]} is whole" if saved else "there is none before it"
        raise OSError(f"{target}: could not be written ({one_line(error)}); {last}") from error


def _make_partial(target: Path) -> Path:
    """A hidden folder in the run's, and in it one of the checkpoint's name; `pldr.files.sweep` knows its form."""
    hidden = Path(tempfile.mkdtemp(prefix=f".checkpoint.partial-{process_mark()}-", dir=target.parent))
    partial = hidden / target.name
    partial.mkdir()
    return partial


def _commit(partial: Path, target: Path, keep: int) -> None:
    """Move a finished checkpoint to its place; all but the newest `keep` ones go where it was, which is then removed."""
    written = [path for path in partial.rglob("*") if path.is_file()]
    write_sums(partial, written, SUMS)
    if missing := _missing_file(partial):  # somebody has removed it
        raise FileNotFoundError(missing)
    settle(partial)
    os.replace(partial, target)
    sync(target.parent)
    for old in checkpoints(target.parent)[keep:]:
        os.replace(old, partial.with_name(old.name))


def _save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: could not be written ({error})") from None


# --- tensors, whole or sharded --------------------------------------------------------------------------------------


def _shares(tensors: dict[str, torch.Tensor], kind: str, process: PartialState) -> dict[str, dict[str, torch.Tensor]]:
    """What this process writes of tensors, by file: its shards of distributed ones; whole ones, if it is the main one."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    if process.is_main_process:
        whole = {name: tensor.detach() for name, tensor in tensors.items() if _shard_place(tensor) is None}
        if whole or not tensors:
            files[f"{kind}.safetensors"] = whole
    for name, tensor in tensors.items():
        if (place := _shard_place(tensor)) is not None and place[2]:
            shards = files.setdefault(f"{kind}-{place[0] + 1}-of-{place[1]}.safetensors", {})
            shards[name] = tensor.to_local().detach()  # type: ignore[attr-defined]
    return files


def _shard_place(tensor: torch.Tensor) -> tuple[int, int, bool] | None:
    """Of a distributed tensor: index of this rank's shard, number of shards, whether this rank's copy is written."""
    if not hasattr(tensor, "device_mesh"):
        return None
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    (dimension,) = [i for i, placement in enumerate(placements) if placement.is_shard()]
    copies = [i for i in range(len(placements)) if i != dimension]
    first = all(mesh.get_local_rank(i) == 0 for i in copies)
    return mesh.get_local_rank(dimension), mesh.size(dimension), first


class SavedTensors:
    """The tensors of one kind in a checkpoint, read one at a time.

    Attributes:
        shapes: of every whole tensor, by name, from the headers alone.

    Raises:
        ValueError: files are missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        whole = folder / f"{kind}.safetensors"
        shards = sorted(
            (int(match["rank"]), int(match["ranks"]), path)
            for path in folder.glob(f"{kind}-*.safetensors")
            if (match := _SHARD.fullmatch(path.name)) and match["kind"] == kind
        )
        if shards and [shard[:2] for shard in shards] != [(rank + 1, len(shards)) for rank in range(len(shards))]:
            raise ValueError(f"{folder}: {len(shards)} of {shards[0][1]} {kind} files are there")
        files = [path for _, _, path in shards] + ([whole] if whole.is_file() else [])
        if not files:
            raise ValueError(f"{folder}: holds no {kind} tensors")
        self._places: dict[str, list[Path]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    self._places.setdefault(name, []).append(path)
                    shape = tuple(file.get_slice(name).get_shape())
                    rows = self.shapes[name][0] if self.shapes.get(name) else 0
                    self.shapes[name] = (rows + shape[0], *shape[1:]) if shape else ()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = []
        for path in self._places[name]:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Copy the weights of a checkpoint into a model, whole or distributed, which must have the same ones."""
    saved = SavedTensors(checkpoint, "model")
    for name, tensor in model.state_dict().items():
        _copy_into(tensor, saved[name])


@torch.no_grad()
def _copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor into one that is whole or distributed; of the latter, each rank takes its shard."""
    if hasattr(target, "device_mesh"):
        target.to_local().copy_(_like(target, source).to_local())  # type: ignore[attr-defined]
    else:
        target.copy_(source)


def _like(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A whole tensor, distributed as `target` is."""
    if not hasattr(target, "device_mesh"):
        return source.to(target.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # No rank sends anything: each has read the whole tensor.
    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(source.to(target.device), mesh, placements, src_data_rank=None)


def optimizer_tensors(names: dict[torch.Tensor, str], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as "parameter.step", "parameter.exp_avg" and "parameter.exp_avg_sq"."""
    return {
        f"{names[parameter]}.{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(names: dict[torch.Tensor, str], optimizer: torch.optim.Optimizer, saved: SavedTensors) -> None:
    """The inverse of `optimizer_tensors`; a parameter without saved state starts without."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = names[parameter]
            if f"{prefix}.step" not in saved:
                continue
            moments = {
                key: _like(parameter, saved[f"{prefix}.{key}"]).to(parameter.device)
                for key in ("exp_avg", "exp_avg_sq")
            }
            step = saved[f"{prefix}.step"]
            # Fused kernels keep the step beside the parameter, the others on the host.
            on_device = bool(group.get("fused") or group.get("capturable"))
            optimizer.state[parameter] = {"step": step.to(parameter.device) if on_device else step, **moments}


def merge_checkpoint(
    checkpoint: str | os.PathLike[str], destination: str | os.PathLike[str], *, overwrite: bool = False
) -> PldrForCausalLM:
    """Make a model folder of a training checkpoint, whose tensors may be cut into one file a rank.

    Args:
        checkpoint: a folder `checkpoint-STEP` of a training run; the run's tokenizer, where it has one, is kept.
        destination: folder to write.
        overwrite: replace a folder that is not empty.

    Returns:
        The model.

    Raises:
        ValueError: the checkpoint is damaged, or files are missing.
        FileExistsError, OSError: the destination can not be written.
    """
    checkpoint = Path(checkpoint)
    check_output(destination, overwrite=overwrite)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint}: no config.json; this is not a training checkpoint")
    if not any((checkpoint / name).is_file() for name in (SUMS, STATE, RECIPE)):
        raise ValueError(f"{checkpoint}: no {SUMS}; this is a model folder, not a training checkpoint")
    check_checkpoint(checkpoint)
    with no_init_weights():
        model = PldrForCausalLM(read_config(checkpoint))
    load_weights(model, checkpoint)
    with whole_folder(destination, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        for place in (checkpoint.parent / "tokenizer.json", checkpoint.parent / "tokenizer.model"):
            if place.is_file():
                load_tokenizer(place if place.suffix == ".model" else place.parent).save_pretrained(folder)
                break
    return model.eval()
