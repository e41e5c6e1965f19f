"""Damaged files of every kind that is read: a right result or one line that names the file, in bounds, nothing left behind.

A case is a kind of input, one of its files and one mutation (mutations.py), chosen by a seed, the kind and the case's number,
so that it can be repeated alone:

    PLDR_FUZZ_CASE=pldr-17 pytest -s tests/test_fuzz.py        one case, and what it did
    PLDR_FUZZ_SEED=1 PLDR_FUZZ_TIMES=10 pytest …               other cases, ten times as many

A result is judged by its parts (weights, configuration, token ids, …). A file decides some of them, and a mutation of it may
change those and no others; where a checksum stands over the file and was not made again, none at all.
"""

import contextlib
import faulthandler
import fnmatch
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from helpers import SENTENCE, TINY, WORDS, quantised_by_hand, write_benchmarks
from mutations import Damage, compress_zst, damage
from pldr import PldrConfig, PldrForCausalLM, convert_checkpoint, load_predefined_G, load_tokenizer
from pldr.cli import main
from pldr.data.sources import BadRows, Source, documents_of, read_pieces
from pldr.evaluation.published import LAYOUTS, read_benchmark
from pldr.files import CHECKSUMS, read_sums, write_sums
from pldr.provenance import with_checksum
from pldr.recipe import load_recipe
from pldr.training.checkpoint import SUMS
from pldr.training.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="processes are forked, and their memory is bounded, as on Linux"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU can not be forked"),
]

SEED = os.environ.get("PLDR_FUZZ_SEED", "0")
TIMES = int(os.environ.get("PLDR_FUZZ_TIMES", "1"))
ONE = os.environ.get("PLDR_FUZZ_CASE")
SECONDS, MEMORY = 10, 2 << 30  # of a case

# Cases of the default seed that fail and are known to, each with what is wrong. One that ends well is a failure too: take it out.
KNOWN: dict[str, str] = {}

Parts = dict[str, object]


@dataclass(frozen=True)
class Kind:
    """What is damaged, and how it is read.

    Attributes:
        source: folder of whole files, under `base`.
        read: reads the copy "in" of a place, writes to "out" there and nowhere else, and returns what it found, by part.
        decides: pattern of files → the parts that such a file decides.
        cases: how many are tried.
        files: patterns of the files that are damaged.
        sums: makes the checksums in a folder anew, which is done after half of the mutations.
        protected: patterns of files that a checksum stands over.
        within: whether those checksums are in the files themselves, which may then be gone.
        named: what else than a file or a folder may be named.
    """

    source: str
    read: Callable[[Path], Parts]
    decides: dict[str, set[str]]
    cases: int
    files: tuple[str, ...] = ("*",)
    sums: Callable[[Path], None] | None = None
    protected: tuple[str, ...] = ()
    within: bool = False
    named: str | None = None


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What was done in a place.

    Attributes:
        place: folder of the case.
        file: that was damaged, relative to "in".
        how: in words.
        free: the parts of the result that may have changed.
    """

    place: Path
    file: Path
    how: str
    free: set[str]


def make_case(kind: Kind, source: Path, place: Path, dice: random.Random) -> Case:
    """Copy a kind's whole files, and damage one."""
    folder = place / "in"
    shutil.copytree(source, folder)
    file = dice.choice(sorted(path for pattern in kind.files for path in folder.rglob(pattern) if path.is_file()))
    done = damage(file, dice)
    how, name = done.how, str(file.relative_to(folder))
    checked = any(fnmatch.fnmatch(name, pattern) for pattern in kind.protected)
    if kind.within:
        checked &= done.what == "bytes" or (done.what == "values" and kind.sums is not None)
    if kind.sums is not None and file.name not in (CHECKSUMS, SUMS) and file.is_file() and dice.random() < 0.5:
        kind.sums(folder)
        how, checked = f"{how}, sums made again", False
    decided = {part for pattern, parts in kind.decides.items() if fnmatch.fnmatch(name, pattern) for part in parts}
    return Case(place, Path(name), how, set() if checked else decided)


