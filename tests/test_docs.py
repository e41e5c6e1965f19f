"""The documents: every command and every Python block in them runs, in order, where what they speak of is there."""

import ast
import inspect
import json
import lzma
import pickle
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from safetensors.torch import save_file

import pldr
from helpers import FIXTURES, PUBLISHED, WORDS, quantised_by_hand, serving, write_benchmarks
from pldr import HELD_OUT, PldrConfig, PldrForCausalLM, convert_checkpoint, recipe
from pldr.cli import app
from pldr.files import read_text
from pldr.study import demo
from pldr.study.lab import Verdict

ROOT = Path(__file__).parents[1]
CARD = "src/pldr/models/stories-10m/README.md"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", CARD]
DOCUMENTS += sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob("docs/**/*.md"))

# Commands that are not run here, by how they begin, and why not.
NOT_RUN = {
    "make ": "runs these tests, or is run by hand; its targets are looked up",
    ".ci/run": "runs make",
    "echo ": "a pipe; test_cli.py reads standard input",
    "source .venv/bin/activate": "changes a shell",
    "export TORCH_": "changes a shell",
    "pip install": "asks a package index",
    "pldr serve": "does not end; test_serving.py starts it, and so do these tests for what is asked of it",
    "pldr studio": "does not end; test_studio.py asks its server, tests/studio/test_page.py its page",
    "export PLDR_API_KEY": "changes a shell",
    "export OPENAI_BASE_URL": "changes a shell; set for the Python behind it",
    "curl ": "the Python behind it asks the same",
    "vllm ": "needs vLLM; test_vllm.py starts its server",
    "pldr export runs/frozen runs/onnx": "needs the extra; test_export.py of the clients runs it",
    "pldr quantize": "needs the extra; test_torchao.py of the clients runs it",
    "docker ": "needs a daemon; test_serving.py reads the files",
    "pldr train v51-110M-1": "a data set of the hub, and a data-centre GPU; its recipe is read",
    "torchrun": "many GPUs; its recipe is read, and test_distributed.py runs two processes",
    "accelerate launch": "many GPUs; its recipe is read",
    "python -m pldr.evaluation.lm_eval": "a data set of the hub; test_evaluate.py runs the command on a local task",
}
# What is added to commands, by how they begin, so that they end in seconds and take local files in place of the hub's.
ADDED = {
    "pldr train laptop": "optimization.steps=4 optimization.warmup_steps=2 data.vocab_size=400",
    "pldr eval MODEL --tasks": "--data-dir benchmarks-data",
    "pldr eval MODEL --suite paper --compare": "--data-dir benchmarks-data",
    f"pldr eval {Path(CARD).parent} --tasks": "--data-dir benchmarks-data",
    f"pldr inspect {Path(CARD).parent}": "--passages 2 --length 64",
    f"pldr certify {Path(CARD).parent}": "--length 64 --calibration 1",
    "pldr certify runs/mine": "--passages 4",
    "pldr compress runs/mine": "--length 64",
    "pldr reproduce caching": "--model runs/laptop --tokenizer runs/laptop",
    "pldr tokenizer train": "--vocab-size 400",
}
# What is there when a document is read: things it speaks of and does not make.
THERE = {
    "README.md": ["demo-output", "my-book.txt", "src", "benchmarks-data"],
    "docs/certify.md": ["runs/mine", "held-out.jsonl"],
    "docs/compression.md": ["runs/mine", "held-out.jsonl"],
    "docs/checkpoints.md": ["PLDR-LLM-v51-110M-1", "v51", "v52", "v51G", "refinedweb.model"],
    "docs/export.md": ["runs/mine"],
    "docs/quantization.md": ["runs/mine", "runs/int8"],
    "docs/deductive-outputs.md": ["runs/mine", "books", "predefined_G_LM.safetensors"],
    "docs/evaluation.md": ["MODEL", "benchmarks-data", "test.txt", "valid.txt"],
    "docs/generation.md": ["runs/mine", "prompts.txt"],
    "docs/operators-and-caches.md": ["runs/mine", "predefined_G_LM.pkl"],
    "docs/published.md": ["PLDR-LLM-v51-110M-1"],
    "docs/python.md": ["runs/laptop", "my-book.txt", "my-other-book.txt"],
    "docs/serving.md": ["OPENAI_BASE_URL"],
    "docs/training.md": ["text"],
}
# Documents whose Python needs other programs, and the tests of these that run it.
CLIENTS = {"docs/fine-tuning.md": "test_fine_tuning.py"}
# Documents that take more than a few seconds.
SLOW = [
    "README.md",
    CARD,
    *(f"docs/{name}.md" for name in ("compression", "engine", "evaluation", "export", "serving", "training")),
]


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    line: int  # of its first line
    text: str


