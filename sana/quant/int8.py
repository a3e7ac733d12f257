"""W8A8: products of int8 weights and int8 activations, with a scale per output channel and per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert_to
from sana.quant.hadamard import block_of, hadamard, rotate_blocks
from sana.quant.int8_weight import Int8WeightLinear
from sana.quant.rows import quantise_rows

CHUNK = 512
"""Tokens at a time on CPUs: what lies between the steps of a product stays in the cache."""


class Int8Linear(Int8WeightLinear):
    """y[m, o] = s_x[m] s_w[o] sum_k X[m, k] W[o, k] + b[o], the sum of int8 products in int32.

    X are the tokens, rounded as they come (`quantise_rows`); the weight is stored as in `Int8WeightLinear`. Scales and
    bias are applied in fp32. The recipe of SANA's on-device section (arXiv:2410.10629, section 4).

    Attributes:
        rotate: channels that are rotated together, weights once and tokens as they come (`sana.quant.hadamard`);
            0 or 1: none.
    """

    kind: ClassVar[str] = "int8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        rotate: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.rotate = block_of(rotate, in_features)

    def settings(self) -> dict[str, Any]:
        """For `empty`."""
        return {"rotate": self.rotate}

    def quantise(self, weight: Tensor) -> None:
        """Round to nearest, after the rotation."""
        super().quantise(rotate_blocks(weight, hadamard(self.rotate, weight.device)))

    def dequantise(self) -> Tensor:
        """(out, in) float32, for tokens that are not rotated."""
        weight = super().dequantise()
        return rotate_blocks(weight, hadamard(self.rotate, weight.device))

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows, rotation = x.reshape(-1, self.in_features), hadamard(self.rotate, x.device)
        if x.device.type != "cpu" or len(rows) <= CHUNK:
            y = self._rows(rows, rotation)
        else:
            y = x.new_empty(len(rows), self.out_features)
            for given, found in zip(rows.split(CHUNK), y.split(CHUNK), strict=True):
                found.copy_(self._rows(given, rotation))
        return y.view(*x.shape[:-1], self.out_features)

    def _rows(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(m, in) -> (m, out)."""
        codes, scale = quantise_rows(rotate_blocks(x, rotation))
        y = int_mm(codes, self.weight).float().mul_(scale).mul_(self.scale.mT)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype)

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """int8 products wherever the processor has exact ones."""
        if device.type == "cuda" or (device.type == "cpu" and _exact_on_cpu()):
            return f"int8 products on {device.type}"
        return f"emulated: {device.type} has no exact int8 products here, fp32 ones are taken"


def int8(
    module: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), rotate: int = 0
) -> nn.Module:
    """Replace linear layers by `Int8Linear`, for inference: rounding to nearest, without calibration.

    Args:
        module: any module; changed in place.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.
        rotate: neighbouring inputs that share their outliers, a power of two; fewer in layers that it does not divide.
            0: none. Three channels of activations ten times as large cost 3.0 % of error without, 1.4 % with 16.

    Raises:
        ValueError: as `convert`, or `rotate` is no power of two.
    """
    return convert_to(Int8Linear, module, include, exclude, rotate=rotate)


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """(m, k) int8, (n, k) int8 -> (m, n) int32: exact sums of products, on any device.

    By `torch._int_mm` where it is exact. On CUDA it takes more than 16 rows, and k and n that are multiples of 8:
    zeros fill them up.
    """
    if x.device.type == "cuda":
        (m, k), n = x.shape, len(weight)
        rows, columns, inner = max(0, 17 - m), -n % 8, -k % 8
        if rows or inner:
            x = F.pad(x, (0, inner, 0, rows))
        if columns or inner:
            weight = F.pad(weight, (0, inner, 0, columns))
        return torch._int_mm(x, weight.mT)[:m, :n]
    if x.device.type == "meta" or (x.device.type == "cpu" and _exact_on_cpu()):
        return torch._int_mm(x, weight.mT)
    return _in_float(x, weight)


def _in_float(x: Tensor, weight: Tensor) -> Tensor:
    """`int_mm` by fp32 products, exact because no partial sum of 1024 products reaches 2^24."""
    total = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(1024, dim=1), weight.split(1024, dim=1), strict=True):
        total += (a.float() @ b.float().mT).to(torch.int32)
    return total


@torch.compiler.assume_constant_result
def _exact_on_cpu() -> bool:
    """`_try_products`, a constant for the compiler."""
    return _try_products()


@cache
def _try_products() -> bool:
    """Whether this processor sums int8 products exactly.

    Without VNNI (x86 before 2019), oneDNN adds pairs of products in 16 bits, which saturate, and says nothing.
    """
    x = torch.tensor([[127, -128, 127, -128]], dtype=torch.int8).repeat(32, 16)
    return all(torch.equal(torch._int_mm(x, w.mT), _in_float(x, w)) for w in (x, x.roll(1, 1), -x.clamp(min=-127)))
