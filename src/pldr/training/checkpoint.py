"""Checkpoints of a training run: folders `checkpoint-STEP` that are there whole or not at all, without a pickle.

A checkpoint holds the model and the optimiser by parameter name, in safetensors: one file each, or, where a run is
sharded, one file each a rank (`model-2-of-4.safetensors`), every tensor cut along its first dimension. Either loads on
any number of ranks.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.initialization import no_init_weights

from pldr.checkpoints.load import check_tensors, read_config
from pldr.files import check_output, read_sums, sha256, sync, whole_folder, write_sums
from pldr.modeling_pldr import PldrForCausalLM
from pldr.tokenizer import load_tokenizer

_NAME = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"(?P<kind>\w+)-(?P<rank>\d+)-of-(?P<ranks>\d+)\.safetensors")
SUMS = "CHECKPOINT.SHA256"


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [(int(match[1]), path) for path in Path(run).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def commit_checkpoint(partial: Path, checkpoint: Path, keep: int) -> None:
    """Move a finished checkpoint to its place, and drop all but the newest `keep` ones.

    Raises:
        OSError: the disk is full, or the like; older checkpoints are then still there.
    """
    written = [path for path in partial.rglob("*") if path.is_file()]
    write_sums(partial, written, SUMS)
    for path in (*written, partial):
        sync(path)
    os.replace(partial, checkpoint)
    sync(checkpoint.parent)
    for old in checkpoints(checkpoint.parent)[keep:]:
        # Out of sight first: what is half removed must not look like a checkpoint.
        os.replace(old, old.with_name(f".{old.name}.old"))
    for hidden in checkpoint.parent.glob(".checkpoint-*.old"):  # those of a killed run too
        shutil.rmtree(hidden)


def abandon_newer(checkpoint: Path) -> None:
    """Put checkpoints newer than the one that a run goes on from out of its way, as `abandoned-checkpoint-STEP`."""
    for newer in checkpoints(checkpoint.parent):
        if step_of(newer) > step_of(checkpoint):
            target = newer.with_name(f"abandoned-{newer.name}")
            if target.exists():
                shutil.rmtree(target)
            os.replace(newer, target)


def check_checkpoint(checkpoint: Path) -> None:
    """
    Raises:
        ValueError: a file is missing or does not match its sum; the checkpoint before is named, if there is one.
    """
    fault = _fault(checkpoint)
    if fault is None:
        return
    older = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    whole = next((path for path in older if _fault(path) is None), None)
    advice = f"go on from the one before it: --resume-from {whole}" if whole else "no older checkpoint is whole"
    raise ValueError(f"{checkpoint}: damaged checkpoint ({fault}); {advice}")


def _fault(checkpoint: Path) -> str | None:
    if not (checkpoint / SUMS).is_file():
        return f"no {SUMS}"
    sums = read_sums(checkpoint, SUMS)
    if not sums:
        return f"{SUMS} is empty"
    for name, digest in sums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if sha256(checkpoint / name) != digest:
            return f"{name} does not match its sum"
    return None


# --- tensors, whole or sharded --------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, kind: str, *, rank: int, main: bool) -> None:
    """Write tensors under their names: this rank's shards of distributed ones, or, on the main process, whole ones.

    Args:
        tensors: whole or distributed (DTensor, cut along its first dimension) ones.
        folder: where to write; exists.
        kind: first part of the file's name.
        rank: of this process.
        main: whether this process writes what is not distributed.

    Raises:
        OSError: the file could not be written.
    """
    shards, ranks = {}, 1
    for name, tensor in tensors.items():
        if (place := _shard_place(tensor)) is None:
            continue
        shard, ranks, writes = place
        if writes:
            rank = shard
            shards[name] = tensor.to_local().detach().cpu().contiguous()  # type: ignore[attr-defined]
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if _shard_place(t) is None}
    try:
        if shards:
            save_file(shards, folder / f"{kind}-{rank + 1}-of-{ranks}.safetensors", metadata={"format": "pt"})
        if main and whole:
            save_file(whole, folder / f"{kind}.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder}: {kind} could not be written ({error})") from None


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
        if shards and [rank for rank, _, _ in shards] != list(range(1, shards[0][1] + 1)):
            raise ValueError(f"{folder}: {len(shards)} of {shards[0][1]} {kind} files are there")
        self._files = [path for _, _, path in shards] + ([whole] if whole.is_file() else [])
        if not self._files:
            raise ValueError(f"{folder}: holds no {kind} tensors")
        self._places: dict[str, list[Path]] = {}
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    self._places.setdefault(name, []).append(path)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Iterable[str]:
        return self._places

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
    check_checkpoint(checkpoint)
    config = read_config(checkpoint)
    saved = SavedTensors(checkpoint, "model")
    check_tensors({name: tuple(saved[name].shape) for name in saved.names()}, config, str(checkpoint))
    with no_init_weights():
        model = PldrForCausalLM(config)
    load_weights(model, checkpoint)
    with whole_folder(destination, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        for place in (checkpoint.parent / "tokenizer.json", checkpoint.parent / "tokenizer.model"):
            if place.is_file():
                load_tokenizer(place if place.suffix == ".model" else place.parent).save_pretrained(folder)
                break
    return model.eval()
