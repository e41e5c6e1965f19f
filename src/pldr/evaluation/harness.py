"""Zero-shot evaluation on lm-evaluation-harness: PLDR-LLMs as a model of the harness, and comparison of operator modes.

What the modes mean is in `pldr.evaluation.modes`; the harness's own command is `pldr.evaluation.lm_eval`.
"""

import contextlib
import difflib
import functools
import json
import logging
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.api import task as harness_task
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.load import load_with_tokenizer
from pldr.engine import Engine, Options
from pldr.evaluation.modes import SEQUENTIAL, cache_settings
from pldr.evaluation.perplexity import windows
from pldr.evaluation.published import LAYOUTS, read_benchmark
from pldr.evaluation.scoring import Scorer, progress, read_calibration
from pldr.files import one_line
from pldr.tokenizer import encode

# The harness's settings for the parts of a data set, and their names in `pldr.evaluation.published`.
_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
# What the harness seeds the generators with, for few-shot examples and for sampling.
_SEED = 1234
_MOST_NEW_TOKENS = 256  # of a task that does not say, or half the context

_log = logging.getLogger("lm_eval.pldr")


class PldrLM(TemplateLM):
    """A PLDR-LLM as a model of lm-evaluation-harness.

    Args:
        pretrained: folder in any layout, or `.pth` file; or a scorer, to which a `tokenizer` belongs, and no other argument.
        mode: "frozen" (default), "cached", "learned" or "sequential"; a constant operator is always "frozen".
        calibration: text file or pattern that a learned operator is frozen from; by default what ships with pldr.
        tokenizer: folder or SentencePiece file, if not in the model folder, or a tokenizer.
        batch_size: sequences of a batch; "auto" fills batches by their number of tokens.
        max_batch_size: taken for the harness's sake; "auto" has no need of it.
        device: a GPU if there is one, else the CPU, which also stands in for the "cuda:0" that the harness asks for unless
            told otherwise.
        dtype: "float32" (default), "bfloat16" or "auto".
        rope, g_lm: see `pldr.load_model`.

    Raises:
        ValueError: an unknown mode, a batch size that is no number, or a tokenizer of another vocabulary.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path | Scorer,
        mode: str = "frozen",
        calibration: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerFast | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        rope: str | None = None,
        g_lm: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, Scorer):
            assert isinstance(tokenizer, PreTrainedTokenizerFast)
            self.scorer, self.tokenizer = pretrained, tokenizer
        else:
            if not device or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model, self.tokenizer = load_with_tokenizer(
                pretrained, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm
            )
            passages = None
            if model.config.operator == "learned" and mode == "frozen":
                files = [calibration] if calibration else None
                passages = read_calibration(self.tokenizer, model.config.max_position_embeddings, files)
            size = str(batch_size).split(":")[0]  # the harness's auto:N says how often to look for a new one
            self.scorer = Scorer(model, mode, calibration=passages, batch_size=size)
            if mode == "learned":
                _log.warning(
                    "G_LM sees the very tokens that are scored: compare with other models' scores by mode=frozen"
                )
        self._device = self.scorer.model.device

    @property
    def eot_token_id(self) -> int:
        """[END]; it also stands before a text without context, as it stands between the documents of the training."""
        return self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's record of a run."""
        model = self.scorer.model
        return {
            "mode": self.scorer.mode, "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
        }  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Without special tokens, as in training."""
        return encode(self.tokenizer, string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation):
                raise ValueError(f"eval: neither a context nor a continuation with tokens ({continuation!r})")
        return super().loglikelihood(requests, disable_tqdm=True)  # of its bar for the tokenizer, which takes no time

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for texts, _, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"eval: the continuation {texts[1]!r} has no token of its own; its task can not be scored"
                )
        with progress(f"log-likelihoods, {self.scorer.mode}", len(requests)) as done:
            scores = self.scorer.score([(context, continuation) for _, context, continuation in requests], done=done)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's context that do not overlap."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            found = list(windows(self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, self.max_length))
            pairs += found
            owners += [owner] * len(found)
        with progress(f"log-likelihoods, {self.scorer.mode}", len(pairs), disable=disable_tqdm) as done:
            scores = self.scorer.score(pairs, done=done)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string; batches of one length, so that no prompt is padded."""
        groups: dict[tuple[str, int], list[tuple[int, list[int]]]] = defaultdict(list)
        for index, request in enumerate(requests):
            context, given = request.args
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, min(_MOST_NEW_TOKENS, self.max_length // 2)))
            settings.pop("max_length", None)  # of prompt and text together; max_gen_toks says it for the text
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"eval: this task generates up to {settings['max_gen_toks']} tokens, the model's context is "
                    f"{self.max_length}; lower max_gen_toks"
                )
            ids = self.tok_encode(context)[-room:] or [self.eot_token_id]
            groups[json.dumps(settings, sort_keys=True), len(ids)].append((index, ids))
        journal = self.scorer.journal
        call = journal.call(self.scorer.mode, [[*group, members] for group, members in groups.items()])
        texts: dict[int, str] = journal.recall(call, str)
        drawn = {
            index
            for (settings, _), members in groups.items()
            if json.loads(settings)["do_sample"]
            for index, _ in members
        }
        if not texts.keys() >= drawn:  # what is drawn depends on what was drawn before
            texts = {index: text for index, text in texts.items() if index not in drawn}
        with progress(f"texts, {self.scorer.mode}", len(requests), disable=disable_tqdm) as done:
            done(len(texts))
            for (settings_text, length), members in groups.items():
                settings = json.loads(settings_text)
                batches = self.scorer.batches(members, length + settings["max_gen_toks"])
                # And so every process draws all of it.
                for batch in batches if settings["do_sample"] else self.scorer.processes.share(batches):
                    if texts.keys() >= {index for index, _ in batch}:
                        continue
                    found = self._generate([ids for _, ids in batch], dict(settings))
                    answers = {index: text for (index, _), text in zip(batch, found, strict=True)}
                    journal.add(call, answers)
                    texts |= answers
                    done(len(batch))
        texts = self.scorer.processes.together(texts)
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(self.scorer.model, self.tokenizer)

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """Of prompts of one length, with the harness's settings, normalised."""
        until = settings.pop("until")
        if not settings["do_sample"]:
            settings = {
                name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")
            }
        # G_LM learned from all tokens so far is no cache's; and what else a task may set is transformers'.
        if self.scorer.mode not in ("learned", SEQUENTIAL) and settings.keys() <= _ENGINE_SETTINGS:
            sampled = settings.pop("do_sample")
            new = settings.pop("max_gen_toks")
            if sampled:
                settings = {"temperature": 1.0, **settings}
            options = Options(max_new_tokens=new, stop=[text for text in until if text], **settings)
            return [
                postprocess_generated_text(result.text, until, None)
                for result in self._engine.generate(prompts, options)
            ]
        ids = torch.tensor(prompts, device=self.device)
        found = self.scorer.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.pop("max_gen_toks"),
            **cache_settings(self.scorer.mode), stop_strings=until or None, tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.eot_token_id, **settings,
        )  # fmt: skip
        texts = []
        for row in found.tolist():
            before, whole = (
                self.tokenizer.decode(part, skip_special_tokens=True) for part in (row[: ids.shape[1]], row)
            )
            texts.append(postprocess_generated_text(whole[len(before) :], until, None))
        return texts