def blocks(document):
    text = read_text(ROOT / document)
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
        yield Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])


def commands(block):
    """The words of each command."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def all_commands():
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language == "bash":
                for words in commands(block):
                    yield f"{document}:{block.line}", words


def beginnings(table, words):
    """The entries of a table that a command begins as."""
    return [start for start in table if " ".join(words).startswith(start)]


# --- what the tables and the documents say --------------------------------------------------------------------------


def test_every_command_is_run_or_listed():
    unused = {*NOT_RUN, *ADDED}
    for place, words in all_commands():
        found = beginnings(NOT_RUN, words)
        assert words[0] == "pldr" or found, f"{place}: neither run nor listed: {' '.join(words)}"
        unused -= {*found, *beginnings(ADDED, words)}
    assert not unused, "of no command any more"
    assert set(SLOW) <= set(DOCUMENTS)
    for document, names in THERE.items():
        said = " ".join((read_text(ROOT / document), *ADDED.values()))
        assert all(name in said for name in names), document


def test_commands_stand_in_blocks_that_say_what_they_are():
    for document in DOCUMENTS:
        assert {block.language for block in blocks(document)} <= {"bash", "python", "bibtex", "text"}, document
        assert read_text(ROOT / document).count("```") == 2 * len(list(blocks(document))), document
        indented = re.findall(
            r"^(?: {4}|\t)(?:pldr|make|python|pip|torchrun|accelerate) .*", read_text(ROOT / document), re.M
        )
        assert not indented, document


def test_commands_parse():
    """Verbs, options and numbers of arguments are those of the command line, recipes can be read, targets of make exist."""
    targets = re.findall(r"^([\w-]+):", read_text(ROOT / "Makefile"), re.M)
    for place, words in all_commands():
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), place
        starts = [0] if words[0] == "pldr" else [i + 1 for i in range(len(words)) if words[i : i + 2] == ["-m", "pldr"]]
        for start in starts:
            command, arguments = typer.main.get_command(app), without_redirection(words[start + 1 :])[0]
            while hasattr(command, "commands"):
                assert arguments[0] in command.commands, f"{place}: {arguments[0]}"
                command = command.commands[arguments.pop(0)]
            context = command.make_context(command.name, arguments)
            if command.name == "train" and "recipe" in context.params:
                recipe.load_recipe(context.params["recipe"], context.params["overrides"])


def test_verbs_and_options_in_running_text_exist():
    """`pldr verb --option` between backticks may be shortened, but names what there is."""
    names = typer.main.get_command(app).commands
    for document in DOCUMENTS:
        prose = re.sub(r"^```(?:.*\n)*?```$", "", read_text(ROOT / document), flags=re.M)
        for code in re.findall(r"`pldr\s+([^`]+)`", prose):
            verb, *rest = code.split()
            assert verb in names or verb == "…", f"{document}: pldr {code}"
            options = {option for parameter in getattr(names.get(verb), "params", []) for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, f"{document}: pldr {code}"


def test_functions_take_the_options_of_their_commands():
    """By the same names, with the same defaults, as the table of docs/python.md says, which has every verb."""
    rows = re.findall(r"^\| `pldr ([\w ]+)` \| (.*?) \|", read_text(ROOT / "docs/python.md"), re.M)
    commands = {"tokenizer train": typer.main.get_command(app).commands["tokenizer"].commands["train"]}
    commands |= typer.main.get_command(app).commands
    assert {verb for verb, _ in rows} == commands.keys() - {"tokenizer"}
    # What prints alone or is said in another way: files given, what a stream is for.
    said = {"perplexity": "files", "stream": "on_text", "resume_from": "resume", "strict": "overrides",
            "prompts_file": "prompt"}  # fmt: skip
    for verb, functions in rows:
        taken = {}
        for name in re.findall(r"`pldr\.(\w+)", functions):
            taken |= inspect.signature(getattr(pldr, name)).parameters
        for parameter in commands[verb].params:
            name = parameter.name if parameter.name in taken else said.get(parameter.name)
            if parameter.name != "as_json":
                assert name in taken, (verb, parameter.name)
                default = taken[name].default
                if not parameter.required and default is not inspect.Parameter.empty:
                    given = parameter.default or ("cpu" if name == "device" and default else "")
                    assert str(given) == str(default or ""), (verb, parameter.name)


def test_modules_and_functions_in_running_text_exist():
    for document in DOCUMENTS:
        for name in re.findall(r"`(pldr(?:\.\w+)+)", read_text(ROOT / document)):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                pytest.fail(f"{document}: {name}: {error}")


def test_files_in_running_text_exist():
    """Named by the end of their path, as `claims.py` or `study/claims.py`."""
    rooms = ("src", "tests", "benchmarks", "examples", "recipes", ".github")
    files = [file.as_posix() for room in rooms for file in (ROOT / room).rglob("*.*")]
    files += [file.as_posix() for pattern in ("*.yml", ".ci/*.py") for file in ROOT.glob(pattern)]
    for document in DOCUMENTS:
        for name in re.findall(r"`(?:python )?([\w./-]+\.(?:py|ya?ml))\b[^`]*`", read_text(ROOT / document)):
            assert any(file.endswith(f"/{name}") for file in files), f"{document}: {name}"


def test_records_of_results_speak_as_the_library_does():
    for file in ROOT.glob("docs/results/**/*.json"):
        text = read_text(file)
        assert not re.search(r'"(computed|full)":|comes with|nats a ', text), file
        if file.name == "results.json":
            record = json.loads(text)
            assert record["outcome"] in tuple(Verdict)
            assert record["verdict"].lower().startswith(record["outcome"]), file


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", read_text(ROOT / document)):
            if "://" in target:
                continue
            file = (ROOT / document).parent / target if target else ROOT / document
            assert file.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(file), f"{document}: {target}#{anchor}"


def anchors(file):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```(?:.*\n)*?```$", "", read_text(file), flags=re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_messages_of_the_error_pages_are_the_librarys():
    """Headings are messages, with … for what changes: each is one of the code's, or a part of one."""
    said = "\n".join(
        template_of(node)
        for file in (ROOT / "src/pldr").rglob("*.py")
        for node in ast.walk(ast.parse(read_text(file)))
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)
    )
    pages = sorted(ROOT.glob("docs/errors/*.md"))
    assert len(pages) == 9
    for page in pages:
        messages = re.findall(r"^### `(.*)`$", read_text(page), re.M)
        assert messages or page.name == "README.md", page.name
        for message in messages:
            assert message in said, f"{page.name}: {message}"


