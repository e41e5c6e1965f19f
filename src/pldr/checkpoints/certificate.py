"""Certificates of frozen and factored models: what was measured and on which weights, with a checksum that shows changes.

The checksum proves nothing about who wrote a certificate.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from pldr.files import check_shape, one_line, read_json, write_json
from pldr.provenance import weights_digest, with_checksum

FILE = "certificate.json"
# Of a frozen model, of one with a factored operator, and of quantised weights.
KIND, FACTORED_KIND, QUANTIZED_KIND = (f"pldr {kind}certificate 1" for kind in ("", "factored ", "quantized "))

# What a certificate says, as `pldr.study.certify` writes it; see `pldr.files.check_shape`.
_CHANGE = {"kl_mean": float, "agreement": float, "logit_difference": float}
_COMPARISON = _CHANGE | {"loss_difference": float, "loss_interval": [float], "kl_99": float, "kl_max": float}
_BASE_REPORT = {
    "passages": int,
    "tokens": int,
    "loss": float,
    "thresholds": {"loss": float, "agreement": float},
    "reasons": [str],
    "certified": bool,
}
_REPORT = _BASE_REPORT | {
    "modes": {"cached": _COMPARISON, "frozen": _COMPARISON},
    "variation": [float],
    "calibration": {"loss_difference": [float], "spread": float},
    "causality": {"learned": _CHANGE, "frozen": _CHANGE},
}
_FACTORED_REPORT = _BASE_REPORT | {
    "modes": {"factored": _COMPARISON},
    "against": str,
    "ranks": [int],
    "head_ranks": [[int]],
}
_QUANTIZED_REPORT = _BASE_REPORT | {"modes": {"quantized": _COMPARISON}, "weights": str}
_CERTIFICATE = {
    "kind": KIND,
    **dict.fromkeys(("model", "weights", "frozen_weights", "device", "date", "dtype"), str),
    "data": {},
    "versions": {},
    "report": _REPORT,
}
# By kind. That of quantised weights holds the one of the model that they were made of, or nothing.
_CERTIFICATES = {
    KIND: _CERTIFICATE,
    FACTORED_KIND: _CERTIFICATE | {"kind": FACTORED_KIND, "report": _FACTORED_REPORT},
    QUANTIZED_KIND: _CERTIFICATE | {"kind": QUANTIZED_KIND, "report": _QUANTIZED_REPORT, "source": {}},
}


def write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    """Write a certificate beside a model, with its checksum."""
    write_json(folder / FILE, with_checksum(certificate), indent=1)


def read_certificate(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The certificate beside a model, or None where there is none.

    Raises:
        ValueError: it is damaged, was changed after it was written, or does not say what a certificate says.
    """
    file = Path(folder) / FILE
    if not os.path.lexists(file):
        return None
    try:
        certificate = read_json(file)
        if certificate != with_checksum(certificate):
            raise ValueError("its contents do not match its checksum")
        kind = certificate.get("kind")
        check_shape(certificate, _CERTIFICATES.get(kind, _CERTIFICATE) if isinstance(kind, str) else _CERTIFICATE)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a valid certificate ({one_line(error)}); certify the model again") from None
    return certificate


def is_about(certificate: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are the weights that a certificate is about."""
    return bool(certificate["frozen_weights"] == weights_digest(tensors))


def warn_unless_certified_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Say so where a model's weights are no longer those that its certificate is about."""
    try:
        certificate = read_certificate(folder)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=4)
        return
    if certificate is not None and not is_about(certificate, tensors):
        warnings.warn(
            f"{folder}: the weights are not those of {FILE}, so that it says nothing about them; certify them again",
            stacklevel=4,
        )


def certificate_to_serve(
    folder: str | os.PathLike[str],
    operator: str,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    required: bool = False,
) -> dict[str, Any] | None:
    """The certificate that a model is served with, or None, with a warning that says why there is none.

    Args:
        folder: of the model.
        operator: its kind. A learned one has no certificate: what is certified is a frozen or factored form.
        tensors: the weights, where they are at hand as they are stored, to compare with those that it is about.
        required: refuse, rather than warn.

    Raises:
        ValueError: `required`, and there is no certificate, it is damaged, or it is about other weights.
    """
    problem, certificate = None, None
    if operator == "learned":
        problem = f"{folder}: has a learned operator, which no certificate is about; {_to_certify(folder)}"
    else:
        try:
            certificate = read_certificate(folder)
        except ValueError as error:
            problem = str(error)
        else:
            if certificate is None:
                problem = f"{folder}: has no certificate that its operator is one to trust; {_to_certify('ITS-SOURCE')}"
            elif tensors is not None and not is_about(certificate, tensors):
                problem = f"{folder}: its certificate is about other weights; {_to_certify('ITS-SOURCE')}"
            elif certificate["kind"] == QUANTIZED_KIND:
                problem = _against_quantized(folder, certificate)
    if problem is None:
        return certificate
    if required:
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=2)
    return None


def _against_quantized(folder: str | os.PathLike[str], certificate: dict[str, Any]) -> str | None:
    if certificate["report"]["certified"] is not True:
        return f"{folder}: its certificate says that quantisation changes too much: {'; '.join(certificate['report']['reasons'])}"
    if not certificate["source"]:
        return (
            f"{folder}: its certificate is about the quantisation alone, not about the operator; "
            f"{_to_certify('ITS-SOURCE')}, to quantise then"
        )
    return None


def refuse_learned(folder: str | os.PathLike[str], operator: str) -> None:
    """For servers that mix the tokens of several texts in one step.

    Raises:
        ValueError: the operator is learned: its G_LM would come from whatever tokens a step holds.
    """
    if operator == "learned":
        raise ValueError(
            f"{folder}: has a learned operator, whose G_LM would come from whatever tokens a step of this server holds; "
            f"{_to_certify(folder)}, and serve that, or freeze it unmeasured with pldr freeze; or serve it as it is "
            f"with pldr serve {folder} --backend engine"
        )


def _to_certify(folder: str | os.PathLike[str]) -> str:
    return f"pldr certify {folder} HELD-OUT-TEXT --output CERTIFIED measures it, and writes a form that is certified"