def contents(folder: Path) -> dict[str, str]:
    """Every name under a folder, with what it points to or a digest of what it holds."""
    found = {}
    for path in folder.rglob("*"):
        held = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if path.is_symlink() else hashlib.sha256(held).hexdigest()
        )
    return found


def attempt(read: Callable[[Path], Parts], place: Path) -> tuple[Parts | None, str]:
    """What reading gave, or None; and what was written to standard error, by libraries in Rust and C++ too."""
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as errors, contextlib.redirect_stderr(errors):
        before = os.dup(2)
        os.dup2(errors.fileno(), 2)
        found = None
        try:
            found = read(place)
        except SystemExit:
            pass
        except (ValueError, OSError) as error:  # of a function of the library: what the command line makes of it
            print("pldr:", error, file=errors)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os.dup2(before, 2)
            os.close(before)
        errors.seek(0)
        return found, errors.read()


def fault(kind: Kind, case: Case, expected: Parts) -> str | None:
    """What is wrong with how a damaged file is read."""
    before = contents(case.place)
    found, errors = attempt(kind.read, case.place)
    if found is not None:
        changed = {part for part in expected.keys() | found.keys() if found.get(part) != expected.get(part)} - case.free
        return f"changed: {', '.join(sorted(changed))}" if changed else None
    after = contents(case.place)
    if after != before:
        other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return f"left behind or changed: {', '.join(other)}, after: {errors}"
    lines = [line for line in errors.splitlines() if not line.startswith("training ")]  # the progress bar
    if len(lines) != 1 or not lines[0].startswith("pldr: ") or re.search(r"unexpected \w+ \(PLDR_TRACEBACK", lines[0]):
        return f"not one line of error: {errors}"
    if not lines[0].isprintable():
        return f"not printable: {lines[0]!r}"
    # Its name, or a folder that it is in, as a path from "in" or from the root.
    folders = [str(path) for parent in case.file.parents for path in (parent, case.place / "in" / parent)]
    named = "|".join(rf"(?<![\w/]){re.escape(folder)}(?![\w/.-])" for folder in folders if folder != ".")
    if case.file.name not in lines[0] and not re.search(kind.named or named, lines[0]):
        return f"does not name the file: {lines[0]}"
    return None


