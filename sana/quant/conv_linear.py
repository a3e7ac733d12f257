"""1x1 convolutions as linear layers, so that what converts linears reaches them too.

Our own networks have none: Mix-FFN's are linears over tokens. In SANA as published and in diffusers they hold 48 % of
the weights of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.Conv2d` that multiplies each pixel's channels by one matrix."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def as_linear(conv: nn.Conv2d) -> nn.Linear:
    """The linear layer over channels that equals a 1x1 convolution; it shares the convolution's memory.

    Raises:
        ValueError: the convolution is not 1x1 with stride 1, without padding and groups.
    """
    if not is_pointwise(conv):
        raise ValueError(f"{conv} is no 1x1 convolution with stride 1, without padding and groups")
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias  # type: ignore[assignment]
    return linear.train(conv.training)


class ConvLinear(nn.Module):
    """A layer over channels applied to every pixel: (b, in, h, w) or (in, h, w) -> the same with out channels.

    Args:
        linear: (..., in) -> (..., out).
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """The images, channels-last in memory."""
        return torch.movedim(self.linear(torch.movedim(x, -3, -1)), -1, -3)
