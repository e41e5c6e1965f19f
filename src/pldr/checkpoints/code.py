"""A model's own code beside its weights, for people who have transformers and not this library.

The files are those of this library that the model classes need, side by side, with the imports among them made relative: what
`AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` fetches and runs.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from pldr import __version__, layouts
from pldr.configuration_pldr import PldrConfig

# The modules that hub folders name, and what they call our classes.
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
_NAMED = {
    "configuration_pldrllm": '''import types

import transformers

from .configuration_pldr import PldrConfig as PldrllmConfig  # noqa: F401


class PldrllmForCausalLM:
    """What `transformers serve` takes for the class that config.json names, which it looks for in transformers itself."""

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return transformers.AutoModelForCausalLM.from_pretrained(*args, **kwargs)


# The package may be there twice, because its processors import it anew: their type is the same.
if type(transformers) is not types.ModuleType:
    type(transformers).PldrllmForCausalLM = PldrllmForCausalLM
''',
    "modeling_pldrllm": "from .heads import (  # noqa: F401\n"
    + "".join(f"    Pldr{head} as Pldrllm{head},\n" for head in _HEADS)
    + ")\nfrom .modeling_pldr import PldrForCausalLM as PldrllmForCausalLM  # noqa: F401\n"
    + "from .modeling_pldr import PldrModel as PldrllmModel  # noqa: F401\n",
}
# What is otherwise in a folder's own code: there it is that code which its configuration names, and no other library is told.
_CHANGES = {
    "configuration_pldr": [
        ("        self.auto_map: dict[str, str] = {}\n", ""),
        ('kwargs.pop("auto_map", None)', 'self.auto_map = kwargs.pop("auto_map", None) or {}'),
    ],
    "modeling_pldr": [
        ("from pldr.registration import name_classes\n", ""),
        ("name_classes()  #", "#"),
    ],
}


def auto_map(config: PldrConfig) -> dict[str, str]:
    """What a config.json says of the classes in the folder's own code."""
    head = layouts.head_of(config)
    return {
        "AutoConfig": "configuration_pldrllm.PldrllmConfig",
        f"AutoModel{head}": f"modeling_pldrllm.Pldrllm{head}",
        **({"AutoModel": "modeling_pldrllm.PldrllmModel"} if head == "ForCausalLM" else {}),
    }


def write_code(folder: Path) -> None:
    """Write the modules into a folder."""
    note = f"# Of pldr {__version__} (Apache-2.0), made by `pldr convert --with-code`.\n"
    wanted, written = ["configuration_pldr", "modeling_pldr", "heads"], set()
    while wanted:
        module = wanted.pop()
        if module in written:
            continue
        written.add(module)
        spec = find_spec(f"pldr.{module}")
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        for before, after in _CHANGES.get(module, ()):
            assert text.count(before) == 1, f"{module} no longer holds {before!r}"
            text = text.replace(before, after)
        text, needed = _relative(text)
        wanted += needed
        (folder / f"{_flat(module)}.py").write_text(note + text, encoding="utf-8")
    for name, text in _NAMED.items():
        (folder / f"{name}.py").write_text(note + text, encoding="utf-8")


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _relative(text: str) -> tuple[str, list[str]]:
    """A module's text with relative imports in place of those of this package; and the modules that they name."""
    needed, lines = [], text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pldr"):
            continue
        room = node.module.removeprefix("pldr").removeprefix(".")
        first, indent = node.lineno - 1, " " * node.col_offset
        if find_spec(f"{node.module}.{node.names[0].name}") if _is_package(node.module) else False:
            modules = [f"{room}.{alias.name}".lstrip(".") for alias in node.names]
            # The first line is for transformers, which looks for files to fetch in imports of this form alone.
            made = [f"{indent}from .{_flat(name)} import __doc__ as _\n{indent}from . import {_flat(name)} as "
                    f"{alias.asname or alias.name}\n" for name, alias in zip(modules, node.names, strict=True)]  # fmt: skip
        else:
            modules = [room]
            lines[first] = re.sub(r"from pldr[\w.]*", f"from .{_flat(room)}", lines[first], count=1)
            made = lines[first : node.end_lineno]
        needed += modules
        lines[first : node.end_lineno] = ["".join(made), *[""] * (len(lines[first : node.end_lineno]) - 1)]
    return "".join(lines), needed


def _is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None