@dataclass(frozen=True)
class Cases:
    """The cases of a kind."""

    name: str
    kind: Kind
    source: Path
    folder: Path
    expected: Parts

    def work(self, numbers: list[int], write: Callable[[object], None]) -> None:
        """Cases one after another, each announced before and judged after."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        if ONE is None:
            faulthandler.disable()
        for number in numbers:
            dice = random.Random(f"{SEED}/{self.name}/{number}")
            case = make_case(self.kind, self.source, self.folder / f"{number}", dice)
            write((number, f"{case.file}: {case.how}"))
            signal.alarm(SECONDS)
            found = fault(self.kind, case, self.expected)
            signal.alarm(0)
            write((number, found))
            if ONE is None:
                shutil.rmtree(case.place)

    def in_a_child(self, numbers: list[int]) -> tuple[list[list], int]:
        """What `work` wrote in a process of its own, which may have died of a case, and how that ended."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with os.fdopen(writer, "w") as stream:
                    self.work(numbers, lambda event: print(json.dumps(event), file=stream, flush=True))
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            events = [json.loads(line) for line in stream]
        return events, os.waitpid(child, 0)[1]

    def faults(self, numbers: list[int]) -> dict[int, str]:
        """By number; where a process died of a case, another one goes on behind it."""
        found = {}
        while numbers:
            events, status = self.in_a_child(numbers)
            assert events, "the child process did nothing"
            if len(events) % 2:  # announced, not judged
                killer = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "nothing"
                over = f"took longer than {SECONDS} s" if killer == "SIGALRM" else f"the process died of {killer}"
                events.append([events[-1][0], over])
            for (number, what), (_, wrong) in zip(events[::2], events[1::2], strict=True):
                if ONE is not None:
                    print(f"{self.name}-{number}: {what}: {wrong or 'well'}")  # noqa: T201
                if wrong is not None:
                    found[number] = f"{self.name}-{number}: {what}: {wrong[:600]}"
            numbers = numbers[len(events) // 2 :]
        return found


def cases_of(name: str, kind: Kind, base: Path, folder: Path) -> Cases:
    """With what reading the whole files gives."""
    shutil.copytree(base / kind.source, folder / "whole" / "in")
    expected, errors = attempt(kind.read, folder / "whole")
    assert expected is not None, errors
    return Cases(name, kind, base / kind.source, folder, expected)


# --- the kinds ------------------------------------------------------------------------------------------------------

TEXT = "the cat sat on a mat"


def pldr(*arguments: object) -> str:
    """Run the command line in this process; its standard output."""
    sys.argv = ["pldr", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                sys.stderr.write(printed.getvalue())  # where nothing should be
                raise
    return printed.getvalue()


def numbers_in(content: bytes) -> np.ndarray:
    """What bytes are as 4-byte numbers, from every place on."""
    return np.concatenate([np.frombuffer(content[n : n + (len(content) - n) // 4 * 4], "<u4") for n in range(4)])


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def model_parts(folder: Path, sources: Path, *, computed: bool = False) -> Parts:
    """Of a model folder that was written: weights, configuration, the ids of a text.

    Every number of the weights must stand in one of the files that were read, unless they are `computed`: none comes from
    memory that nobody filled.
    """
    weights = load_file(folder / "model.safetensors")
    numbers = torch.cat([tensor.flatten().float() for tensor in weights.values()])
    assert numbers.isfinite().all(), "weights that are not finite"
    files = [path for path in sources.rglob("*") if path.suffix in (".safetensors", ".pth", ".pkl") and path.is_file()]
    known = np.concatenate([numbers_in(path.read_bytes()) for path in files])
    assert computed or len(np.setdiff1d(numbers.numpy().view("<u4"), known)) == 0, "weights that stand in no file"
    ids = load_tokenizer(folder)(TEXT)["input_ids"] if (folder / "tokenizer.json").is_file() else None
    return {"weights": digests(weights), "config": json.loads((folder / "config.json").read_text()), "ids": ids}


def read_by_convert(place: Path) -> Parts:
    pldr("convert", place / "in", place / "out")
    return model_parts(place / "out", place / "in")


def read_quantised(place: Path) -> Parts:
    pldr("convert", place / "in", place / "out")
    return model_parts(place / "out", place / "in", computed=True)


def read_by_freeze(file: str, place: Path) -> Parts:
    pldr("freeze", place / "in" / "model", place / "out", "--g-lm", place / "in" / file)
    return model_parts(place / "out", place / "in")


def read_by_resume(place: Path) -> Parts:
    """A run that goes on: the weights at its end, and the losses that its log then holds."""
    os.chdir(place / "in")  # its recipe says: output: run
    run = Path("run")
    pldr("train", "recipe.yaml", "--resume")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "weights": digests(load_file(run / "model.safetensors")),
        "log": [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines],
    }


def read_by_merge(place: Path) -> Parts:
    pldr("merge", place / "in" / "run" / "checkpoint-2", place / "out")
    return model_parts(place / "out", place / "in")


def read_by_generate(place: Path) -> Parts:
    printed = pldr("generate", place / "in", TEXT, "--max-new-tokens", 2, "--json")
    return {"text": json.loads(printed)["text"]}


def read_by_info(place: Path) -> Parts:
    pldr("info", place / "in")
    facts = json.loads(pldr("info", place / "in", "--json"))
    certificate = {name: facts.pop(name, None) for name in ("certificate", "certified_weights")}
    return {"certificate": certificate, "facts": facts}


def read_tokenizer(place: Path) -> Parts:
    return {"ids": load_tokenizer(place / "in")(TEXT)["input_ids"]}


def read_by_plot(place: Path) -> Parts:
    pldr("plot", place / "in", "--output", place / "out.png")
    return {"size": (place / "out.png").read_bytes()[:24].hex()}


def read_recipe(place: Path) -> Parts:
    return {"recipe": asdict(load_recipe(place / "in" / "recipe.yaml"))}


def read_data(place: Path) -> Parts:
    """Of each file the documents; an error of one is an error of all."""
    found = {}
    for name in DATA:
        pieces = read_pieces(Source([str(place / "in" / name)]), BadRows())
        documents = ["".join(piece.text for piece in document) for document in documents_of(pieces)]
        assert all(document.encode("utf-8") for document in documents), "an empty document"
        found[name] = documents
    return found


def types_of(value: object) -> object:
    """The types of nested values; of a list, those of its items."""
    if isinstance(value, dict):
        return {name: types_of(item) for name, item in value.items()}
    if isinstance(value, list):
        return sorted({repr(types_of(item)) for item in value})
    return type(value).__name__


def read_questions(place: Path) -> Parts:
    """The questions of the benchmarks; and the types of their fields, which nothing may change."""
    questions = {task: read_benchmark(task, place / "in") for task in LAYOUTS}
    return {"questions": questions, "types": {task: types_of(rows) for task, rows in questions.items()}}


def sums_again(folder: Path) -> None:
    """Of all that they list, as somebody would who changes a model on purpose."""
    for file in (path for name in (CHECKSUMS, SUMS) for path in folder.rglob(name) if path.is_file()):
        listed = [file.parent / name for name in read_sums(file.parent, file.name)]
        write_sums(file.parent, [path for path in listed if path.is_file()], file.name)


def certificate_again(folder: Path) -> None:
    file = folder / "certificate.json"
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # what is no certificate stays as it is
        file.write_text(json.dumps(with_checksum(json.loads(file.read_bytes()))))


def make_models(base: Path, tokenizer: PreTrainedTokenizerFast, sentencepiece: Path) -> None:
    """A learned model in one file and in shards, its frozen form in the published layouts, certified, and its operator."""
    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig(vocab_size=len(tokenizer), **TINY)).eval()
    for name, largest in (("pldr", "5GB"), ("shards", "100KB")):
        model.save_pretrained(base / name, max_shard_size=largest)
        tokenizer.save_pretrained(base / name)
    quantised_by_hand(base / "pldr", base / "quantized")
    (base / "long.txt").write_text(f"{SENTENCE} . " * 20)
    generous = ("--passages", 2, "--calibration", 1, "--length", 16, "--loss", 100, "--agreement", 0)
    pldr("certify", base / "pldr", base / "long.txt", "--output", base / "certified", *generous)
    convert_checkpoint(base / "certified", base / "hub", to="hub")
    convert_checkpoint(base / "certified", base / "reference", to="reference", tokenizer=sentencepiece)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # so that the SentencePiece file is read
        (base / "reference" / name).unlink()
    G_LM = load_predefined_G(base / "certified")
    for name, file in (("pickle", "G.pkl"), ("safetensors", "G.safetensors")):
        shutil.copytree(base / "shards", base / name / "model")
        if name == "pickle":
            shutil.copyfile(base / "reference" / "predefined_G_LM.pkl", base / name / file)
        else:
            save_file({"G_LM": G_LM.contiguous()}, base / name / file)


def make_run(base: Path, tokenizer: Path) -> None:
    """A run that was killed behind its checkpoint of step 2; and the log of the whole run, of 4 steps."""
    folder = base / "run"
    folder.mkdir()
    recipe = {
        "output": "run", "model": {"config": TINY}, "log_steps": 1, "save_steps": 2, "eval_steps": 2,
        "data": {"train": [str(base / "data" / "a.txt")], "validation": [str(base / "long.txt")],
                 "tokenizer": str(tokenizer), "sequence_length": 16},
        "optimization": {"steps": 4, "batch_size": 2, "warmup_steps": 1, "precision": "fp32"}, "report_to": [],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (base / "recipe").mkdir()
    shutil.copyfile(folder / "recipe.yaml", base / "recipe" / "recipe.yaml")
    with contextlib.chdir(folder):
        train(load_recipe("recipe.yaml"), progress=False)
    (base / "log").mkdir()
    log = folder / "run" / "log.jsonl"
    shutil.copyfile(log, base / "log" / "log.jsonl")
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 2))
    shutil.rmtree(folder / "run" / "checkpoint-4")
    for file in ("config.json", "model.safetensors", CHECKSUMS, "generation_config.json"):
        (folder / "run" / file).unlink()


DATA = ("a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.xz", "e.jsonl.zst", "f.parquet")


def make_data(folder: Path) -> None:
    folder.mkdir()
    dice = random.Random(0)
    texts = [" ".join(dice.choices(WORDS, k=30)) for _ in range(20)]
    lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()
    contents = [
        b"\n".join(text.encode() for text in texts),
        lines,
        gzip.compress(lines, mtime=0),
        lzma.compress(lines),
        compress_zst(lines),
    ]
    for name, content in zip(DATA[:-1], contents, strict=True):
        (folder / name).write_bytes(content)
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(20))}), folder / DATA[-1])


