"""The paper's zero-shot benchmarks: their tasks in lm-evaluation-harness, and their data as their authors publish it.

A folder given as `data_dir` holds one folder a benchmark with the published files under their published names; the rows
read from them have the columns that the harness's task has on the hub.
"""

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr.files import read_json, read_json_lines, read_text
from pldr.tokenizer import check_text

# Task of the harness to the metric that counts: accuracy by log-likelihood per character where the task has it.
PAPER_SUITE = {
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "social_iqa": "acc",
    "winogrande": "acc",
    "truthfulqa_mc2": "acc",
}
TRUTHFULNESS = "truthfulqa_mc2"
SUITES = {"paper": PAPER_SUITE}

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a benchmark is published.

    Attributes:
        folder: in the data folder.
        splits: of the harness, to the file of its questions and, where the answers are apart, that of its labels; the
            first one is what is scored, "train" is for few-shot examples.
        row: a published question, with its label where that is apart, in the hub's columns.
        labels: what a label may be, where it is apart.
    """

    folder: str
    splits: dict[str, tuple[str, ...]]
    row: Callable[[Row, str], Row]
    labels: tuple[str, ...] = ()


def _text(fields: Row, name: str) -> str:
    """Raises ValueError: it is neither a text nor a number, which some files have for one."""
    if type(fields[name]) not in (str, int, float):
        raise ValueError(f"{name} must be a text, got {reprlib.repr(fields[name])}")
    return str(fields[name])


def _stem_and_choices(question: Row, label: str) -> Row:
    """ARC and OpenBookQA share a format; the hub spells its question differently."""
    choices = question["question"]["choices"]
    names = [_text(choice, "label") for choice in choices]
    answer = question["answerKey"]
    if answer not in names:
        raise ValueError(f"answerKey {answer!r} is none of the choices {', '.join(names)}")
    stem = _text(question["question"], "stem")
    columns = {"text": [_text(choice, "text") for choice in choices], "label": names}
    return {"question": stem, "question_stem": stem, "choices": columns, "answerKey": answer}


def _hellaswag(question: Row, label: str) -> Row:
    endings = [_text({"ending": ending}, "ending") for ending in question["endings"]]
    right = int(question["label"])
    if not 0 <= right < len(endings):
        raise ValueError(f"label {right} is none of {len(endings)} endings")
    texts = {name: _text(question, name) for name in ("ctx_a", "ctx_b", "activity_label")}
    return texts | {"endings": endings, "label": str(right)}


def _piqa(question: Row, label: str) -> Row:
    return {name: _text(question, name) for name in ("goal", "sol1", "sol2")} | {"label": int(label)}


def _social_iqa(question: Row, label: str) -> Row:
    names = ("context", "question", "answerA", "answerB", "answerC")
    return {name: _text(question, name) for name in names} | {"label": label}


def _winogrande(question: Row, label: str) -> Row:
    sentence, answer = _text(question, "sentence"), _text(question, "answer")
    if "_" not in sentence:
        raise ValueError("sentence has no _ to fill in")
    if answer not in ("1", "2"):
        raise ValueError(f"answer must be 1 or 2, got {answer!r}")
    return {name: _text(question, name) for name in ("option1", "option2")} | {"sentence": sentence, "answer": answer}


def _truthfulqa(question: Row, label: str) -> Row:
    row: Row = {"question": _text(question, "question")}
    for name in ("mc1_targets", "mc2_targets"):
        targets = question[name]
        if 1 not in targets.values():
            raise ValueError(f"{name} has no true answer")
        if not {*targets.values()} <= {0, 1}:
            raise ValueError(f"{name} has an answer that is neither true (1) nor false (0)")
        true_first = sorted(targets, key=lambda answer: -targets[answer])  # where the harness looks for it
        row[name] = {"choices": true_first, "labels": [int(targets[answer]) for answer in true_first]}
    return row


def _arc(name: str) -> Layout:
    return Layout(name, {"test": (f"{name}-Test.jsonl",), "train": (f"{name}-Train.jsonl",)}, _stem_and_choices)


LAYOUTS = {
    "arc_easy": _arc("ARC-Easy"),
    "arc_challenge": _arc("ARC-Challenge"),
    "hellaswag": Layout(
        "hellaswag", {"validation": ("hellaswag_val.jsonl",), "train": ("hellaswag_train.jsonl",)}, _hellaswag
    ),
    "openbookqa": Layout("openbookqa", {"test": ("test.jsonl",), "train": ("train.jsonl",)}, _stem_and_choices),
    "piqa": Layout(
        "piqa",
        {"validation": ("valid.jsonl", "valid-labels.lst"), "train": ("train.jsonl", "train-labels.lst")},
        _piqa,
        ("0", "1"),
    ),
    "social_iqa": Layout(
        "siqa",
        {"validation": ("dev.jsonl", "dev-labels.lst"), "train": ("train.jsonl", "train-labels.lst")},
        _social_iqa,
        ("1", "2", "3"),
    ),
    "winogrande": Layout("winogrande", {"validation": ("dev.jsonl",), "train": ("train_xl.jsonl",)}, _winogrande),
    "truthfulqa_mc1": Layout("truthfulqa", {"validation": ("mc_task.json",)}, _truthfulqa),
    "truthfulqa_mc2": Layout("truthfulqa", {"validation": ("mc_task.json",)}, _truthfulqa),
}


def read_benchmark(task: str, data_dir: Path, *, few_shot: bool = False) -> dict[str, list[Row]]:
    """The rows of each split of a benchmark, with the columns that they have on the hub.

    Args:
        task: of the harness, one of `LAYOUTS`.
        data_dir: folder that holds the benchmark's own.
        few_shot: also read the training split, which examples are drawn from, where the benchmark has one.

    Raises:
        FileNotFoundError: a file is missing; the message says which is expected where.
        ValueError: no layout is known for the task; a file is empty, holds a line (named) that is no JSON object or
            lacks a field, or has another number of labels than of questions.
    """
    layout = LAYOUTS.get(task)
    if layout is None:
        raise ValueError(
            f"data_dir: no local layout is known for {task}, only for {', '.join(LAYOUTS)}; without it the data come from "
            "the hub"
        )
    found = {}
    for split, names in layout.splits.items():
        if split == "train" and not few_shot:
            continue
        files = [data_dir / layout.folder / name for name in names]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{task}: no {split} data; expected {' and '.join(missing)}, as the benchmark's authors publish it"
            )
        found[split] = list(_rows(layout, *files))
        if not found[split]:
            raise ValueError(f"{files[0]}: is empty; {task} has no question to ask")
    return found


def _rows(layout: Layout, questions: Path, labels: Path | None = None) -> Iterator[Row]:
    found = list(_json_objects(questions))
    answers = [""] * len(found)
    if labels is not None:
        answers = read_text(labels).split()
        if len(answers) != len(found):
            raise ValueError(f"{labels}: {len(answers)} labels for {len(found)} questions in {questions}")
        for number, answer in enumerate(answers, 1):
            if answer not in layout.labels:
                raise ValueError(
                    f"{labels}, line {number}: label must be one of {', '.join(layout.labels)}, got {answer!r}"
                )
    for (where, question), answer in zip(found, answers, strict=True):
        try:
            row = layout.row(question, answer)
            check_text(json.dumps(row, ensure_ascii=False), "text")
        except KeyError as error:
            raise ValueError(f"{where}: has no field {error}") from None
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        yield row


def _json_objects(file: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON-lines file, or of one JSON array, and where each stands."""
    if file.suffix == ".json":
        items = read_json(file)
        if not isinstance(items, list):
            raise ValueError(f"{file}: expected an array of questions")
        numbered = [(f"{file}, question {number}", item) for number, item in enumerate(items, 1)]
    else:
        numbered = list(read_json_lines(file))
    for where, item in numbered:
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected a JSON object")
        yield where, item


def suite_averages(scores: dict[str, float]) -> dict[str, float]:
    """The means over the suite's tasks: over all of them, and over those without TruthfulQA.

    Args:
        scores: of each task of the paper's suite.
    """
    rest = [score for task, score in scores.items() if task != TRUTHFULNESS]
    return {"average": sum(scores.values()) / len(scores), "average without TruthfulQA": sum(rest) / len(rest)}


def suite_report(report: dict[str, Any], suite: str) -> dict[str, Any]:
    """Of a suite: the metric that counts of each task, and the averages, by mode."""
    found: dict[str, Any] = {"metrics": SUITES[suite], "scores": {}, "averages": {}}
    for mode in report["seconds"]:
        scores = {task: report["tasks"][task]["scores"][mode][metric] for task, metric in SUITES[suite].items()}
        found["scores"][mode] = scores
        found["averages"][mode] = suite_averages(scores)
    return found
