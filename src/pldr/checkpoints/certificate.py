"""Certificates of frozen models: what was measured and on which weights, with a checksum that shows changes.

The checksum proves nothing about who wrote a certificate.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from pldr.files import one_line, read_json, write_json

FILE = "certificate.json"


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


def write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    """Write a certificate beside a model, with its checksum."""
    write_json(folder / FILE, with_checksum(certificate), indent=1)


def read_certificate(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The certificate beside a model, or None where there is none.

    Raises:
        ValueError: it is damaged, or was changed after it was written.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        certificate = read_json(file)
        if certificate != with_checksum(certificate):
            raise ValueError("its contents do not match its checksum")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a valid certificate ({one_line(error)}); certify the model again") from None
    return certificate


def warn_unless_certified_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Say so where a model's weights are no longer those that its certificate is about."""
    try:
        certificate = read_certificate(folder)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=3)
        return
    if certificate is not None and certificate.get("frozen_weights") != weights_digest(tensors):
        warnings.warn(
            f"{folder}: the weights are not those of {FILE}, so that it says nothing about them; certify them again",
            stacklevel=3,
        )