@pytest.fixture(scope="module")
def base(tmp_path_factory, toy_tokenizer, toy_model_file):
    """Folders of whole files: the sources of KINDS. All tokenisers work in one thread, which a forked process has."""
    base = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        make_models(base, toy_tokenizer, toy_model_file)
        make_data(base / "data")
        make_run(base, toy_model_file)
        toy_tokenizer.save_pretrained(base / "tokenizer")
        (base / "sentencepiece").mkdir()
        shutil.copyfile(toy_model_file, base / "sentencepiece" / "toy.model")
        write_benchmarks(base / "benchmarks")
        yield base


MODEL = {"*model*.safetensors": {"weights"}, "*config.json": {"config"}, "tokenizer*.json": {"ids"}}
KINDS = {
    "pldr": Kind("pldr", read_by_convert, MODEL, 50, sums=sums_again, protected=("*.safetensors", CHECKSUMS)),
    "shards": Kind("shards", read_by_convert, MODEL, 30, sums=sums_again, protected=("*.safetensors", CHECKSUMS)),
    "quantized": Kind("quantized", read_quantised, MODEL, 50, sums=sums_again, protected=("*.safetensors", CHECKSUMS)),
    "generate": Kind("pldr", read_by_generate, {"*": {"text"}}, 50, sums=sums_again, protected=("*.safetensors", CHECKSUMS)),
    "hub": Kind("hub", read_by_convert, MODEL, 40),
    "reference": Kind("reference", read_by_convert, {
        "*.pth": {"weights"}, "*.pkl": {"weights"}, "*.py": {"config"}, "*.model": {"ids"},
    }, 50),
    "pickle": Kind("pickle", partial(read_by_freeze, "G.pkl"), {"G.pkl": {"weights"}}, 40, files=("G.pkl",)),
    "safetensors": Kind("safetensors", partial(read_by_freeze, "G.safetensors"), {"G.safetensors": {"weights"}}, 20, files=("G.safetensors",)),
    "tokenizer": Kind("tokenizer", read_tokenizer, {"*": {"ids"}}, 40),
    "sentencepiece": Kind("sentencepiece", read_tokenizer, {"*": {"ids"}}, 30),
    "certificate": Kind("certified", read_by_info, {"certificate.json": {"certificate"}}, 20, files=("certificate.json",),
                        sums=certificate_again, protected=("certificate.json",), within=True),
    "resume": Kind("run", read_by_resume, {"run/checkpoint-2/*": {"weights", "log"}, "*/log.jsonl": {"log"}}, 50,
                   files=("run/**/*",), sums=sums_again, protected=("run/checkpoint-2/*",)),
    "merge": Kind("run", read_by_merge, MODEL, 20, files=("run/checkpoint-2/*",),
                  sums=sums_again, protected=("run/checkpoint-2/*",)),
    "data": Kind("data", read_data, {name: {name} for name in DATA}, 60, protected=("*.gz", "*.xz"), within=True),
    "recipe": Kind("recipe", read_recipe, {"*": {"recipe"}}, 30, named="recipe: "),
    "log": Kind("log", read_by_plot, {"*": {"size"}}, 20),
    "benchmarks": Kind("benchmarks", read_questions, {"*": {"questions"}}, 40),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name, base, tmp_path):
    """Every case ends well, but for those that are known not to."""
    numbers = list(range(KINDS[name].cases * TIMES))
    if ONE is not None:
        if ONE.rpartition("-")[0] != name:
            pytest.skip(f"only {ONE}")
        numbers = [int(ONE.rpartition("-")[2])]
    print(f"PLDR_FUZZ_SEED={SEED}, cases {name}-{numbers[0]} to {name}-{numbers[-1]}")  # noqa: T201
    found = cases_of(name, KINDS[name], base, tmp_path).faults(numbers)
    known = {number for number in numbers if SEED == "0" and f"{name}-{number}" in KNOWN}
    well = [f"{name}-{number}: is in KNOWN, and ends well" for number in sorted(known - found.keys())]
    new = [text for number, text in found.items() if number not in known]
    assert not well + new, "\n".join([f"{len(well + new)} of {len(numbers)} cases", *well, *new])


