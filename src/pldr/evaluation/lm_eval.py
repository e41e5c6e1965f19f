"""`python -m pldr.lm_eval`: lm-evaluation-harness's own command, which then knows the model "pldr" and PLDR-LLMs as "hf".

The harness finds both by itself too (`lm_eval --model pldr`): releases with plugins through this package's entry point,
earlier ones through `pldr_lm_eval.pth`, which imports this module where the command is `lm_eval` with a model.
"""

import pldr.evaluation.harness  # noqa: F401 (registers the model)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
