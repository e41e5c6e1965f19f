"""Answers of an evaluation in a folder, as they come, so that one that was stopped goes on where it was."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pldr.evaluation.processes import Processes
from pldr.files import check_output, check_shape, locked, read_json, to_json, write_json

_SETTINGS, _RESULT = "settings.json", "evaluation.json"
_LINE = {"call": str, "answers": dict}


@dataclass
class Journal:
    """What was answered: a line a batch. Without a file it keeps nothing.

    A call is many questions that are asked at once, in batches that depend on all of them: so a batch is known whole or asked
    again, and the scores of an evaluation that was stopped are, to the last bit, those of one that was not.

    Attributes:
        file: to write to.
        answers: of earlier runs, by call and number of the question in it.
        recalled: how many of those were used.
    """

    file: Path | None = None
    answers: dict[str, dict[int, Any]] = field(default_factory=dict)
    recalled: int = 0

    def call(self, mode: str, questions: Any) -> str:
        """A name for these questions in this mode; none where nothing is kept, for there may be many."""
        return "" if self.file is None else f"{mode} {hashlib.sha256(json.dumps(questions).encode()).hexdigest()}"

    def recall(self, call: str, shape: Any) -> dict[int, Any]:
        """Answers by number of the question, as far as they are known.

        Raises ValueError: one is not of the shape (see `pldr.files.check_shape`).
        """
        found = self.answers.get(call, {})
        for index, answer in found.items():
            check_shape(answer, shape, f"{self.file}: question {index} of {call}")
        self.recalled += len(found)
        return dict(found)

    def add(self, call: str, answers: dict[int, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(to_json({"call": call, "answers": answers}) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Write it beside the answers; of several processes, the first does."""
        if self.file is not None and self.file.name == _file(0):
            write_json(self.file.with_name(_RESULT), result, indent=1)


def _file(rank: int | str) -> str:
    return f"answers-{rank}.jsonl"


@contextlib.contextmanager
def open_journal(
    output: str | os.PathLike[str] | None, settings: dict[str, Any], processes: Processes
) -> Iterator[Journal]:
    """The journal in an evaluation's folder, which is this evaluation's alone meanwhile; without a folder, one that keeps nothing.

    Of the processes that share it each writes a file of its own, and all read all.

    Args:
        output: new or empty, or of an evaluation with the same settings.
        settings: what changes an answer, as JSON has it.

    Raises:
        FileExistsError: the folder holds something else, or another process is in it.
        ValueError: an evaluation with other settings is in it, or a line that none wrote.
    """
    if output is None:
        yield Journal()
        return
    folder = Path(output)
    with locked(folder.resolve()) if processes.rank == 0 else contextlib.nullcontext():
        if processes.rank == 0:
            _claim(folder, settings)
        processes.together({})  # the others wait till then
        answers: dict[str, dict[int, Any]] = {}
        for file in sorted(folder.glob(_file("*"))):
            for call, found in _read(file):
                answers.setdefault(call, {}).update(found)
        mine = folder / _file(processes.rank)
        if mine.is_file() and not mine.read_bytes().endswith(b"\n"):
            with mine.open("ab") as stream:
                stream.write(b"\n")
        yield Journal(mine, answers)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or find them as they were."""
    there = (folder / _SETTINGS).is_file()
    check_output(folder, overwrite=there)
    if not there:
        write_json(folder / _SETTINGS, settings, indent=1)
    before = read_json(folder / _SETTINGS, dict)
    for name, now in settings.items():
        if before.get(name) != now:
            raise ValueError(
                f"output: {folder} holds another evaluation ({name} {before.get(name)}, here {now}); ask for the same, or name "
                "another folder"
            )


def _read(file: Path) -> Iterator[tuple[str, dict[int, Any]]]:
    for number, text in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            line = json.loads(text)
        except ValueError:  # cut off, where the process was killed while it wrote; so these are asked again
            continue
        try:
            check_shape(line, _LINE)
            yield line["call"], {int(index): answer for index, answer in line["answers"].items()}
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not a line of an evaluation ({error})") from None
