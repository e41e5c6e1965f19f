"""`python -m pldr.evaluation.lm_eval`: lm-evaluation-harness's own command, which then knows "pldr", and PLDR-LLMs as "hf".

Releases of the harness that read the entry points of other packages know "pldr" by themselves: `lm_eval --model pldr`.
"""

import lm_eval.models  # noqa: F401 (the harness registers its own models only where there are none yet: they come first)
from lm_eval.api.registry import model_registry

from pldr.evaluation.harness import PldrLM

if "pldr" not in model_registry:
    model_registry.register("pldr", target=PldrLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
