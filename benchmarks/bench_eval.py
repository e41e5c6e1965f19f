"""Seconds that scoring a benchmark takes in each operator mode, against forwards of one sequence at a time.

    python benchmarks/bench_eval.py DATA_DIR [--task piqa] [--model FOLDER] [--device cpu] [--plain 100] [--output FILE]

DATA_DIR holds the task's published files (docs/evaluation.md). Before anything is timed, 50 questions are scored by plain
forwards too: a benchmark of other log-likelihoods stops there. `--plain` says on how many questions the plain forwards are
timed; their time for all questions is in proportion to the tokens.

The target: the whole of PIQA, 1,838 questions, with the model that ships with pldr, in three minutes on two cores.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from conditions import conditions, record

from pldr import load_model, load_tokenizer
from pldr.evaluation.harness import PldrLM, load_tasks
from pldr.evaluation.scoring import make_scorers, read_calibration
from pldr.models.shipped import STORIES

TARGET = 180.0


@torch.inference_mode()
def plainly(model, pairs):
    found = []
    for context, continuation in pairs:
        ids = torch.tensor([[*context, *continuation]], device=model.device)
        logits = model(ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :].log_softmax(-1)
        found.append(float(logits[range(len(continuation)), continuation].double().sum()))
    return found


def tokens(pairs):
    return sum(len(context) + len(continuation) for context, continuation in pairs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--task", default="piqa")
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model, device=arguments.device).float(), load_tokenizer(arguments.model)
    calibration = read_calibration(tokenizer, model.config.max_position_embeddings).to(arguments.device)
    scorers = make_scorers(model, calibration)
    plain = {mode: scorers[mode].model for mode in ("learned", "frozen")}
    (task,) = load_tasks([arguments.task], data_dir=arguments.data_dir)["tasks"].values()
    task.build_all_requests()
    lm = PldrLM(scorers["frozen"], tokenizer=tokenizer)
    pairs, questions = [], []
    for request in task.instances:
        context, continuation = lm._encode_pair(*request.args)
        pairs.append((context, continuation))
        questions.append(request.doc_id)
    few = [pair for pair, question in zip(pairs, questions, strict=True) if question < 50]
    parity = {}
    for mode, running in plain.items():
        scores = [score.log_likelihood for score in scorers[mode].score(few)]
        parity[mode] = max(abs(a - b) for a, b in zip(scores, plainly(running, few), strict=True))
        assert parity[mode] < 1e-4, f"{mode}: log-likelihoods differ from plain forwards by {parity[mode]:.1e}"

    load = os.getloadavg()[0]
    seconds, found = {}, {}
    for mode, scorer in scorers.items():
        start = time.perf_counter()
        found[mode] = scorer.score(pairs)
        seconds[mode] = time.perf_counter() - start
    some = [pair for pair, question in zip(pairs, questions, strict=True) if question < arguments.plain]
    share = tokens(pairs) / tokens(some)
    plain_seconds = {}
    for mode, running in plain.items():
        start = time.perf_counter()
        plainly(running, some)
        plain_seconds[mode] = share * (time.perf_counter() - start)

    result = {
        "benchmark": "eval", "task": arguments.task, "model": arguments.model.name, "dtype": "float32",
        "questions": len(set(questions)), "continuations": len(pairs), "parity": parity,
        "seconds": seconds, "plain_seconds": plain_seconds, "target_seconds": TARGET,
        "within_target": all(value < TARGET for value in seconds.values()), "load_average_before": load,
    } | conditions(arguments.device)  # fmt: skip
    for mode, value in seconds.items():
        beside = f", one sequence at a time {plain_seconds[mode]:.0f} s" if mode in plain_seconds else ""
        print(f"{mode}: {value:.1f} s for {result['questions']} questions (target {TARGET:.0f} s){beside}")
    record(result, arguments.output)


if __name__ == "__main__":
    main()
