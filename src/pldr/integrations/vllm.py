"""The plugin by which vLLM serves PLDR-LLMs, from this library's layout and the hub's: entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. The model is in `vllm_model.py`, which is imported where one is served.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Of this library's layout, and of the hub's.
ARCHITECTURES = ("PldrForCausalLM", "PldrllmForCausalLM")
# Environment variable: with "1" no model is served without a certificate about its weights.
REQUIRE_CERTIFICATE = "PLDR_REQUIRE_CERTIFICATE"


def register() -> None:
    """Make vLLM know the configuration, the model, and what to refuse. Running it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import pldr.modeling_pldr  # noqa: F401 (registers with transformers' Auto classes)

    class Checks(VerifyAndUpdateConfig):
        verify_and_update_model_config = staticmethod(check_model)

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "pldr.integrations.vllm_model:PldrForVllm")
        MODELS_CONFIG_MAP[architecture] = Checks


def check_model(model_config: "ModelConfig") -> None:
    """Called by vLLM once, in the process that the user started, before any other begins.

    Warns:
        UserWarning: a model without a certificate about its weights.

    Raises:
        ValueError: the operator is learned; or `PLDR_REQUIRE_CERTIFICATE` is set, and the model has no certificate that is
            about its weights; or the folder holds no whole model (see `pldr.load_model`).
    """
    from pathlib import Path

    from pldr.checkpoints.certificate import certificate_to_serve, refuse_learned
    from pldr.checkpoints.load import read_folder
    from pldr.configuration_pldr import PldrConfig

    folder, config = model_config.model, model_config.hf_config
    if not isinstance(config, PldrConfig):
        raise ValueError(f"{folder}: its own code is not run; leave out --trust-remote-code")
    refuse_learned(folder, config.operator)
    tensors = read_folder(Path(folder))[1] if Path(folder).is_dir() else None
    certificate_to_serve(folder, config.operator, tensors, required=os.environ.get(REQUIRE_CERTIFICATE) == "1")
