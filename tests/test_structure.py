"""The package's shape: which module may import which, and how large its parts may be."""

import ast
import shlex
from pathlib import Path

import pytest
import typer
from rich.text import Text

import pldr
from pldr import recipe
from pldr.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pldr"

# The rooms of the house, top floor first: a module may import those of its own room and of the floors below, never one above.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"studio"},
    {"study"},
    {"training"},
    {"serving", "integrations"},
    {"evaluation"},
    {"checkpoints", "data", "generation", "engine"},
    {"tables", "plots", "models", "recipe"},
    {"heads", "classes"},
    {"deductive", "modeling_pldr"},
    {"operator", "cache", "masks", "batching", "configuration_pldr", "tokenizer", "provenance"},
    {"ops", "layouts", "files", "pictures", "registration", "imports", "conditions"},
]


def imports(path):
    """The package's own modules that a file imports when it runs, at any depth of its code: "room" or "room.module"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # names for the type checker alone
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pldr":
            place = node.module.removeprefix("pldr").removeprefix(".")
            for alias in node.names:
                inside = f"{place}.{alias.name}".lstrip(".").replace(".", "/")
                is_module = (SOURCE / f"{inside}.py").is_file() or (SOURCE / inside).is_dir()
                found.add(inside.replace("/", ".") if is_module else place)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("pldr.") for alias in node.names if alias.name.startswith("pldr.")}
    return found - {""}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if name != "__init__":
            yield name, imports(path)


def test_imports_point_one_way():
    floor = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}
    for module, imported in modules():
        room = module.split(".")[0]
        for other in {name.split(".")[0] for name in imported} - {room}:
            assert floor[room] <= floor[other], f"{module} must not import {other}"


def test_contributing_draws_the_floors():
    drawn = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    assert [set(line.split()) for line in drawn.splitlines()] == FLOORS


def test_imports_go_in_no_circle():
    """Not within a room or a floor either."""
    graph = {module.removesuffix(".__init__"): imported for module, imported in modules()}
    done = set()

    def visit(module, path):
        assert module not in path, f"circle: {' → '.join((*path, module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


# Functions that may be longer than others, with the reason in CONTRIBUTING.md.
LONG_FUNCTIONS = {"evaluation/evaluate.py:evaluate", "study/certify.py:certify", "serving/server.py:serve"}


def functions():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(SOURCE)}:{node.name}", node


def test_functions_and_modules_stay_small():
    long = {name for name, node in functions() if node.end_lineno - node.lineno + 1 > 60}
    assert long == LONG_FUNCTIONS
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def test_a_verb_parses_calls_one_function_and_prints():
    """At most 25 lines behind its help; and the help ends with an example that parses."""
    verbs = {node.name: node for name, node in functions() if name.startswith("cli.py:") and node.decorator_list}
    commands = {}
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        commands |= {name: command} if not hasattr(command, "commands") else {
            f"{name} {sub}": command.commands[sub] for sub in command.commands
        }  # fmt: skip
    assert len(commands) == len(verbs) - 1 >= 13  # without --version
    for node in verbs.values():
        called = [ast.literal_eval(call.args[0]) for call in ast.walk(node) if isinstance(call, ast.Call)
                  and getattr(call.func, "id", "") in ("_show", "_call")]  # fmt: skip
        assert (len(called) == 1 and called[0] in pldr.__all__) or node.name in (
            "_version",
            "generate",
            "train",
            "plot",
        )
        first, last = node.body[1 if ast.get_docstring(node) else 0], node.body[-1]
        assert last.end_lineno - first.lineno + 1 <= 25, node.name
    for name, command in commands.items():
        example = command.epilog.removeprefix("Example: [bold]pldr ").removesuffix("[/bold]")
        example = Text.from_markup(example).plain  # as it is shown
        assert example.startswith(name), command.epilog
        context = command.make_context(name, shlex.split(example.removeprefix(name)))
        if name == "train":
            recipe.load_recipe(context.params["recipe"], context.params["overrides"])


def test_public_names_exist():
    for name in pldr.__all__:
        assert getattr(pldr, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pldr.nothing  # noqa: B018
