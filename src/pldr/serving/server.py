"""`pldr serve`: which server runs, and the embedded one from its socket to its last answer."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from pldr.checkpoints.certificate import certificate_to_serve, refuse_learned
from pldr.checkpoints.hub import local_path
from pldr.checkpoints.info import model_facts
from pldr.checkpoints.load import load_with_tokenizer
from pldr.engine import Engine
from pldr.files import read_json, require
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import STORIES
from pldr.serving.logs import log_to_standard_error
from pldr.serving.sockets import bound

BACKENDS = ("auto", "engine", "vllm")
# Texts in a batch on a CPU.
_CPU_BATCH = 32


def serve(
    model: str | os.PathLike[str] | None = None,
    vllm_arguments: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: str = "auto",
    api_key: str | None = None,
    served_name: str | None = None,
    require_certificate: bool = False,
    allow_origin: Sequence[str] = (),
    max_batch: int | None = None,
    max_length: int | None = None,
    max_queue: int = 256,
    max_tokens: int | None = None,
    max_body: int = 1 << 20,
    request_timeout: float = 300.0,
    shutdown_timeout: float = 30.0,
    log_prompts: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    rope: str | None = None,
    g_lm: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's interface has it, until it is told to stop.

    SIGTERM and Ctrl-C let accepted requests come to their end, within `shutdown_timeout`.

    Args:
        model: see `pldr.load_model`; the one that ships with pldr by default.
        vllm_arguments: further arguments of ``vllm serve``.
        host, port: where to listen; port 0 takes a free one, which the log names.
        backend: "vllm" for vLLM's server, "engine" for the one in pldr; "auto" takes vLLM where it is installed and can
            serve the model: not with a learned operator or quantised weights, nor in the reference layout.
        api_key: that clients must show; the environment's PLDR_API_KEY by default, and none where that is not set.
        served_name: as clients call the model; its folder's name by default.
        require_certificate: refuse a model without a certificate, rather than warn.
        allow_origin: of web pages that may use the server from a browser; none by default.
        max_batch, max_length, quantize: see `pldr.Engine`; of the batch, 32 on a CPU by default.
        max_queue: texts that may wait for a place in the batch; others are sent away with 503.
        max_tokens: new tokens of a text, at most; as many as the context holds by default.
        max_body: bytes of a request.
        request_timeout: seconds that a request may take, from its arrival to its end.
        shutdown_timeout: seconds after which requests that still run are cancelled.
        log_prompts: write prompts and texts into the log, too.
        tokenizer, rope, g_lm, device, dtype: see `pldr.load_model`.

    Raises:
        ValueError, OSError: a setting outside its range, a model that can not be loaded or has no certificate where
            one is required, a port that is taken.
        ModuleNotFoundError: the extra is not installed.
    """
    asked = Path(STORIES if model is None else model)
    api_key = os.environ.get("PLDR_API_KEY") if api_key is None else api_key
    _check(backend, api_key, port, max_queue, max_tokens, max_body, request_timeout, shutdown_timeout)
    may_be_vllm = backend == "vllm" or (backend == "auto" and find_spec("vllm") is not None)
    require(*(("serve", "vllm") if may_be_vllm else ("serve-light", "fastapi", "uvicorn", "prometheus_client")))
    log_to_standard_error()
    listening = bound(host, port)
    place = local_path(asked)
    loaded, text_tokenizer = load_with_tokenizer(place, tokenizer, device=device, rope=rope, g_lm=g_lm)
    operator, name = loaded.config.operator, served_name or asked.absolute().name
    to_vllm = backend == "vllm" or (may_be_vllm and not only_engine(place, operator))
    if to_vllm:
        refuse_learned(place, operator)
        if only_engine(place, operator):
            raise ValueError(
                f"{place}: vLLM reads no quantised weights of ours, nor the reference layout; use --backend engine"
            )
        _one_server_only("engine", max_tokens=max_tokens, tokenizer=tokenizer, rope=rope, g_lm=g_lm, device=device,
                         quantize=quantize, log_prompts=log_prompts, allow_origin=allow_origin, max_queue=max_queue,
                         max_body=max_body, request_timeout=request_timeout, shutdown_timeout=shutdown_timeout)  # fmt: skip
    else:
        _one_server_only("vllm", vllm_arguments=vllm_arguments)
    certificate = None
    if require_certificate or not to_vllm:  # else the plugin warns
        certificate = certificate_to_serve(place, operator, loaded.state_dict(), required=require_certificate)
    if to_vllm:
        listening.close()
        # vLLM's own "auto" would round float32 to bf16.
        stored = str(loaded.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        options = {"host": host, "port": port, "served-model-name": name, "dtype": stored, "max-num-seqs": max_batch,
                   "max-model-len": max_length}  # fmt: skip
        serve_with_vllm(place, options, vllm_arguments, api_key)
    loaded, text_tokenizer = load_with_tokenizer(loaded, text_tokenizer, dtype=dtype)
    from pldr.serving.app import Limits, Service, make_app
    from pldr.serving.run import run

    if max_batch is None and loaded.device.type == "cpu":
        max_batch = _CPU_BATCH
    engine = Engine(loaded, text_tokenizer, max_batch=max_batch, max_length=max_length, quantize=quantize)
    facts = {"model": name} | operator_facts(loaded, certificate)
    service = Service(name, engine, facts, Limits(max_queue, max_tokens, max_body, request_timeout), log_prompts)
    run(service, make_app(service, api_key=api_key, origins=allow_origin), listening, shutdown_timeout)


def _check(
    backend: str, api_key: str | None, port: int, queue: int, tokens: int | None, body: int, seconds: float, stop: float
) -> None:
    """Raises ValueError: a setting outside its range."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip() != ""):
        raise ValueError(
            "api_key: must be printable ASCII, not empty, and without spaces at its ends; leave it out (and PLDR_API_KEY) for none"
        )
    if not 0 <= port <= 65535:
        raise ValueError(f"port: must be between 0 and 65535, got {port}")
    for name, value, least in (
        ("max_queue", queue, 0), ("max_tokens", tokens, 1), ("max_body", body, 1), ("request_timeout", seconds, 0.1),
        ("shutdown_timeout", stop, 0),
    ):  # fmt: skip
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{name}: must be at least {least} and finite, got {value}")


def _one_server_only(which: str, **settings: Any) -> None:
    """Raises ValueError: settings of one server that are not as they are by default, and the other is to run."""
    defaults = signature(serve).parameters
    given = [name for name, value in settings.items() if value not in (None, [], defaults[name].default)]
    if given:
        raise ValueError(f"{', '.join(given)}: only with --backend {which}")


def only_engine(model: Path, operator: str) -> bool:
    """Whether vLLM could not serve a model: one with a learned operator or quantised weights, or in the reference layout."""
    config = model / "config.json"
    return operator == "learned" or not config.is_file() or "quantization_config" in read_json(config)


def operator_facts(model: PldrForCausalLM, certificate: dict[str, Any] | None) -> dict[str, Any]:
    """What `/v1/pldr/operator` tells: kind, where G_LM comes from, ranks, certificate, and bytes of the caches."""
    facts, config = model_facts(model), model.config
    return {
        "operator": config.operator,
        "g_lm": "of each request's own prompt, kept with it" if config.operator == "learned" else "constant",
        "ranks": config.operator_ranks,
        "certificate": certificate,
        **{name: facts[name] for name in ("dtype", "kv_cache_bytes_per_token", "g_cache_bytes_per_sequence")},
    }


# --- vLLM's ---------------------------------------------------------------------------------------------------------


def serve_with_vllm(
    model: Path, options: dict[str, Any], arguments: Sequence[str] = (), api_key: str | None = None
) -> NoReturn:
    """Become vLLM's server, which finds the model's class by our entry point.

    Args:
        model: folder with a config.json.
        options: of ``vllm serve``, by name; None is left to vLLM.
        arguments: further ones, as they stand.
        api_key: handed on in the environment, where no list of processes shows it.
    """
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = api_key
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *given, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


# --- our own --------------------------------------------------------------------------------------------------------
