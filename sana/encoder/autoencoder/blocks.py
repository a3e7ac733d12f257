"""Residual blocks and resampling of DC-AE (Chen et al. 2024, arXiv 2410.10733), over maps of (b, c, h, w)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from sana.ops.choice import use_triton
from sana.ops.decoding.naive import doubling_kernel
from sana.ops.decoding.op import bias_silu, double, doubling_kernels, kernels_for
from sana.ops.depthwise_gate.op import depthwise_gate
from sana.ops.linear_attention.naive import relu_attention_answer, relu_attention_sums
from sana.ops.linear_attention.op import relu_linear_attention
from sana.ops.rms_norm import naive
from sana.ops.rms_norm.naive import Activation
from sana.ops.rms_norm.op import rms_norm


def average_channels(x: Float[Tensor, "b c h w"], channels: int) -> Float[Tensor, "b d h w"]:
    """Means over groups of c / channels consecutive channels: the shortcut where channels become fewer."""
    return x.unflatten(1, (channels, -1)).mean(2)


def repeat_channels(x: Float[Tensor, "b c h w"], channels: int) -> Float[Tensor, "b d h w"]:
    """Each channel channels / c times in a row: the shortcut where channels become more."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Local(nn.Module):
    """A layer whose outputs read a bounded neighbourhood of its inputs; beyond the border of the map are zeros.

    Attributes:
        reach: inputs that an output reads on either side of its own place.
    """

    reach: int = 0

    def field(self, first: int, end: int) -> tuple[int, int]:
        """Inputs [p, q) along one axis that the outputs [first, end) read; it may stick out of the map."""
        return first - self.reach, end + self.reach

    def size(self, n: int) -> int:
        """Outputs along one axis for n inputs."""
        return n