def template_of(node):
    """A string of the code with … in place of what is put in; empty for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
            return re.sub("…+", "…", text)
        case ast.BinOp(op=ast.Add()):
            return template_of(node.left) + template_of(node.right)
    return ""


# --- running them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in DOCUMENTS
        if "docs/results/" not in name and name not in CLIENTS
    ],
)
def test_documents_run(document, make_thing, run, tmp_path, monkeypatch):
    """Blocks of a document run one after the other, in a folder with what it speaks of."""
    monkeypatch.chdir(tmp_path)
    for name in THERE.get(document, []):
        make_thing(name, tmp_path / name)
    namespace = {}
    for block in blocks(document):
        if block.language == "python":
            run_python(document, namespace, block)
        elif block.language == "bash":
            for words in commands(block):
                if not beginnings(NOT_RUN, words):
                    run_command(run, words, f"{document}:{block.line}")


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """Also where the README as a whole is too slow to run."""
    monkeypatch.chdir(tmp_path)
    run_python("README.md", {}, *(block for block in blocks("README.md") if block.language == "python"))


def test_the_example_selects_story_books(tmp_path, monkeypatch, capsys):
    text = " ".join(WORDS) * 100
    books = [{"title": "Fables", "author": "Aesop", "text": text}, {"title": "Laws", "author": "Solon", "text": text}]
    with lzma.open(tmp_path / "books.jsonl.xz", "wt") as stream:
        stream.writelines(f"{json.dumps(book)}\n" for book in books)
    monkeypatch.chdir(tmp_path)
    files = ["books.jsonl.xz", "stories.jsonl.xz", "stories.model"]
    monkeypatch.setattr(sys, "argv", ["select_books.py", *files, "--vocab-size", "280"])
    runpy.run_path(str(ROOT / "examples/select_books.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(
        f"1 books, {len(text):,} characters; authors not found: Abbie Farwell Brown,"
    )
    with lzma.open("stories.jsonl.xz", "rt") as stream:
        assert [json.loads(line) for line in stream] == books[:1]
    assert len(pldr.load_tokenizer("stories.model")) == 280


def run_python(document, namespace, *found):
    for block in found:
        exec(compile("\n" * (block.line - 1) + block.text, ROOT / document, "exec"), namespace)


def run_command(run, words, place):
    arguments, output = without_redirection(words[1:])
    added = [word for start in beginnings(ADDED, words) for word in ADDED[start].split()]
    code, out, err = run(*arguments, *added)
    assert code == 0, f"{place}: {' '.join(words)}: {err}"
    if output is not None:
        Path(output).write_text(out, encoding="utf-8")


def without_redirection(words):
    """The arguments of a command, and the file that its output goes to, or None."""
    return (words[:-2], words[-1]) if ">" in words else (list(words), None)


@pytest.fixture
def make_thing(toy_model_file, toy_tokenizer, monkeypatch):
    """Make what a document speaks of."""
    excerpts = [json.loads(line)["text"] for line in read_text(HELD_OUT).splitlines()]

    def make(name, place):
        place.parent.mkdir(parents=True, exist_ok=True)
        match name:
            case "src":
                place.symlink_to(ROOT / "src")
            case "runs/mine" | "runs/laptop" | "MODEL":
                small_model().save_pretrained(place)
                toy_tokenizer.save_pretrained(place)
            case "runs/int8":
                make("runs/mine", place.parent / "whole")
                quantised_by_hand(place.parent / "whole", place)
            case "PLDR-LLM-v51-110M-1" | "v51":
                make("MODEL", place.parent / f"before-{name}")
                convert_checkpoint(place.parent / f"before-{name}", place, to="reference" if name == "v51" else "hub")
                if name == "v51":
                    (place / "model-checkpoint.pth").rename(place / "checkpoint.pth")
            case "v52" | "v51G":
                source = FIXTURES / {"v52": "v52-small", "v51G": "v51G-random"}[name]
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("hub", "expected*"))
                (place / "model-checkpoint.pth").rename(place / "checkpoint.pth")
            case "predefined_G_LM.pkl" | "predefined_G_LM.safetensors":
                G_LM = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
                if place.suffix == ".pkl":
                    place.write_bytes(pickle.dumps([layer[None].clone() for layer in G_LM]))
                else:
                    save_file({"G_LM": G_LM}, place)
            case "refinedweb.model":
                shutil.copy(toy_model_file, place)
            case "prompts.txt":
                make_file(place, "The sea\nIt was\n")
            case "my-book.txt" | "my-other-book.txt" | "test.txt" | "valid.txt":
                make_file(place, excerpts[0])
            case "text":
                for number, text in enumerate(excerpts):
                    make_file(place / f"{number}.txt", text)
            case "books":
                make_file(place / "one.jsonl", read_text(HELD_OUT))
            case "held-out.jsonl":
                shutil.copy(HELD_OUT, place)
            case "benchmarks-data":
                write_benchmarks(place)
                rows = [PUBLISHED["piqa/valid.jsonl"] | {"goal": f"the cat {n}"} for n in range(10)]
                make_file(place / "piqa/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
                make_file(place / "piqa/train-labels.lst", 10 * "0\n")
            case "demo-output":  # by the demo itself, on less text
                for constant, value in {"NEW_TOKENS": 4, "REPEATS": 1, "PASSAGES": 3, "STORY_LENGTH": 64}.items():
                    monkeypatch.setattr(demo, constant, value)
                demo.run_demo(place)
            case "OPENAI_BASE_URL":  # of a server
                pytest.importorskip("openai")
                _, url, _ = stack.enter_context(serving(pldr.STORIES, "secret"))
                monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
                monkeypatch.setenv("OPENAI_API_KEY", "secret")
            case _:
                raise ValueError(name)

    with ExitStack() as stack:
        yield make


def make_file(place, text):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def small_model():
    """A fresh model with a learned operator that is the same for every text, so that it is certified."""
    torch.manual_seed(0)
    config = PldrConfig(
        vocab_size=290, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, metric_learner_units=2,
        metric_learner_width=24, max_position_embeddings=512,
    )  # fmt: skip
    model = PldrForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.operator.energy_weight)
        torch.nn.init.normal_(layer.self_attn.operator.energy_bias)
    return model
