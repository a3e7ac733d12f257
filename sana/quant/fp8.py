"""FP8: products of e4m3 weights and activations, with a scale per output channel and per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert_to
from sana.quant.devices import capability
from sana.quant.layer import RowScaledLinear

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""


def quantise_fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., k) -> codes (..., k) e4m3, scale (..., 1) float32 with x about codes * scale.

    ``scale = max |x| / 448``; rows of zeros have scale 1. Clamped before the cast, which not every release and device
    saturates: a quotient rounded up would become NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


class FP8Linear(RowScaledLinear):
    """y[m, o] = s_x[m] s_w[o] sum_k X[m, k] W[o, k] + b[o] with X and W in e4m3 and the sum in fp32.

    On CUDA devices of compute capability 8.9 or more the product is `torch._scaled_mm`, which gives bf16 whatever the
    dtype of the input; elsewhere fp32 products of the same codes emulate it.
    """

    kind: ClassVar[str] = "fp8"
    dtype: ClassVar[torch.dtype] = E4M3
    round_rows = staticmethod(quantise_fp8_rows)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        codes, scale = quantise_fp8_rows(x.reshape(-1, self.in_features))
        if _real(x.device):
            y = _scaled_mm(codes, self.weight, scale, self.scale).to(x.dtype)
        else:
            y = F.linear(codes.float(), self.weight.float()).mul_(scale).mul_(self.scale.mT).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """FP8 products on Ada, Hopper and later."""
        if _real(device):
            return "FP8 products, bf16 results"
        return "emulated: FP8 products need CUDA and compute capability 8.9; fp32 ones of the same codes are taken"


def fp8(module: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()) -> nn.Module:
    """Replace linear layers by `FP8Linear`, for inference: rounding to nearest, without calibration.

    Args:
        module: any module; changed in place.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.

    Raises:
        ValueError: as `convert`.
    """
    return convert_to(FP8Linear, module, include, exclude)


def _real(device: torch.device) -> bool:
    return capability(device) >= (8, 9)


def _scaled_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """(m, k), (n, k) e4m3 with scales (m, 1), (n, 1) -> (m, n) bf16; k and n are filled up to multiples of 16."""
    n, (inner, columns) = len(weight), (-x.shape[1] % 16, -len(weight) % 16)
    if inner:
        x = _pad(x, inner, 0)
    if inner or columns:
        weight, weight_scale = _pad(weight, inner, columns), F.pad(weight_scale, (0, 0, 0, columns))
    y = torch._scaled_mm(x, weight.mT, scale_a=x_scale, scale_b=weight_scale.mT, out_dtype=torch.bfloat16)
    return y[:, :n]


def _pad(codes: Tensor, columns: int, rows: int) -> Tensor:
    """With zeros, whose code is the byte 0."""
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(E4M3)