# Of a task's generation_kwargs, as the harness normalises them.
_ENGINE_SETTINGS = {"max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


# --- tasks ----------------------------------------------------------------------------------------------------------


@functools.cache
def _task_manager() -> TaskManager:
    """The harness's index of its tasks; it takes seconds to make."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """The harness's tasks, with their data.

    Args:
        names: of tasks, groups or tags of the harness, patterns of such (mmlu_*), or YAML files.
        data_dir: folder with the benchmarks' published files (`pldr.evaluation.published`); by default data sets come from the hub.
        num_fewshot: examples before each question; what the task says by default.
        allow_code: take YAML files, which can run code: the harness executes what they name with !function.

    Raises:
        ValueError: a YAML file without `allow_code`; an unknown name (the message suggests the nearest), or data that can not be had or read.
        FileNotFoundError: a file of `data_dir` is missing.
    """
    for name in names:
        if Path(name).is_file() and not allow_code:
            raise ValueError(
                f"tasks: {name}: a task file can run code of its own (!function, templates); read it, and set allow_code if "
                "you trust it"
            )
    found = [name for pattern in names for name in _matching(pattern)]
    specs = {name: name if data_dir is None else _local_task(name, Path(data_dir), num_fewshot or 0) for name in found}
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, spec in specs.items():
        try:
            with _harness():
                part: dict[str, Any] = dict(_task_manager().load([spec]))
        except Exception as error:  # whatever the hub and its libraries raise, the user needs one line
            reason = one_line(error) if str(error) else "no question to ask"
            raise ValueError(
                f"eval: {name}: could not be loaded ({type(error).__name__}: {reason}){_hint(name)}"
            ) from error
        for kind, items in loaded.items():
            items |= part.get(kind, {}) if spec == name or kind == "tasks" else {}  # the group of a local task is none
    for name, task in loaded["tasks"].items():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        if not len(task.eval_docs):
            raise ValueError(f"eval: {name} has no question to ask")
    return loaded


def _matching(pattern: str) -> list[str]:
    """The harness's names that a pattern stands for; a YAML file stands for itself."""
    known = _task_manager().all_tasks
    found = [pattern] if Path(pattern).is_file() else _task_manager().match_tasks([pattern])
    if not found:
        near = difflib.get_close_matches(pattern, known, n=3)
        raise ValueError(f"eval: no task {pattern!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return found


def _local_task(name: str, data_dir: Path, num_fewshot: int) -> dict[str, Any]:
    """What makes the harness take a task's data from published files.

    Only as a member of a group does it take a task of its own with another source of data.
    """
    splits = read_benchmark(name, data_dir, few_shot=num_fewshot > 0)
    if "train" in splits and len(splits["train"]) <= num_fewshot:  # the harness draws one to spare
        raise ValueError(
            f"{name}: {len(splits['train'])} training questions are too few to draw {num_fewshot} examples from"
        )
    parts = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    used = {key: split if split in parts else None for key, split in _SPLITS.items()}
    return {"group": "local", "task": [{"task": name, "custom_dataset": lambda **_: parts, **used}]}


@contextlib.contextmanager
def _harness() -> Iterator[None]:
    """While the harness runs: standard output is ours, and its bars and what the hub's library says are left out."""
    logger = logging.getLogger("huggingface_hub")
    level, bar = logger.level, harness_task.tqdm
    logger.setLevel(logging.CRITICAL)
    harness_task.tqdm = functools.partial(bar, disable=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        harness_task.tqdm = bar


def _hint(name: str) -> str:
    layout = LAYOUTS.get(name)
    if layout is None:
        return ""
    files = " and ".join(f"{layout.folder}/{file}" for file in next(iter(layout.splits.values())))
    return f"; without the hub, give data_dir a folder with {files}"


# --- evaluation -----------------------------------------------------------------------------------------------------


def check_limit(limit: int | float | None) -> None:
    """Raises ValueError: neither a number of questions nor a share of them."""
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and math.isfinite(limit) and limit == int(limit))):
        raise ValueError(f"limit: must be a number of questions, or a share of them below 1, got {limit}")


def run_tasks(
    scorers: dict[str, Scorer],
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, Any],
    *,
    limit: int | float | None = None,
) -> dict[str, Any]:
    """Run tasks of `load_tasks` in each mode, and compare the modes with the first.

    Args:
        limit: questions of each task, the first ones; below 1, their share.

    Returns:
        "tasks", "groups" and "seconds", see `pldr.evaluation.evaluate.Evaluation`.

    Raises:
        ValueError: see `check_limit`; a task can not be scored, or has too few questions to draw examples from.
    """
    check_limit(limit)
    for name, task in tasks["tasks"].items():
        _check_examples(name, task)
    report: dict[str, Any] = {"tasks": {}, "groups": {}, "seconds": {}}
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for mode, scorer in scorers.items():
        start = time.perf_counter()
        found = _run(PldrLM(scorer, tokenizer=tokenizer), tasks, limit)
        report["seconds"][mode] = time.perf_counter() - start
        samples[mode] = found["samples"]
        for name, metrics in found["results"].items():
            kind = "tasks" if name in tasks["tasks"] else "groups"
            entry = report[kind].setdefault(name, {"scores": {}})
            entry["scores"][mode] = _metrics(metrics)
            if kind == "tasks":
                entry |= {"questions": found["n-samples"][name]["effective"], "num_fewshot": found["n-shot"][name]}
    first, *others = scorers
    for name, entry in report["tasks"].items():
        entry |= {"differ": {}, "share_bound": {}, "largest": {}}
        for mode in others:
            differ, largest = _differences(tasks["tasks"][name], samples[first][name], samples[mode][name])
            entry["differ"][mode], entry["largest"][mode] = differ, largest
            entry["share_bound"][mode] = share_bound(differ, entry["questions"])
    return report


