"""What tests share that is no fixture: where their data lies, toy texts and sizes, and the ways to compare."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pldr import load_model
from pldr.checkpoints.certificate import write_certificate
from pldr.files import write_sums
from pldr.provenance import weights_digest

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("PLDR_SHARED", Path(__file__).parents[2] / "shared"))

# What the toy tokenizer and the toy texts are made of.
SENTENCE = "the cat sat on a mat and saw that dog who ran to see him at her red house in old town"
WORDS = SENTENCE.split()

# The model of a toy training run.
TINY = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "metric_learner_units": 2, "metric_learner_width": 24,
}  # fmt: skip


# One question of each benchmark, as its authors publish it.
STEM = {"stem": "the cat sat on a", "choices": [{"text": "mat", "label": "A"}, {"text": "dog", "label": "B"}]}
ANSWERS = {"who sat on a mat": 1, "the red house": 0, "him at her town": 0}
PUBLISHED = {
    "ARC-Easy/ARC-Easy-Test.jsonl": {"id": "1", "question": STEM, "answerKey": "A"},
    "ARC-Challenge/ARC-Challenge-Test.jsonl": {"id": "2", "question": STEM, "answerKey": "B"},
    "hellaswag/hellaswag_val.jsonl": {
        "ind": 1, "activity_label": "cat", "ctx_a": "the cat sat.", "ctx_b": "the dog", "ctx": "the cat sat. the dog",
        "split": "val", "label": 2, "endings": ["ran to town", "sat on a mat", "saw him", "ran"],
    },
    "openbookqa/test.jsonl": {"id": "3", "question": STEM, "answerKey": "B"},
    "piqa/valid.jsonl": {"goal": "the cat", "sol1": "sat on a mat", "sol2": "ran to see a house"},
    "siqa/dev.jsonl": {
        "context": "the dog ran", "question": "who saw that dog", "answerA": "the cat", "answerB": "him", "answerC": "her",
    },
    "winogrande/dev.jsonl": {
        "qID": "4", "sentence": "the cat saw that dog who ran to the _ in town", "option1": "house", "option2": "mat",
        "answer": "1",
    },
    "truthfulqa/mc_task.json": {"question": "who ran", "mc1_targets": ANSWERS, "mc2_targets": ANSWERS | {"old": 1}},
}  # fmt: skip
LABELS = {"piqa/valid-labels.lst": "0", "siqa/dev-labels.lst": "3"}


def write_benchmarks(folder: Path) -> Path:
    """Three questions of each benchmark of the paper, in their authors' files."""
    for name, question in PUBLISHED.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([question] * 3) if file.suffix == ".json" else 3 * (json.dumps(question) + "\n")
        file.write_text(text, encoding="utf-8")
    for name, label in LABELS.items():
        (folder / name).write_text(3 * f"{label}\n", encoding="utf-8")
    return folder


def write_texts(folder):
    """Twelve files of toy text into a new folder: 00.txt to 11.txt."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    for index in range(12):
        picked = [WORDS[i] for i in torch.randint(len(WORDS), (150,), generator=generator)]
        (folder / f"{index:02}.txt").write_text(" ".join(picked) + ".\n")
    return folder


def toy_recipe(texts, tokenizer, *, output, **changes):
    """The YAML of a run of seconds on `write_texts`'s files; section__key=value changes a field of a section."""
    fields = {
        "output": str(output),
        "model": {"config": dict(TINY)},
        "data": {"train": [f"{texts}/0*.txt"], "validation": [f"{texts}/1*.txt"], "tokenizer": str(tokenizer),
                 "sequence_length": 32, "validation_rows": 8},
        "optimization": {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 3, "precision": "fp32"},
        "log_steps": 4,
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (fields[section] if section else fields)[name] = value
    return yaml.safe_dump(fields)


@contextmanager
def serving(folder, key):
    """`pldr serve` in a process of its own: the process, its address, and the lines of its log so far."""
    environment = os.environ | {"PLDR_API_KEY": key}
    command = [sys.executable, "-m", "pldr", "serve", str(folder), "--port", "0", "--backend", "engine"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        try:
            for line in process.stderr:
                if not line.startswith("{"):  # what other libraries say while they are imported, as torchao does
                    continue
                lines.append(json.loads(line))
                if lines[-1]["event"] == "ready":
                    break
            reader = threading.Thread(target=lambda: lines.extend(map(json.loads, process.stderr)), daemon=True)
            reader.start()
            yield process, lines[-1]["url"], lines
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            reader.join(10)
        finally:
            process.kill()


def shared(path: str) -> Path:
    """A file of the development data, or a skip where that is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"development data not here: {path}")
    return SHARED / path


def fails(result, message):
    """What the fixture `run` returned is a mistake of the user: one line with `message`, exit code 1, nothing printed."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line]
    assert code == 1
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("pldr: ")
    assert message in lines[0], lines[0]


def yaml_task(name, rows, **settings):
    """A task of the harness on a file of rows in PIQA's columns; JSON is YAML."""
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(rows)}},
        "output_type": "multiple_choice", "validation_split": "validation", "doc_to_text": "{{goal}}",
        "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}", "metric_list": [{"metric": "acc"}],
    } | settings  # fmt: skip


