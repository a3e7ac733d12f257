"""NVFP4: 4-bit floats in blocks of 16, of weights and, if wanted, of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.quant.convert import convert_to
from sana.quant.devices import capability
from sana.quant.e2m1 import (
    BLOCK,
    E4M3_LARGEST,
    ROOM,
    TOKEN_STEPS,
    WEIGHT_STEPS,
    dequantise,
    quantise,
    tensor_scale,
    tile_scales,
)
from sana.quant.layer import QuantisedLinear


class NVFP4Linear(QuantisedLinear):
    """A linear layer with NVFP4 weights (see `sana.quant.e2m1`), and NVFP4 activations if asked for.

    Activations are rounded as they come, with an fp32 scale per token instead of per tensor: what a sample becomes does
    not depend on the others of its batch. Their products are `torch._scaled_mm` on CUDA devices of compute capability
    10 or more (written after torchao's calls; no such device was at hand to run it). Elsewhere the same numbers are
    multiplied in fp32, which emulates the format and says nothing about its time. With high-precision activations the
    weight is dequantised for each product.

    Buffers are named, and laid out, as in checkpoints of NVIDIA's ModelOpt.

    Attributes:
        weight: (out, k / 2) uint8, two codes per byte, k the inputs filled up to a multiple of 16.
        weight_scale: (out, k / 16) float8_e4m3fn.
        weight_scale_2: () float32.
        activations: whether activations are quantised.
        search: whether block scales are those of the least squared error, instead of taking the largest number of a
            block to 6.
    """

    kind: ClassVar[str] = "nvfp4"
    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        activations: bool = True,
        search: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.activations, self.search, blocks = activations, search, -(-in_features // BLOCK)
        self.register_buffer("weight", torch.empty(out_features, blocks * BLOCK // 2, dtype=torch.uint8, device=device))
        scales = torch.empty(out_features, blocks, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_scale_2", torch.empty((), device=device))

    def settings(self) -> dict[str, Any]:
        """For `empty`."""
        return {"activations": self.activations, "search": self.search}

    def quantise(self, weight: Tensor) -> None:
        """Round to nearest."""
        self.weight_scale_2.copy_(tensor_scale(weight.abs().amax(), self._largest()))
        codes, scales = quantise(weight, self.weight_scale_2, WEIGHT_STEPS if self.search else (0,))
        self.weight.copy_(codes)
        self.weight_scale.copy_(scales)

    def dequantise(self) -> Tensor:
        """(out, in) float32."""
        return dequantise(self.weight, self.weight_scale, self.weight_scale_2)[:, : self.in_features]

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.activations:
            return F.linear(x, self.dequantise().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features)
        scale = tensor_scale(rows.abs().amax(dim=1, keepdim=True), self._largest())
        codes, scales = quantise(rows, scale, TOKEN_STEPS if self.search else (0,))
        if _real(x.device):
            y = _scaled_mm(codes, scales, self.weight, self.weight_scale).float() * (scale * self.weight_scale_2)
        else:
            # Without the scale of the token, which comes last, as in the real product.
            given = dequantise(codes, scales, torch.ones_like(scale))[:, : self.in_features]
            y = F.linear(given, self.dequantise()) * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _largest(self) -> float:
        """Scale of the block with the largest number."""
        return ROOM if self.search else E4M3_LARGEST

    def arithmetic(self, device: torch.device) -> str:
        """NVFP4 products on Blackwell."""
        if not self.activations:
            return "weights are dequantised for each product: less memory, not less time"
        if _real(device):
            return "NVFP4 products, bf16 results"
        return "emulated: NVFP4 products need CUDA and compute capability 10; fp32 ones of the same numbers are taken"


def nvfp4(
    module: nn.Module,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    activations: bool = True,
    search: bool = False,
) -> nn.Module:
    """Replace linear layers by `NVFP4Linear`, for inference: rounding to nearest, without calibration.

    Args:
        module: any module; changed in place.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.
        activations: quantise activations too. Of Gaussian numbers either alone costs 10 % of error, both 13 %.
        search: give each block the scale of the least squared error: of twelve for weights, once, and of three for
            activations, as they come. Then either alone costs 8 %, both below 12 %.

    Raises:
        ValueError: as `convert`.
    """
    return convert_to(NVFP4Linear, module, include, exclude, activations=activations, search=search)


def _real(device: torch.device) -> bool:
    return capability(device) >= (10, 0)


def _scaled_mm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """Packed codes (m, k / 2), (n, k / 2) with block scales (m, k / 16), (n, k / 16) -> (m, n) bf16.

    k is filled up to a multiple of 32 and n of 16, with codes of zero and scales of zero.
    """
    n, (inner, columns) = len(weight), (-x.shape[1] % 16, -len(weight) % 16)
    if inner or columns:
        x, weight = F.pad(x, (0, inner)), F.pad(weight, (0, inner, 0, columns))
        x_scales, weight_scales = _pad(x_scales, inner // 8, 0), _pad(weight_scales, inner // 8, columns)
    fp4 = torch.float4_e2m1fn_x2
    y = torch._scaled_mm(
        x.view(fp4), weight.view(fp4).mT, tile_scales(x_scales), tile_scales(weight_scales), out_dtype=torch.bfloat16
    )
    return y[:, :n]


def _pad(scales: Tensor, columns: int, rows: int) -> Tensor:
    return F.pad(scales.view(torch.uint8), (0, columns, 0, rows)).view(scales.dtype)
