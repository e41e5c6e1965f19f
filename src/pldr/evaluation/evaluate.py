"""What a model scores: benchmarks and perplexity with G_LM frozen, cached or learned, and what the mode changes."""

import copy
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.load import load_with_tokenizer
from pldr.conditions import versions
from pldr.data.sources import names_of
from pldr.evaluation.journal import open_journal
from pldr.evaluation.modes import MODES, SEQUENTIAL, check_mode, keeps_training, name_of
from pldr.evaluation.perplexity import check_window, evaluate_texts
from pldr.evaluation.processes import join
from pldr.evaluation.published import SUITES, suite_report
from pldr.evaluation.scoring import Scorer, make_scorers, mode_disagreement, read_calibration
from pldr.files import json_safe, read_text, require, to_json
from pldr.modeling_pldr import PldrForCausalLM
from pldr.provenance import weights_digest
from pldr.tables import Printable, evaluation_view


@dataclass(frozen=True)
class Evaluation(Printable):
    """What `evaluate` found.

    Attributes:
        model: its name.
        operator: what the model has, "learned" or "constant".
        modes: that were run (`pldr.evaluation.modes`); the others are compared with the first.
        device, dtype: what it ran on, and in.
        calibration: what a learned G_LM was frozen from.
        tasks: by name "questions", "num_fewshot", "scores" (by mode: each metric and its standard error) and, against the
            first mode, "differ" (by mode: questions with another answer), "share_bound" (by mode: the exact 95% upper bound
            on their share among all such questions) and "largest" (by mode: difference of one log-likelihood, nats).
        groups: of tasks, by name "scores" alone.
        seconds: of the tasks, by mode; of this run alone.
        texts: by name and mode the fields of `pldr.evaluation.perplexity.Perplexity`.
        suite: "metrics", "scores" and "averages", by mode, where one was asked for.
        disagreement: how much the mode moves the log-likelihood of 32 tokens at most, nats (`mode_disagreement`).
        truncated: contexts that were longer than the model's and lost their beginning.
        resumed: answers that an earlier run had left in the output.
        threshold: nats by which modes may differ without a warning.
    """

    model: str
    operator: str
    modes: list[str]
    device: str
    dtype: str
    calibration: str | list[str] | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] | None = None
    seconds: dict[str, float] | None = None
    texts: dict[str, dict[str, dict[str, Any]]] | None = None
    suite: dict[str, Any] | None = None
    disagreement: float = 0.0
    truncated: int = 0
    resumed: int = 0
    threshold: float = 0.01

    @property
    def warnings(self) -> list[str]:
        """What to know before the scores are believed."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        if self.disagreement > self.threshold:
            yield (
                f"G_LM depends on the text: where it comes from moves a log-likelihood of 32 tokens by "
                f"{self.disagreement:.2g} nats, more than {self.threshold:g}; a learned G_LM sees the tokens it scores, so "
                "that only frozen scores compare with other models'; see pldr certify"
            )
        largest = max((value for task in self.tasks.values() for value in task["largest"].values()), default=0.0)
        if largest > self.threshold:
            rounding = "" if self.dtype == "float32" else f"; in {self.dtype} much of that is rounding"
            yield (
                f"the modes' log-likelihoods of an answer differ by up to {largest:.2g} nats, more than "
                f"{self.threshold:g}{rounding}"
            )
        if self.truncated:
            yield f"{self.truncated} contexts were longer than the model's and lost their beginning"
        for name, found in (self.texts or {}).items():
            if not all(value["is_lossless"] for value in found.values()):
                yield (
                    f"{name}: the tokenizer drops part of the text (ends of lines, repeated spaces), which is counted in "
                    "bits per byte and word perplexity all the same"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts, null for what is infinite; without what was not asked for."""
        found: dict[str, Any] = json_safe(self._asked_for())
        return found

    def _asked_for(self) -> dict[str, Any]:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "threshold"}
        wanted = {name: value for name, value in fields.items() if value is not None or name == "calibration"}
        return wanted | {"warnings": self.warnings}

    def __rich__(self) -> RenderableType:
        return evaluation_view(self._asked_for())


