"""Weight-only int8: linear layers keep one byte per weight and one scale per output channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert
from sana.quant.layer import QuantisedLinear
from sana.quant.rows import quantise_rows


class Int8WeightLinear(QuantisedLinear):
    """A linear layer with symmetric int8 weights; activations and arithmetic stay in the dtype of the input.

    Attributes:
        weight: (out, in) int8, see `quantise_rows`.
        scale: (out, 1) float32.
    """

    kind: ClassVar[str] = "int8_weight"
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None):
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, device=device))

    def quantise(self, weight: Tensor) -> None:
        """Round to nearest."""
        codes, scale = quantise_rows(weight)
        self.weight.copy_(codes)
        self.scale.copy_(scale)

    def dequantise(self) -> Tensor:
        """(out, in) float32."""
        return self.weight.float() * self.scale

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # Scaled before the product: in float16 the sums of unscaled integers could overflow.
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """In the dtype of the activations, by design."""
        return "weights are dequantised for each product: less memory, not less time"


def int8_weight(module: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()) -> nn.Module:
    """Replace linear layers by `Int8WeightLinear`, for inference: rounding to nearest, without calibration.

    Args:
        module: any module; changed in place.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.

    Raises:
        ValueError: as `convert`.
    """
    return convert(
        module,
        lambda _, linear: Int8WeightLinear.from_linear(linear),
        kind=Int8WeightLinear.kind,
        include=include,
        exclude=exclude,
    )
