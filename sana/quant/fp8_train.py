"""Training in FP8: the products of linear layers, forward and backward, by torchao; weights stay in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sana.quant.convert import NotConverted, convert
from sana.quant.report import report_of

SIDE = 16  # of what FP8 products multiply: both sides of a weight are multiples of it


def fp8_train(
    module: nn.Module,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    emulate: bool | None = None,
) -> nn.Module:
    """Replace linear layers by torchao's Float8Linear, in place: the same parameters under the same names.

    In each product weights and inputs are rounded to e4m3 and gradients to e5m2, with a scale per tensor
    (Micikevicius et al. 2022, arXiv:2209.05433); sums are in fp32 and results in the dtype of the input. The optimizer,
    averages and checkpoints see full-precision weights only. There is no forward-mode derivative.

    Args:
        module: to be trained.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.
        emulate: multiply the rounded numbers in the dtype of the input; None: where there is no CUDA device of compute
            capability 8.9 or more. Its time says nothing about FP8.

    Raises:
        ImportError: torchao is not installed.
        ValueError: as `convert`.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulate = not _real() if emulate is None else emulate
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # batches whose tokens are no multiple of 16

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if linear.in_features % SIDE or linear.out_features % SIDE:
            raise NotConverted(f"{linear.in_features} x {linear.out_features} are not both multiples of {SIDE}")
        layer: Any = convert_to_float8_training(linear, config=config)
        return layer.train(linear.training)

    module = convert(module, make, kind="fp8_train", include=include, exclude=exclude)
    report_of(module).arithmetic = (
        "emulated: FP8 products need CUDA and compute capability 8.9; those of the same numbers are taken"
        if emulate
        else "FP8 products forward and backward, weights in full precision"
    )
    return module


def _real() -> bool:
    hip = torch.version.hip is not None
    return torch.cuda.is_available() and not hip and torch.cuda.get_device_capability() >= (8, 9)
