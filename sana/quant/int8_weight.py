"""Weight-only int8: linear layers keep one byte per weight and one scale per output channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert_to
from sana.quant.layer import RowScaledLinear
from sana.quant.rows import quantise_rows


class Int8WeightLinear(RowScaledLinear):
    """A linear layer with symmetric int8 weights; activations and arithmetic stay in the dtype of the input."""

    kind: ClassVar[str] = "int8_weight"
    dtype: ClassVar[torch.dtype] = torch.int8
    round_rows = staticmethod(quantise_rows)

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
    return convert_to(Int8WeightLinear, module, include, exclude)
