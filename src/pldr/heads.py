"""Heads on the decoder stack: classes of a text, of its tokens, of choices, and answers in it. Registered with the Auto classes.

Names of modules and fields are transformers' own, which are also those of the published hub port. Padding may stand on either
side: it counts neither for G_LM nor for positions.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MultipleChoiceModelOutput
from transformers.utils import can_return_tuple

from pldr.configuration_pldr import PldrConfig
from pldr.modeling_pldr import PldrModel, PldrPreTrainedModel


class PldrForSequenceClassification(GenericForSequenceClassification, PldrPreTrainedModel):
    """Classes of a text, from the hidden state of its last token that is not padding; see transformers' mixin.

    `config.num_labels` of 1 is regression. A batch needs `config.pad_token_id`.
    """


class PldrForTokenClassification(GenericForTokenClassification, PldrPreTrainedModel):
    """A class of each token, from its hidden state; see transformers' mixin."""


class PldrForQuestionAnswering(GenericForQuestionAnswering, PldrPreTrainedModel):
    """Where in a text an answer begins and ends, from each token's hidden state; see transformers' mixin."""


class PldrForMultipleChoice(PldrPreTrainedModel):
    """The best of several continuations, by a score of the hidden state of each one's last token."""

    def __init__(self, config: PldrConfig) -> None:
        super().__init__(config)
        self.model = PldrModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids: [B, C, T], C choices each.
            attention_mask: [B, C, T], zero at padding; without it nothing is.
            position_ids: [B, C, T]; by default counted over the tokens that are not padding.
            labels: [B], the right choice; then the output has the mean cross-entropy.

        Returns:
            `logits` [B, C], and `loss` where there are labels.
        """
        flat = {
            name: None if value is None else value.flatten(0, 1)
            for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids))
        }
        outputs = self.model(input_ids.flatten(0, 1), **flat, **kwargs)
        hidden = outputs.last_hidden_state
        last = torch.full(hidden.shape[:1], hidden.shape[1] - 1, device=hidden.device)
        if flat["attention_mask"] is not None:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            last = (places * flat["attention_mask"].ne(0)).argmax(-1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last]).view(input_ids.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


for _auto, _head in (
    (AutoModelForSequenceClassification, PldrForSequenceClassification),
    (AutoModelForTokenClassification, PldrForTokenClassification),
    (AutoModelForQuestionAnswering, PldrForQuestionAnswering),
    (AutoModelForMultipleChoice, PldrForMultipleChoice),
):
    _auto.register(PldrConfig, _head, exist_ok=True)
