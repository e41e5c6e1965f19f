"""Weights of 8 or 4 bits in files, in the form of torchao: read as data, without torchao, and as the numbers that they stand for.

In a file, a weight [N, K] that was quantised is several plain tensors, and its kind stands in the safetensors file's metadata as
JSON. Its values are (q - zero) · scale, with one scale a group of g inputs; of 4 bits two a byte, the even one in the lower half,
and there q · scale + zero.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pldr.configuration_pldr import DTYPES
from pldr.files import check_shape, one_line, parse_json

# The one kind of `quantization_config` that is read.
METHOD = "torchao"
# The metadata's list of all tensors.
NAMES = "tensor_names"
_PLAIN = "Tensor"
_DTYPE = {"_type": "torch.dtype", "_data": str}


def expanded(stored: dict[str, torch.Tensor], metadata: Mapping[str, str], where: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file with quantised weights as plain ones.

    Args:
        stored: as the file holds them.
        metadata: of the file.
        where: the file, for errors.

    Returns:
        By the model's names, quantised weights in the dtype that they were quantised from.

    Raises:
        ValueError: another kind of tensor, or parts that do not fit each other.
    """
    rest, found = dict(stored), {}
    names = parse_json(metadata.get(NAMES, "null"), f"{where}: {NAMES}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: its metadata names no quantised tensors")
    for name in names:
        try:
            kind = parse_json(metadata.get(name, "null"), "its kind")
            check_shape(kind, {"_type": str})
            if kind["_type"] == _PLAIN:
                continue
            found[name] = _expanded(kind, _parts(name, kind, rest))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{where}: tensor {name} is not a weight that is read ({one_line(error)})") from None
    return rest | found


def _parts(name: str, kind: dict[str, Any], rest: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a weight is made of, by their own names; they are taken out of `rest`."""
    check_shape(kind, {"_data": {}, "_tensor_data_names": [str]})
    module, _, weight = name.rpartition(".")
    return {part: rest.pop(f"{module}._{weight}_{part}") for part in kind["_tensor_data_names"]}


def _expanded(kind: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight [N, K]."""
    read = _READERS.get(kind["_type"])
    if read is None:
        raise ValueError(f"its type is {kind['_type']}; those that are read are {', '.join(_READERS)}")
    fields = kind["_data"]
    more = [field for field in ("act_quant_kwargs", "activation_quantization") if fields.get(field) is not None]
    if more or not set(parts) <= {"qdata", "scale", "zero_point"}:
        raise ValueError("it also says how inputs are quantised")
    check_shape(fields, {"block_size": [int]})
    return read(fields, parts)


def _of_whole_bytes(
    dtypes: tuple[torch.dtype, ...],
) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], torch.Tensor]:
    def read(fields: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
        check_shape(fields, {"dtype": _DTYPE})
        q, scale, zero = parts["qdata"], parts["scale"], parts.get("zero_point")
        if q.dtype not in dtypes or fields["dtype"]["_data"] not in DTYPES:
            raise ValueError(f"its values are {q.dtype}, and stand for {fields['dtype']['_data']}")
        groups = _groups(q, fields["block_size"], scale, zero)
        values = groups.float() if zero is None else groups.float() - zero.float()[..., None]
        return (values * scale.float()[..., None]).reshape(q.shape).to(getattr(torch, fields["dtype"]["_data"]))

    return read


def _of_half_bytes(fields: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
    packed, scale, zero = (parts[name] for name in ("qdata", "scale", "zero_point"))
    if packed.dtype != torch.int8 or packed.dim() != 2:
        raise ValueError(f"its values are {packed.dtype} of {packed.dim()} dimensions")
    # Shifted up and down again, the lower half keeps its sign.
    q = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(1)
    groups = _groups(q, fields["block_size"], scale.T, zero.T)
    return (groups * scale.T.float()[..., None] + zero.T.float()[..., None]).reshape(q.shape).to(scale.dtype)


_READERS = {
    "Int8Tensor": _of_whole_bytes((torch.int8,)),
    "IntxUnpackedToInt8Tensor": _of_whole_bytes((torch.int8,)),
    "Float8Tensor": _of_whole_bytes((torch.float8_e4m3fn, torch.float8_e5m2)),
    "Int4Tensor": _of_half_bytes,
}


def _groups(q: torch.Tensor, block: list[int], *per_group: torch.Tensor | None) -> torch.Tensor:
    """q [N, K] as [N, K / g, g], where there is one number of each kind for a group.

    Raises:
        ValueError: there is not.
    """
    if q.dim() != 2 or len(block) != 2 or block[0] != 1 or block[1] < 1 or q.shape[1] % block[1]:
        raise ValueError(f"groups of {block} in {tuple(q.shape)}")
    groups = q.unflatten(1, (-1, block[1]))
    for numbers in per_group:
        if numbers is not None and numbers.shape != groups.shape[:2]:
            raise ValueError(f"{tuple(numbers.shape)} scales of {tuple(groups.shape[:2])} groups")
    return groups


def packed_in_four_bits(weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """The parts of a weight [N, K] in 4 bits: of each group the smallest is -8 and the largest 7; K is a multiple of `group`.

    Returns:
        qdata [N, K / 2] int8; scale and zero_point [K / group, N] in the weight's dtype.
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    # Rounded first, so that values are the nearest ones that can be written.
    scale = ((high - low) / 15).clamp(min=1e-6).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1)
    return {
        "qdata": (q[:, ::2] & 15) | (q[:, 1::2] << 4),
        "scale": scale.T.contiguous(),
        "zero_point": zero.T.contiguous(),
    }
