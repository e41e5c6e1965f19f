"""Linear layers with weights of 8 bits, for decoding on a CPU, which waits for the memory that weights come from.

Weights alone are quantised, one scale a row, the row's largest weight to 127: a scale of activations would be one of the
whole batch. torch multiplies them with activations in bfloat16.
"""

from typing import NamedTuple, cast

import torch

from pldr.ops.decoding.reference import Linear


class Int8Linear(NamedTuple):
    """weight [features, inputs] (int8) times scale [features] (bfloat16), and bias [features]. Called like `Linear`."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.scale)
        return product.to(self.bias.dtype) + self.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is called with; it is rounded inside, so that residuals keep their digits."""
        return self.bias.dtype


def quantized(linear: Linear) -> Linear:
    """The nearest weights of 8 bits, to one scale a row: an `Int8Linear`, in the place of a `Linear`.

    Raises:
        ValueError: the number of inputs is no multiple of 32: torch's product would read past the weights.
    """
    if linear.weight.shape[1] % 32:
        raise ValueError(f"quantize: a product of {linear.weight.shape[1]} inputs; they must be a multiple of 32")
    scale = (linear.weight.abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    weight = (linear.weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return cast(Linear, Int8Linear(weight, scale, linear.bias))
