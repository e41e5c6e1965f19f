"""How other libraries come to know our classes after `import pldr`, which loads none of them.

A library that is not imported yet gets a few names when it is: transformers finds classes by name, in tables of its own, and
imports their module at the first use. One that is imported already is told at once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
# Where transformers' tables look for the classes of a model type.
_CLASSES = "transformers.models.pldrllm"
_TABLES = {
    "MODEL_MAPPING_NAMES": "PldrModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "PldrForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "PldrForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "PldrForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "PldrForQuestionAnswering",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "PldrForMultipleChoice",
}


def register() -> None:
    """Tell transformers and its server, lm-evaluation-harness and PEFT, now or when they are imported."""
    hooks = {
        "transformers": name_classes,
        f"{_AUTO}.auto_mappings": _name_configuration,
        f"{_AUTO}.modeling_auto": _name_models,
        "lm_eval.models": _name_in_harness,
        "peft.utils.constants": _name_in_peft,
        "transformers.cli.serving.server": _answer_in_server,
    }
    there = {name: sys.modules[name] for name in hooks if name in sys.modules}
    sys.meta_path.insert(0, _Finder({name: hook for name, hook in hooks.items() if name not in there}))
    if f"{_AUTO}.auto_mappings" in there:  # too late for its tables
        importlib.import_module("pldr.heads")
    for name in there.keys() - {f"{_AUTO}.auto_mappings", f"{_AUTO}.modeling_auto"}:
        hooks[name](there[name])


def name_classes(module: Any = None) -> None:
    """`transformers.PldrForCausalLM`, as `transformers serve` and TRL ask for the class that a config.json names."""
    names = sys.modules["transformers"].__dict__["_class_to_module"]
    names |= dict.fromkeys(["PldrConfig", *_TABLES.values()], "models.pldrllm")


def _name_configuration(module: Any) -> None:
    module.CONFIG_MAPPING_NAMES["pldrllm"] = "PldrConfig"


def _name_models(module: Any) -> None:
    for table, name in _TABLES.items():
        getattr(module, table)["pldrllm"] = name


def _name_in_harness(module: Any) -> None:
    """Releases that read entry points know it by themselves."""
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "pldr" not in registry:
        registry.register("pldr", target="pldr.evaluation.harness:PldrLM")


def _name_in_peft(module: Any) -> None:
    importlib.import_module("pldr.integrations.peft").register(module)


def _answer_in_server(module: Any) -> None:
    importlib.import_module("pldr.integrations.serve").register(module)


class _Finder(MetaPathFinder):
    """Calls a hook when its module has been imported, and finds the module of our classes where transformers looks."""

    def __init__(self, hooks: dict[str, Callable[[ModuleType], None]]) -> None:
        self.hooks = hooks

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == _CLASSES:
            found = importlib.util.find_spec("pldr.classes")
            assert found is not None
            return importlib.util.spec_from_file_location(fullname, found.origin)
        hook = self.hooks.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if hook is not None else None
        if hook is not None and spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                hook(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
