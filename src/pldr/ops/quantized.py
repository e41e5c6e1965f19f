"""Linear layers with weights of 8 bits, for decoding on a CPU, which waits for the memory that weights come from.

Weights have one scale a row, the row's largest to 127. There are two products. fbgemm's, which torch has on x86, is the faster
one and wants inputs in 8 bits, too: they are rounded with one scale a sequence, so that a sequence does not depend on those
beside it. The other takes inputs in bfloat16.
"""

import warnings
from typing import Any, NamedTuple, cast

import torch

from pldr.ops.decoding.reference import Linear

# Of inputs, each way. On processors without VNNI fbgemm adds two products in 16 bits, which hold 2 · 127 · 127 and not twice as much.
_LEVELS = 63


class Int8Linear(NamedTuple):
    """Weights packed for fbgemm, and bias [features]. Called like `Linear`."""

    packed: Any
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp(min=1e-20)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            wide / largest, 1 / _LEVELS, _LEVELS + 1, self.packed
        )
        return torch.addcmul(self.bias, product, largest).to(self.bias.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is called with; it is rounded inside, so that residuals keep their digits."""
        return self.bias.dtype


class Int8WeightLinear(NamedTuple):
    """weight [features, inputs] (int8) times scale [features] (bfloat16), and bias [features]. Called like `Linear`."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.scale)
        return product.to(self.bias.dtype) + self.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is called with."""
        return self.bias.dtype


def quantized(linear: Linear, *, outliers: bool = False) -> Linear:
    """The nearest weights of 8 bits, to one scale a row, in the place of a `Linear`.

    Args:
        linear: to be multiplied on a CPU.
        outliers: a few of its inputs are far larger than the others, as those that a gated unit made: they stay in bfloat16.

    Raises:
        ValueError: the number of inputs is no multiple of 32: torch's product would read past the weights.
    """
    features, inputs = linear.weight.shape
    if inputs % 32:
        raise ValueError(f"quantize: a product of {inputs} inputs; they must be a multiple of 32")
    scale = (linear.weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    packed = "fbgemm" in torch.backends.quantized.supported_engines and not outliers
    scale = scale if packed else scale.to(torch.bfloat16)
    weight = (linear.weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    if not packed:
        return cast(Linear, Int8WeightLinear(weight, scale, linear.bias))
    with warnings.catch_warnings():  # torch means to drop the type of tensor that its packing takes
        warnings.filterwarnings("ignore", message=".*quantize_per_tensor.*deprecated")
        zeros = torch.zeros(features, dtype=torch.int64)
        per_row = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
    return cast(Linear, Int8Linear(torch.ops.quantized.linear_prepack(per_row, None), linear.bias))