@keeps_training
def evaluate(
    model: str | os.PathLike[str] | PldrForCausalLM,
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    tasks: str | Sequence[str] = (),
    suite: str | None = None,
    mode: str = "frozen",
    compare: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    allow_code: bool = False,
    batch_size: int | str = "auto",
    window: int | None = None,
    stride: int | None = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    text_column: str = "text",
    threshold: float = 0.01,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerFast | None = None,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    output: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Benchmarks and perplexity of a model, as `pldr eval` measures them.

    The processes of torchrun share the work, and each returns all of it.

    Args:
        model: a folder in any layout, a ``.pth`` file, or a loaded model.
        files: text files, whose perplexity is measured.
        tasks: of lm-evaluation-harness: names, groups, patterns, YAML files; a text may hold several, comma-separated.
        suite: "paper": the eight benchmarks of the paper, and their average.
        mode: "frozen", "cached", "learned" or "sequential" (see `pldr.evaluation.scoring`).
        compare: run the first three, and compare every answer; all four where mode is "sequential".
        data_dir: folder with the benchmarks' published files, in place of the hub.
        limit: questions of each task; below 1, their share.
        num_fewshot: examples before each question.
        allow_code: take YAML files as tasks, which can run code of their own.
        batch_size: sequences of a batch, or "auto".
        window, stride: of the perplexity, tokens; the context and half the window by default.
        calibration: text that a learned G_LM is frozen from; by default what ships with pldr.
        text_column: of that text, if it has columns.
        threshold: nats by which modes may differ without a warning.
        tokenizer, rope, g_lm, device: see `pldr.checkpoints.load.load_with_tokenizer`.
        dtype: "float32", "bfloat16", or "auto": as the model is stored.
        output: folder that keeps every answer and, at the end, ``evaluation.json``; where a run was stopped, the same
            call goes on.

    Raises:
        ValueError, OSError: an option outside its range or that does not go with this model, an unknown task, data that
            can not be had; an output that holds something else, or an evaluation of another model or with other options:
            before anything is measured.
        FloatingPointError: the model's logits are not finite.
        ModuleNotFoundError: tasks need the extra "eval".
    """
    names = _task_names(tasks, suite)
    texts = {name: read_text(name) for name in names_of(files)}
    if not names and not texts:
        raise ValueError("tasks: name some, or a suite, or text files for their perplexity")
    # What would be ignored is refused.
    of_tasks = {"limit": limit, "num_fewshot": num_fewshot, "data_dir": data_dir, "allow_code": allow_code or None}
    of_texts = {"window": window, "stride": stride}
    for given, options, what in ((names, of_tasks, "tasks or a suite"), (texts, of_texts, "text files")):
        if unused := [name for name, value in options.items() if value is not None and not given]:
            raise ValueError(f"{', '.join(unused)}: only {what} can use it; name some, or leave it out")
    if compare and mode not in ("frozen", SEQUENTIAL):
        raise ValueError("mode, compare: choose one; compare runs every mode (sequential where it is named, too)")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot: must be 0 or more, got {num_fewshot}")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"data_dir: {data_dir} is not a folder")
    if names:
        require("eval", "lm_eval", "scipy")
        from pldr.evaluation.harness import check_limit, load_tasks, run_tasks

        check_limit(limit)
    processes = join()  # before the model chooses a GPU
    loaded, text_tokenizer = load_with_tokenizer(model, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
    context = loaded.config.max_position_embeddings
    check_window(context, window, stride)
    wanted = dict.fromkeys((*MODES, mode) if compare else (mode,))
    for asked in wanted:
        check_mode(loaded, asked)
    is_learned = loaded.config.operator == "learned"
    if calibration and not is_learned:
        raise ValueError("calibration: this model's operator is constant already")
    if names:
        found = load_tasks(names, data_dir=data_dir, num_fewshot=num_fewshot, allow_code=allow_code)

    passages = None
    if is_learned:
        passages = read_calibration(text_tokenizer, context, names_of(calibration or ()), text_column)
    settings = {} if output is None else _fingerprints(loaded, passages) | {
        "tasks": names, "files": list(texts), "suite": suite, "modes": list(wanted), "limit": limit, "num_fewshot": num_fewshot,
        "batch_size": str(batch_size), "window": window, "stride": stride, "dtype": dtype, "device": loaded.device.type,
    }  # fmt: skip
    with open_journal(output, settings, processes) as journal:
        scorers = make_scorers(loaded, passages, batch_size=batch_size, processes=processes, journal=journal)
        if SEQUENTIAL in wanted:
            scorers[SEQUENTIAL] = Scorer(
                loaded, SEQUENTIAL, batch_size=batch_size, processes=processes, journal=journal
            )
        chosen = {asked: scorers[asked] for asked in wanted}
        disagreement = 0.0 if passages is None else _disagreement(loaded, scorers, passages)
        perplexities = evaluate_texts(chosen, text_tokenizer, texts, length=window, stride=stride) if texts else None
        results = run_tasks(chosen, text_tokenizer, found, limit=limit) if names else {}
        evaluation = Evaluation(
            model=name_of(model), operator=loaded.config.operator, modes=list(chosen), device=str(loaded.device), dtype=dtype,
            calibration=(names_of(calibration) if calibration else "ships with pldr") if is_learned else None,
            suite=suite_report(results, suite) if suite is not None else None, texts=perplexities, disagreement=disagreement,
            truncated=max(scorer.truncated for scorer in chosen.values()), resumed=journal.recalled, threshold=threshold,
            **results,
        )  # fmt: skip
        journal.finish(evaluation.to_json())
    return evaluation


def _fingerprints(model: PldrForCausalLM, passages: torch.Tensor | None) -> dict[str, Any]:
    """What tells a model, what its operator is frozen from, and what computes, from others."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "weights": weights_digest(model.state_dict()),
        "configuration": hashlib.sha256(to_json(config).encode()).hexdigest(),
        "calibration": None if passages is None else weights_digest({"passages": passages}),
        "versions": {name: version for name, version in versions().items() if name != "python"},
    }


def _task_names(tasks: str | Sequence[str], suite: str | None) -> list[str]:
    """Raises ValueError: there is no such suite."""
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite: must be one of {', '.join(SUITES)}, got {suite!r}")
    parts = [tasks] if isinstance(tasks, str) else tasks
    names = [name.strip() for part in parts for name in part.split(",") if name.strip()]
    return names + [name for name in SUITES.get(suite or "", ()) if name not in names]


def _disagreement(model: PldrForCausalLM, scorers: dict[str, Scorer], passages: torch.Tensor) -> float:
    """`mode_disagreement` in float32, where what differs is the operator and not the rounding."""
    if model.dtype != torch.float32:
        scorers = make_scorers(copy.deepcopy(model).float(), passages)
    return mode_disagreement(scorers, passages)
