"""The plugin by which vLLM serves PLDR-LLMs, from this library's layout and the hub's: entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. The model is in `vllm_model.py`, which only those import that run it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pldr.checkpoints.certificate import certificate_to_serve, refuse_learned
from pldr.checkpoints.load import read_folder
from pldr.configuration_pldr import PldrConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Of this library's layout, and of the hub's.
ARCHITECTURES = ("PldrForCausalLM", "PldrllmForCausalLM")
# Environment variable: where it is "1", a model without a certificate about its weights is not served.
REQUIRE_CERTIFICATE = "PLDR_REQUIRE_CERTIFICATE"


def register() -> None:
    """Make vLLM know the configuration, the model, and what to refuse. Running it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Checks(VerifyAndUpdateConfig):
        verify_and_update_model_config = staticmethod(check_model)

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "pldr.integrations.vllm_model:PldrForVllm")
        MODELS_CONFIG_MAP[architecture] = Checks


def check_model(model_config: "ModelConfig") -> None:
    """Called by vLLM in the process that the user started, before there are others; warns where there is no certificate.

    Raises:
        ValueError: a learned operator, or quantised weights; a folder that holds no whole model (see `pldr.load_model`); or
            `PLDR_REQUIRE_CERTIFICATE` is set, and there is no certificate about the weights.
    """
    model, config = model_config.model, model_config.hf_config
    if not isinstance(config, PldrConfig):
        raise ValueError(f"{model}: code that comes with a model is not run; leave out --trust-remote-code")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model}: has quantised weights, which were not tried in vLLM; serve it with pldr serve {model} --backend engine, or "
            "the model that it was made of"
        )
    refuse_learned(model, config.operator)
    tensors = read_folder(Path(model))[1] if Path(model).is_dir() else None  # else it is a name on the hub
    certificate_to_serve(model, config.operator, tensors, required=os.environ.get(REQUIRE_CERTIFICATE) == "1")
