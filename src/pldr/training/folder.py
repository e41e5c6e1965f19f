"""A run's folder: whose it is, what killed runs left of it, where a run goes on in it, and its log."""

import contextlib
import dataclasses
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pldr.files import (
    CHECKSUMS,
    check_output,
    locked,
    parse_json,
    read_json,
    read_text,
    set_aside,
    sweep,
    to_json,
    write_json,
    write_text,
)
from pldr.recipe import Recipe
from pldr.training.checkpoint import RECIPE, STATE, abandon_newer, check_checkpoint, checkpoints, step_of
from pldr.training.operators import operators
from pldr.training.processes import on_main

_LOG = "log.jsonl"
# What may change when a run goes on: everything that does not change its losses.
_FREE = ("output", "log_steps", "eval_steps", "save_steps", "keep_checkpoints", "async_save", "report_to", "distributed",
         "optimization.compile", "optimization.cuda_graph", "optimization.gradient_checkpointing", "optimization.skip_nonfinite",
         "data.cache")  # fmt: skip


@contextlib.contextmanager
def run_folder(
    recipe: Recipe, process: PartialState, *, overwrite: bool, resume: bool | str | os.PathLike[str]
) -> Iterator[tuple[Path, Path | None]]:
    """A recipe's output folder, which is this run's alone, and the checkpoint to go on from, if it is to.

    A folder that is overwritten comes back if the run leaves nothing to go on from. The main process sees to all that.

    Raises:
        ValueError, OSError: see `pldr.train`; or the folder is gone when something is to be written into it.
    """
    output = Path(recipe.output)
    with contextlib.ExitStack() as stack:
        start = on_main(process, lambda: _open(stack, recipe, process.num_processes, overwrite, resume))
        try:
            yield output, start
        except OSError as error:
            if output.is_dir():
                raise
            raise FileNotFoundError(f"{output}: was removed or renamed during the run, which ends here") from error


def _open(
    stack: contextlib.ExitStack, recipe: Recipe, processes: int, overwrite: bool, resume: bool | str | os.PathLike[str]
) -> Path | None:
    output = Path(recipe.output)
    if resume in (False, "auto"):
        check_output(output, overwrite=True)  # before anything is made for it
    real = output.resolve()  # a link to a folder stays one
    stack.enter_context(locked(real))
    _tidy(real)
    start = None if resume is False else _checkpoint_to_resume(recipe, resume, processes)
    if start is None:
        check_output(output, overwrite=overwrite or (resume == "auto" and _is_broken_off(output)))
        stack.enter_context(_new_folder(real))
    else:
        _check_places(output)
        _cut_log(output / _LOG, step_of(start), read_json(start / STATE)["log_lines"])
        for step, file in operators(output).items():
            if step > step_of(start):
                file.unlink()
        abandon_newer(start)
    write_json(output / RECIPE, described(recipe, processes))
    return start


def _tidy(output: Path) -> None:
    """Remove what killed runs left half written. A run that was to be overwritten comes back, as after any failure."""
    aside = any(output.parent.glob(f".{glob.escape(output.name)}.old-*"))
    if aside and output.is_dir() and (_is_broken_off(output) or not any(output.glob("[!.]*"))):
        shutil.rmtree(output)
    sweep(output)
    if output.is_dir():
        for name in ("checkpoint", "model"):
            sweep(output / name)


def _is_broken_off(output: Path) -> bool:
    """Whether a folder holds a run that has left nothing to go on from."""
    return (output / RECIPE).is_file() and not _is_worth_keeping(output)


def _is_worth_keeping(output: Path) -> bool:
    return bool(checkpoints(output)) or (output / "config.json").is_file()


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[None]:
    """An empty folder. What was there before is put aside, and comes back after a failure that left nothing."""
    with set_aside(output) if output.is_dir() else contextlib.nullcontext():
        try:
            output.mkdir()
            yield
        except BaseException:
            if not _is_worth_keeping(output):
                shutil.rmtree(output, ignore_errors=True)
            raise


# --- going on -------------------------------------------------------------------------------------------------------


def described(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What a run is told by, in its folder and in each of its checkpoints."""
    return dataclasses.asdict(recipe) | {"processes": processes, "row_length": recipe.data.row_length}


def _checkpoint_to_resume(recipe: Recipe, resume: bool | str | os.PathLike[str], processes: int) -> Path | None:
    """
    Returns:
        None for "auto", where there is no checkpoint.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or the run was another one.
    """
    output = Path(recipe.output)
    found = checkpoints(output)
    if resume == "auto" and not found:
        return None
    if not isinstance(resume, bool) and resume != "auto":
        found = [path for path in found if path.resolve() == Path(resume).resolve()]
        if not found:
            raise ValueError(f"{resume}: is not a checkpoint in the output folder {output}")
    if not found:
        raise ValueError(f"{output}: holds no checkpoint to go on from; leave out --resume to begin anew")
    start = found[0]
    check_checkpoint(start)
    earlier, now = read_json(start / RECIPE), described(recipe, processes)
    before = earlier["processes"]
    if recipe.data.streaming and before != processes:
        raise ValueError(f"data.streaming: {start} is of {before} processes, which share the stream; use as many")
    # Another number of processes may share the same step in another way.
    for fields in (earlier, now):
        o = fields["optimization"]
        fields["sequences per step"] = o.pop("batch_size") * o.pop("accumulation") * fields.pop("processes")
    if "row_length" not in earlier:
        raise ValueError(
            f"{start}: is of an earlier version, whose rows of data held no token beyond what the model reads; begin anew, or "
            "make a model of it with pldr merge"
        )
    for name, old, new in _differences(earlier, now):
        raise ValueError(f"recipe: {name} was {old!r} for {start} and is {new!r} now; go on with the recipe as it was")
    return start


def _check_places(output: Path) -> None:
    """Raises OSError: something else is where a run writes a file."""
    for name in (_LOG, RECIPE, CHECKSUMS, "config.json", "generation_config.json", "model.safetensors",
                 "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):  # fmt: skip
        place = output / name
        if os.path.lexists(place) and not place.is_file():
            raise OSError(f"{place}: is no file, but where the run writes one; move it away")


def _differences(old: object, new: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Place, old and new value of every field that changes the losses of a run."""
    if name in _FREE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        # A key that an earlier version did not know had its default; the model's own fields are only what was written.
        keys = old.keys() | new.keys() if name == "model.config" else old.keys() & new.keys()
        for key in sorted(keys):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


# --- the log --------------------------------------------------------------------------------------------------------


def add_to_log(folder: Path, line: dict[str, Any]) -> None:
    """Raises OSError: the disk is full, or the folder is gone."""
    with (folder / _LOG).open("a", encoding="utf-8") as stream:
        stream.write(to_json(line) + "\n")


def log_lines(folder: Path) -> int:
    """How many lines the log of a run has."""
    file = folder / _LOG
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _cut_log(file: Path, step: int, lines: int) -> None:
    """Forget what was logged after a checkpoint was written, also of its own step: it will be done, and logged, again.

    Raises ValueError: one of the `lines` that the log had then is none of a log.
    """
    if not file.is_file():
        return
    kept = []
    for number, line in enumerate(read_text(file).splitlines()[:lines], 1):
        try:
            logged = parse_json(line, file, {"step": int})["step"] <= step
        except ValueError:
            raise ValueError(f"{file}: line {number} is not an object with a step; remove it") from None
        if logged:
            kept.append(line + "\n")
    write_text(file, "".join(kept))