# --- whether faults are seen ----------------------------------------------------------------------------------------


def read_numbers(place: Path) -> Parts:
    """A reader as all should be."""
    file = place / "in" / "numbers.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return {"numbers": json.loads(file.read_bytes())}
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not JSON") from None


def read_wrongly(place: Path) -> Parts:
    return read_numbers(place) | {"other": (place / "in" / "numbers.json").stat().st_size}


def leave_something(place: Path) -> Parts:
    (place / "left").touch()
    return read_numbers(place)


def fail_with(error: Exception, place: Path) -> Parts:
    try:
        return read_numbers(place)
    except (ValueError, OSError):
        raise error from None


def end_with(action: Callable[[], object], place: Path) -> Parts:
    try:
        return read_numbers(place)
    except (ValueError, OSError):
        action()
        raise


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (read_numbers, None),
        (read_wrongly, "changed: other"),
        (leave_something, "left behind or changed: left, after: pldr: "),
        (partial(fail_with, KeyError("x")), "not one line of error: Traceback"),
        (partial(fail_with, ValueError("one\nnumbers.json")), "not one line of error: pldr: one"),
        (partial(fail_with, ValueError("numbers.json: \x1b[31m")), "not printable: "),
        (partial(fail_with, ValueError("no good")), "does not name the file: pldr: no good"),
        (partial(end_with, lambda: os.write(2, b"panic\n")), "not one line of error: panic"),
        (partial(end_with, lambda: os.kill(os.getpid(), signal.SIGSEGV)), "the process died of SIGSEGV"),
        (partial(end_with, lambda: time.sleep(60)), "took longer than 1 s"),
        (partial(end_with, lambda: bytearray(3 << 30)), "not one line of error: Traceback"),
    ],
)
def test_a_broken_reader_is_caught(tmp_path, monkeypatch, read, said):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "numbers.json").write_text('{"a": 1, "b": [2, 3]}')
    found = cases_of("numbers", Kind("source", read, {"*": {"numbers"}}, 1), tmp_path, tmp_path).faults(list(range(12)))
    assert all(said in text for text in found.values()) if said else not found, found
    assert said is None or found


def cut_a_tensor(file: Path, dice: random.Random) -> Damage:
    """A whole file, in which one tensor of the model lacks its last row."""
    tensors = load_file(file)
    name = dice.choice(sorted(name for name in tensors if name.startswith("decoder.dec_layers.")))
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    return Damage(f"{name} cut", "values")


def test_a_missing_check_is_caught(base, tmp_path, monkeypatch):
    """A reader of ours that no longer looks at names and shapes."""
    monkeypatch.setattr(sys.modules[__name__], "damage", cut_a_tensor)
    kind = replace(KINDS["hub"], files=("model.safetensors",))
    cases, numbers = cases_of("hub", kind, base, tmp_path), list(range(5))
    assert cases.faults(numbers) == {}
    monkeypatch.setattr("pldr.checkpoints.load.check_tensors", lambda *arguments: None)
    assert cases.faults(numbers).keys() == set(numbers)
