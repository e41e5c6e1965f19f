"""The package's shape: which module may import which, and documentation that runs."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from pldr import recipe
from pldr.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pldr"

# A module may import those to its right, never one to its left; operator and cache know nothing of the model.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "reproduce"},
    {"train"},
    {"trainer"},
    {"lm_eval"},
    {"evaluate"},
    {"html_report", "scoring", "benchmarks"},
    {"analysis", "certify", "generation", "report", "data"},
    {"recipe"},
    {"convert", "deductive"},
    {"modeling_pldr"},
    {"operator"},
    {"cache"},
    {"certificate", "checkpoint", "configuration_pldr", "ops", "saving", "shipped", "tokenizer"},
    {"layouts"},
]


def imports(path):
    """Names of the package's own modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pldr":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pldr.")}
    return found - {"__version__"}


def test_imports_point_one_way():
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for imported in imports(path) - {module}:
            assert rank[module] < rank[imported], f"{module} must not import {imported}"


def test_the_model_knows_nothing_of_training_or_text():
    code = (
        "import sys, pldr.modeling_pldr; print(sorted({'datasets', 'sentencepiece', 'matplotlib'} & set(sys.modules)))"
    )
    import subprocess

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist():
    import pldr

    for name in pldr.__all__:
        assert getattr(pldr, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pldr.nothing  # noqa: B018


def documented_commands():
    pattern = re.compile(r"^```(?:bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in pattern.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].split(" > ")[0].removeprefix("$ ").strip()
                if line.startswith("pldr "):
                    yield document.name, line


def test_documented_commands_parse():
    """Every `pldr …` line of the documents names a verb and options that exist, with the right number of arguments."""
    commands = list(documented_commands())
    assert len(commands) >= 8
    for document, line in commands:
        arguments = shlex.split(line)[1:]
        command = typer.main.get_command(app)
        if arguments[0].startswith("--"):
            continue
        assert arguments[0] in command.commands, f"{document}: {line}"
        verb = command.commands[arguments[0]]
        context = verb.make_context(arguments[0], arguments[1:], resilient_parsing=False)
        assert context is not None, f"{document}: {line}"
        if arguments[0] == "train":
            recipe.load_recipe(context.params["recipe"], context.params["overrides"])


def test_python_examples_in_the_readme_run(tmp_path, monkeypatch):
    """They are run one after the other, on the model that comes along."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
