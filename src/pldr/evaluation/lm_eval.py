"""`python -m pldr.evaluation.lm_eval`: lm-evaluation-harness's own command, with "pldr", and with PLDR-LLMs as "hf".

Releases of the harness that read the entry points of other packages know "pldr" by themselves: `lm_eval --model pldr`.
"""

import lm_eval.models  # noqa: F401 (registers the harness's own models, which it does only where there are none yet)
from lm_eval.api.registry import model_registry

from pldr.evaluation.harness import PldrLM

if "pldr" not in model_registry:
    model_registry.register("pldr", target=PldrLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
