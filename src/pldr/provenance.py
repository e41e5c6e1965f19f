"""Where weights come from: digests of them and of their certificate, and the model card that goes with them to the hub."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from pldr.configuration_pldr import PldrConfig
from pldr.files import read_json, to_json

_GENERATED = (
    "This model card has been automatically generated"  # as transformers says in its own, which has nothing else
)
_OPERATORS = {
    "learned": "learned: a metric learner computes G_LM from the prompt. `pldr certify` measures whether a constant can take its place.",
    "constant": "constant: one stored G_LM a head, in place of a metric learner.",
    "factored": "factored: a constant G_LM of low rank, so that keys are cached in fewer dimensions, by layer: {ranks}.",
}
_USE = """```python
import pldr

model, tokenizer = pldr.load_model("{name}"), pldr.load_tokenizer("{name}")
print(pldr.generate_text(model, tokenizer, "Once upon a time").text)
```

`pip install pldr`; on the command line `pldr generate {name} "Once upon a time"`, and `pldr serve {name}`. After `import pldr`,
transformers' Auto classes load it, too."""


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of their names.

    It does not depend on how they are spread over files.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_checksum(certificate: dict[str, Any]) -> dict[str, Any]:
    """The certificate with the SHA-256 of everything else in it, under "sha256".

    Raises:
        ValueError: a number in it is infinite or NaN.
    """
    body = {key: value for key, value in certificate.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return body | {"sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}


def add_card(
    folder: Path, name: str, config: PldrConfig, tensors: dict[str, torch.Tensor], source: Path | None
) -> None:
    """Give a folder that is to go to the hub its card, unless it has one that somebody wrote; and the certificate.

    Args:
        folder: of the saved model, with a README.md.
        name: on the hub, OWNER/NAME.
        config, tensors: of the model.
        source: the folder that the model was loaded from, if any. The certificate there, if it is about these weights, goes along;
            of a training run, the recipe of the newest checkpoint goes into the card.

    Raises:
        ValueError: the certificate or the recipe there is damaged.
    """
    certificate = None if source is None else _certificate(source / "certificate.json", tensors)
    if source is not None and certificate is not None:
        shutil.copy(source / "certificate.json", folder)
    if _GENERATED in (folder / "README.md").read_text(encoding="utf-8"):
        parameters = sum(tensor.numel() for tensor in tensors.values())
        card = ModelCard(_card(name, config, parameters, certificate, None if source is None else _recipe(source)))
        card.save(folder / "README.md")


def _certificate(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """A certificate that is there, is as it was written, and is about these weights."""
    found: dict[str, Any] | None = read_json(file, {"frozen_weights": str}) if file.is_file() else None
    if found is not None and found != with_checksum(found):
        raise ValueError(f"{file}: its contents do not match its checksum; certify the model again, or remove it")
    return None if found is None or found["frozen_weights"] != weights_digest(tensors) else found


def _recipe(run: Path) -> dict[str, Any] | None:
    newest = max(
        run.glob("checkpoint-*/recipe.json"), key=lambda file: int(file.parent.name.split("-")[1]), default=None
    )
    return None if newest is None else _without_folders(read_json(newest))


def _without_folders(value: Any) -> Any:
    """Files by their names alone: where they lie on somebody's machine is not for everybody."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _card(
    name: str, config: PldrConfig, parameters: int, certificate: dict[str, Any] | None, recipe: dict[str, Any] | None
) -> str:
    data = ModelCardData(library_name="pldr", pipeline_tag="text-generation", tags=["pldr-llm", config.operator])
    ranks = ", ".join(map(str, config.operator_ranks or []))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"A PLDR-LLM ([arXiv 2502.13502](https://arxiv.org/abs/2502.13502)) of {parameters:,} parameters: "
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"feed-forward {config.intermediate_size}, context {config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}.",
        "## Use",
        _USE.format(name=name),
        "## Operator",
        _OPERATORS[config.operator].format(ranks=ranks),
        "## Certificate",
        "None is about these weights." if certificate is None else _verdict(certificate),
        "## Recipe",
        "Not known." if recipe is None else f"```json\n{to_json(recipe, indent=1)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(certificate: dict[str, Any]) -> str:
    report = certificate["report"]
    verdict = "certified" if report["certified"] else f"not certified: {'; '.join(report['reasons'])}"
    rows = [
        f"| {mode} | {found['loss_difference']:+.2e} | {found['kl_mean']:.2e} | {found['agreement']:.2%} |"
        for mode, found in report["modes"].items()
    ]
    return "\n".join([
        f"`certificate.json`: **{verdict}**, on {report['passages']:,} passages ({report['tokens']:,} tokens), against the "
        f"model before, whose loss is {report['loss']:.4f} nats per token.",
        "",
        "| | loss difference, nats per token | KL divergence, mean | same greedy token |",
        "| --- | --- | --- | --- |",
        *rows,
    ])  # fmt: skip
