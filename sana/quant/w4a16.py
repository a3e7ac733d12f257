"""W4A16: 4-bit weights with a scale per group of inputs; activations keep their 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert_to
from sana.quant.int4 import dequantise_groups, pack_codes, quantise_groups, unpack_codes
from sana.quant.layer import QuantisedLinear

LEVELS = 7.5
"""Half the range of 4 bits: nothing is further than about half a step from its code, -8 to 7."""


class W4A16Linear(QuantisedLinear):
    """A linear layer with symmetric 4-bit weights, dequantised for each product: an eighth of fp32's memory.

    In a group of inputs of one output channel, ``scale = max |W| / 7.5`` rounded to bf16, and
    ``code = round(W / scale)`` in -8 ... 7; a group of zeros has scale 1.

    Attributes:
        weight: (out, k / 2) uint8, two codes + 8 per byte, k the inputs filled up to a multiple of the group.
        scale: (out, k / group) bfloat16.
        group: inputs that share a scale.
    """

    kind: ClassVar[str] = "w4a16"
    weight: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None, group: int = 64
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        if group < 2 or group % 2:
            raise ValueError(f"w4a16: group={group} must be an even number of inputs, such as 64 or 128")
        self.group, groups = group, -(-in_features // group)
        self.register_buffer("weight", torch.empty(out_features, groups * group // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.bfloat16, device=device))

    def settings(self) -> dict[str, Any]:
        """For `empty`."""
        return {"group": self.group}

    def quantise(self, weight: Tensor) -> None:
        """Round to nearest."""
        codes, scale = quantise_groups(weight, self.group, LEVELS)
        self.weight.copy_(pack_codes(codes))
        self.scale.copy_(scale)

    def dequantise(self) -> Tensor:
        """(out, in) float32."""
        return dequantise_groups(unpack_codes(self.weight), self.scale)[:, : self.in_features]

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.dequantise().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """In the dtype of the activations, by design."""
        return "weights are dequantised for each product: less memory, not less time"


def w4a16(
    module: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), group: int = 64
) -> nn.Module:
    """Replace linear layers by `W4A16Linear`, for inference: rounding to nearest, without calibration.

    Args:
        module: any module; changed in place.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.
        group: inputs that share a scale; even, 64 or 128 in published models.

    Raises:
        ValueError: as `convert`, or on an odd group.
    """
    return convert_to(W4A16Linear, module, include, exclude, group=group)
