"""PLDR-LLMs: language models whose attention learns a tensor operator, G_LM.

Public names are imported on first use, so that ``import pldr`` and ``pldr --help`` start without torch. After ``import pldr``
transformers' Auto classes know ``model_type`` "pldrllm", and lm-evaluation-harness the model "pldr".
"""

from importlib import import_module

from pldr.imports import uncollected
from pldr.registration import register

__version__ = "0.2.0"

_PUBLIC = {
    "PldrConfig": "configuration_pldr",
    "PldrForCausalLM": "modeling_pldr",
    "PldrModel": "modeling_pldr",
    "PldrForMultipleChoice": "heads",
    "PldrForQuestionAnswering": "heads",
    "PldrForSequenceClassification": "heads",
    "PldrForTokenClassification": "heads",
    "ConstantOperator": "operator",
    "DeductiveOutputs": "operator",
    "FactoredOperator": "operator",
    "LearnedOperator": "operator",
    "freeze": "operator",
    "make_cache": "cache",
    "dag_loss": "deductive",
    "deductive_outputs": "deductive",
    "load_model": "checkpoints.load",
    "load_predefined_G": "checkpoints.load",
    "convert_checkpoint": "checkpoints.convert",
    "freeze_checkpoint": "checkpoints.convert",
    "info": "checkpoints.info",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "data.vocabulary",
    "merge_checkpoint": "training.checkpoint",
    "plot_run": "plots",
    "generate_text": "generation",
    "Completion": "engine",
    "Engine": "engine",
    "Options": "engine",
    "Piece": "engine",
    "load_recipe": "recipe",
    "train": "training.run",
    "evaluate": "evaluation.evaluate",
    "inspect": "study.inspect",
    "certify": "study.certify",
    "compress": "study.compress",
    "quantize": "study.quantize",
    "reproduce": "study.claims",
    "run_demo": "study.demo",
    "serve": "serving.server",
    "run_studio": "studio.server",
    "export": "integrations.export",
    "STORIES": "models.shipped",
    "HELD_OUT": "models.shipped",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pldr' has no attribute {name!r}")
    with uncollected():
        return getattr(import_module(f"pldr.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