class RMSNorm2d(Local):
    """Divides each pixel by the root mean square of its channels; gain and bias per channel, statistics in fp32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        activation: Activation = None,
        residual: Float[Tensor, "b c h w"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """residual + act(norm(x)); only maps in channels_last are rows that the kernels can read."""
        norm = rms_norm if _is_channels_last(x) else naive.rms_norm
        added = None if residual is None else residual.movedim(1, -1)
        return norm(x.movedim(1, -1), self.weight, self.eps, self.bias, activation, added).movedim(-1, 1)


class ResBlock(Local):
    """x + norm(conv(silu(conv(x)))): the norm stands last, so the residual branch starts at a known scale."""

    reach = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = RMSNorm2d(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.norm(self.conv2(self._hidden(x)), residual=x)

    def _hidden(self, x: Tensor) -> Tensor:
        weight, bias = self.conv1.weight, self.conv1.bias
        assert bias is not None
        if kernels_for(x, weight, bias):
            return bias_silu(F.conv2d(x, weight, padding=1), bias)
        return F.silu(self.conv1(x))


class Aggregation(nn.Module):
    """Queries, keys and values averaged over a neighbourhood: depthwise kernel x kernel, then 1x1 per head."""

    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.pointwise(self.depthwise(x))


class MultiScaleLinearAttention(nn.Module):
    """x + norm(proj(ReLU linear attention over the projections and their aggregations)), EfficientViT's attention.

    The 3 width channels of `qkv`, and those of every aggregation, are cut into runs of 3 head_dim consecutive
    channels, and each run is (q, k, v) of one head. So no third of the fused weight is "the queries": the first head
    takes q, k and v from the first 3 head_dim rows. On small maps the published code computes the same function in
    its quadratic form, which differs by rounding only.
    """

    def __init__(self, width: int, head_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"attention: width {width} is no multiple of head_dim {head_dim}")
        self.head_dim, self.heads = head_dim, width // head_dim * (1 + len(kernels))
        self.reach = max((kernel // 2 for kernel in kernels), default=0)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        groups = 3 * width // head_dim
        self.scales = nn.ModuleList(Aggregation(3 * width, groups, kernel) for kernel in kernels)
        self.proj = nn.Conv2d(width * (1 + len(kernels)), width, 1, bias=False)
        self.norm = RMSNorm2d(width)

    def forward(
        self, x: Float[Tensor, "b c h w"], sums: Float[Tensor, "b heads dh dh_1"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Attention to the places of x, or to those that were summed by `sums`, of which x is a part."""
        h, w = x.shape[2:]
        q, k, v = self._heads(self._projections(x))
        y = relu_linear_attention(q, k, v) if sums is None else relu_attention_answer(q, sums)
        y = y.to(x.dtype)
        return x + self.norm(self.proj(y.flatten(2).mT.unflatten(2, (h, w))))

    def sums(self, x: Float[Tensor, "b c h w"], rows: slice, columns: slice) -> Float[Tensor, "b heads dh dh_1"]:
        """What queries need to know of the places (rows, columns) of x; those of all parts of a map add up.

        Around them x should have `reach` more rows and columns of the map, where the map has them.
        """
        _, k, v = self._heads(self._projections(x)[:, :, rows, columns])
        return relu_attention_sums(k, v)

    def _projections(self, x: Tensor) -> Tensor:
        """(b, 3 c (1 + scales), h, w): queries, keys and values of all heads."""
        qkv = self.qkv(x)
        return torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)

    def _heads(self, projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (b, n, heads, head_dim) each."""
        tokens = projections.flatten(2).mT
        q, k, v = tokens.unflatten(2, (-1, 3, self.head_dim)).unbind(3)
        return q, k, v


class DepthwiseGate2d(nn.Conv2d):
    """a * silu(g) with (a, g) = depthwise 3x3(silu(x)): channels 2 c to c."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Float[Tensor, "b c2 h w"]) -> Float[Tensor, "b c h w"]:
        if _is_channels_last(x) and self.bias is not None and use_triton(x, self.weight, self.bias):
            h, w = x.shape[2:]
            tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
            return depthwise_gate(tokens, self.weight, self.bias, h, w).unflatten(1, (h, w)).permute(0, 3, 1, 2)
        value, gate = super().forward(F.silu(x)).chunk(2, dim=1)
        return value * F.silu(gate)


class GatedConv(nn.Module):
    """x + norm(1x1(a * silu(g))) with (a, g) = depthwise 3x3(silu(1x1(x))), hidden width 4 x: the block's FFN."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        hidden = 2 * ratio * width
        self.expand = nn.Conv2d(width, hidden, 1)
        self.depthwise = DepthwiseGate2d(hidden)
        self.project = nn.Conv2d(hidden // 2, width, 1, bias=False)
        self.norm = RMSNorm2d(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.norm(self.project(self.depthwise(self.expand(x))), residual=x)


class EViTBlock(Local):
    """Multi-scale linear attention, then a gated convolution; each with its own residual.

    With the attention's sums given, it reads a bounded neighbourhood.
    """

    def __init__(self, width: int, head_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.attention = MultiScaleLinearAttention(width, head_dim, kernels)
        self.ffn = GatedConv(width)
        self.reach = self.attention.reach + 1

    def forward(
        self, x: Float[Tensor, "b c h w"], sums: Float[Tensor, "b heads dh dh_1"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        return self.ffn(self.attention(x, sums))


class Downsample(Local):
    """Halves height and width: a convolution plus, where asked, pixel-unshuffle and channel means as its shortcut.

    Args:
        shuffle: convolve at full size to outputs / 4 channels and unshuffle; else a convolution of stride 2.
    """

    def __init__(self, inputs: int, outputs: int, shuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        if (shortcut and 4 * inputs % outputs) or (shuffle and outputs % 4):
            raise ValueError(f"downsampling from {inputs} to {outputs} channels: the shortcut needs outputs to divide "
                             "4 x inputs, and shuffling needs outputs to be a multiple of 4")  # fmt: skip
        self.outputs, self.shuffle, self.shortcut = outputs, shuffle, shortcut
        self.conv = nn.Conv2d(inputs, outputs // 4 if shuffle else outputs, 3, 1 if shuffle else 2, padding=1)

    def field(self, first: int, end: int) -> tuple[int, int]:
        """Even on both sides, so that the part is halved as the whole is."""
        return 2 * first - 2, 2 * end + (2 if self.shuffle else 0)

    def size(self, n: int) -> int:
        return n // 2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h/2 w/2"]:
        y = self.conv(x)
        if self.shuffle:
            y = F.pixel_unshuffle(y, 2)
        return y + average_channels(F.pixel_unshuffle(x, 2), self.outputs) if self.shortcut else y


class Upsample(Local):
    """Doubles height and width: a convolution plus, where asked, repeated channels and pixel-shuffle as its shortcut.

    Args:
        shuffle: convolve at small size to 4 x outputs channels and shuffle; else enlarge by repetition, then convolve.
    """

    def __init__(self, inputs: int, outputs: int, shuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        if shortcut and 4 * outputs % inputs:
            raise ValueError(f"upsampling from {inputs} to {outputs} channels: the shortcut needs inputs to divide "
                             "4 x outputs")  # fmt: skip
        self.outputs, self.shuffle, self.shortcut = outputs, shuffle, shortcut
        self.conv = nn.Conv2d(inputs, 4 * outputs if shuffle else outputs, 3, padding=1)

    def field(self, first: int, end: int) -> tuple[int, int]:
        if self.shuffle:  # one place around those that the outputs lie in
            return first // 2 - 1, (end + 1) // 2 + 1
        return (first - 1) // 2, (end + 2) // 2  # one place around the outputs themselves

    def size(self, n: int) -> int:
        return 2 * n

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d 2*h 2*w"]:
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        if not self.shuffle and (_in_full_on_cpu(x, weight) or kernels_for(x, weight, bias)):
            return self._by_parity(x)
        if self.shuffle:
            y = F.pixel_shuffle(self.conv(x), 2)
        else:
            y = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y + F.pixel_shuffle(repeat_channels(x, 4 * self.outputs), 2) if self.shortcut else y

    def _by_parity(self, x: Tensor) -> Tensor:
        """The same without enlarging x: four ninths of the products remain, and no map of the larger size but the
        result."""
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        if kernels_for(x, weight, bias):
            parts = [F.conv2d(x, kernel, padding=1) for kernel in doubling_kernels(weight)]
            return double(parts, x, bias, self.shortcut)
        one_by_one = (F.conv2d(x, doubling_kernel(weight, k), bias, padding=1) for k in range(4))  # to save memory
        return double(one_by_one, x, None, self.shortcut)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _in_full_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether sums of weights keep their precision, no derivative is taken, and nobody else fuses the steps."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