def quantised_by_hand(source: Path, destination: Path) -> dict[str, torch.Tensor]:
    """A copy of a folder with its queries in int8, keys in fp8 and values in int4 (groups of 16), as torchao writes them.

    Returns:
        The numbers that these weights stand for, worked out one by one.
    """
    shutil.copytree(source, destination)
    stored, written, metadata, expected = load_file(source / "model.safetensors"), {}, {"format": "pt"}, {}
    kinds = {"q_proj": "Int8Tensor", "k_proj": "Float8Tensor", "v_proj": "Int4Tensor"}
    for name, weight in stored.items():
        kind = kinds.get(name.split(".")[-2]) if name.endswith("weight") else None
        fields, parts = {"block_size": [1, weight.shape[-1]], "dtype": {"_type": "torch.dtype", "_data": "float32"}}, {}
        if kind is None:
            metadata[name], written[name] = json.dumps({"_type": "Tensor"}), weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 100
        if kind == "Int4Tensor":
            fields = {"block_size": [1, 16], "shape": list(weight.shape)}
            scale, zero = torch.rand(2, weight.shape[1] // 16, weight.shape[0])
            codes = torch.randint(-8, 8, weight.shape, dtype=torch.int8)
            bytes_ = [[(row[i] & 15) + 16 * (row[i + 1] & 15) for i in range(0, len(row), 2)] for row in codes.tolist()]
            parts = {
                "qdata": torch.tensor(bytes_, dtype=torch.uint8).view(torch.int8),
                "scale": scale,
                "zero_point": zero,
            }
            expected[name] = torch.tensor(
                [
                    [codes[n, k] * scale[k // 16, n] + zero[k // 16, n] for k in range(weight.shape[1])]
                    for n in range(weight.shape[0])
                ]
            )
        elif kind == "Int8Tensor":
            codes, zero = (weight / scale).round().to(torch.int8), torch.full_like(scale, 3, dtype=torch.int8)
            parts = {"qdata": codes, "scale": scale, "zero_point": zero}
            expected[name] = (codes.float() - 3) * scale
        else:
            parts = {"qdata": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}
            expected[name] = parts["qdata"].float() * scale
        metadata[name] = json.dumps({"_type": kind, "_data": fields, "_tensor_data_names": list(parts)})
        module, _, attribute = name.rpartition(".")
        written |= {f"{module}._{attribute}_{part}": tensor for part, tensor in parts.items()}
    metadata["tensor_names"] = json.dumps(list(stored))
    save_file(written, destination / "model.safetensors", metadata)
    config = json.loads((destination / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": {"_type": "anything"}}}
    (destination / "config.json").write_text(json.dumps(config))
    write_sums(destination, [destination / "model.safetensors"])
    return expected


def certify(folder):
    """A certificate with nothing in it but what makes it one, about the weights in a folder."""
    change = {"kl_mean": 0.0, "agreement": 1.0, "logit_difference": 0.0}
    comparison = change | {"loss_difference": 0.0, "loss_interval": [0.0, 0.0], "kl_99": 0.0, "kl_max": 0.0}
    report = {
        "passages": 1, "tokens": 1, "loss": 1.0, "modes": {"cached": comparison, "frozen": comparison}, "variation": [0.0],
        "calibration": {"loss_difference": [0.0], "spread": 0.0}, "causality": {"learned": change, "frozen": change},
        "thresholds": {"loss": 0.1, "agreement": 0.9}, "reasons": [], "certified": True,
    }  # fmt: skip
    words = dict.fromkeys(("model", "weights", "device", "date", "dtype"), "x")
    digest = weights_digest(load_model(folder).state_dict())
    certificate = {"kind": "pldr certificate 1", "frozen_weights": digest, "data": {}, "versions": {}, "report": report}
    write_certificate(folder, certificate | words)


def assert_close(actual, expected, *, max_error=None, rms_ratio=None, name="tensor"):
    """Compare tensors by largest absolute error or by RMS(error) / RMS(expected); one of the two must be given.

    Rejects NaN, and any difference of shape or dtype. The message names the largest error and where it is.
    """
    assert (max_error is None) != (rms_ratio is None), "give exactly one tolerance"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype} != {expected.dtype}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    error = (actual - expected).abs()
    ratio = (error.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)).item()
    worst = error.max().item()
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
    message = f"{name}: max error {worst:.3e} at {index}, RMS ratio {ratio:.3e}"
    assert (worst <= max_error) if max_error is not None else (ratio <= rms_ratio), message
