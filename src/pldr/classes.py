"""All classes that transformers may ask for by name; see registration.py."""

from pldr.configuration_pldr import PldrConfig
from pldr.heads import (
    PldrForMultipleChoice,
    PldrForQuestionAnswering,
    PldrForSequenceClassification,
    PldrForTokenClassification,
)
from pldr.modeling_pldr import PldrForCausalLM, PldrModel

__all__ = [
    "PldrConfig",
    "PldrForCausalLM",
    "PldrForMultipleChoice",
    "PldrForQuestionAnswering",
    "PldrForSequenceClassification",
    "PldrForTokenClassification",
    "PldrModel",
]