def _check_examples(name: str, task: Any) -> None:
    """Raises ValueError: fewer questions than examples are to be drawn from."""
    shots = task.get_config("num_fewshot") or 0
    pool = getattr(getattr(task, "sampler", None), "df", None)
    # Where examples are drawn from the scored questions, the harness draws one to spare.
    needed = shots + (shots > 0 and task.fewshot_cfg.split == task.config.test_split)
    if pool is not None and len(pool) < needed:
        raise ValueError(
            f"eval: {name}: {shots} examples before each question are to be drawn from {len(pool)} questions; lower "
            "num_fewshot"
        )


def _run(model: PldrLM, tasks: dict[str, Any], limit: int | float | None) -> dict[str, Any]:
    """The harness's own results; every call has the same few-shot examples, and the same luck where a task samples."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    with _harness():
        return run_harness(model, tasks, limit=limit, bootstrap_iters=1000)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; "none" is the harness's name of no filter."""
    return {
        name.removesuffix(",none").replace(",", ", "): float(value)
        for name, value in found.items()
        if "," in name and isinstance(value, (int, float))
    }


def _differences(task: Any, one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[int, float]:
    """Questions with another answer, and the largest difference of a log-likelihood."""
    differ: set[int] = set()
    largest = 0.0
    for before, after in zip(one, other, strict=True):
        if before["arguments"] != after["arguments"]:
            raise AssertionError("the modes were not asked the same")
        if _answer(task, before) != _answer(task, after):
            differ.add(before["doc_id"])
        for a, b in zip(_log_likelihoods(before), _log_likelihoods(after), strict=True):
            largest = max(largest, abs(a - b))
    return len(differ), largest


def share_bound(count: int, of: int, confidence: float = 0.95) -> float:
    """The exact upper bound (Clopper and Pearson, one-sided) on a share, of which `count` were seen among so many."""
    from scipy import stats  # takes a second, and only a comparison needs it

    return float(stats.binomtest(count, of, alternative="less").proportion_ci(confidence, "exact").high)


def _log_likelihoods(sample: dict[str, Any]) -> list[float]:
    """Of each continuation, or of the whole text; none where the task generates."""
    found = [responses[0] for responses in sample["resps"]]
    return [response[0] if isinstance(response, (list, tuple)) else response for response in found
            if not isinstance(response, str)]  # fmt: skip


def _answer(task: Any, sample: dict[str, Any]) -> Any:
    """What the model answered: its choices, by log-likelihood (acc) and by that per character (acc_norm); or its text."""
    found = [responses[0] for responses in sample["resps"]]
    if isinstance(found[0], str):
        return found
    values = _log_likelihoods(sample)
    if task.OUTPUT_TYPE != "multiple_choice":
        return [response[1] for response in found if isinstance(response, (list, tuple))]  # whether it is greedy
    choices = task.doc_to_choice(sample["doc"])
    values = values[: len(choices)]  # what follows is without the question, for mutual information
    per_character = [value / max(1, len(choice)) for value, choice in zip(values, choices, strict=True)]
    return values.index(max(values)), per_character.index(max(per_character))
