"""From latents, times and captions to tokens, and back to latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.linear import Linear
from sana.nn.norm import RMSNorm
from sana.ops.adaln.op import modulated_layer_norm
from sana.types import Grid


class PatchEmbed(nn.Module):
    """Squares of patch x patch latent pixels become tokens: a strided convolution written as a linear layer.

    The linear layer reads a patch as (channel, row, column), the order of a convolution's weight.
    """

    def __init__(self, in_channels: int, width: int, patch: int = 1, linear: Linear = nn.Linear):
        super().__init__()
        self.patch = patch
        self.linear = linear(in_channels * patch * patch, width)

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b n d"]:
        p = self.patch
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # b c f h p w p
        return self.linear(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, linear, and tokens back to latents.

    The linear layer writes a patch as (row, column, channel).

    Args:
        width: d.
        out_channels: c of the latent.
        patch: latent pixels per token side.
        linear: factory of the linear layer.
    """

    def __init__(self, width: int, out_channels: int, patch: int = 1, linear: Linear = nn.Linear):
        super().__init__()
        self.patch = patch
        self.table = nn.Parameter(torch.empty(2, width))
        self.linear = linear(width, out_channels * patch * patch)

    def forward(
        self, x: Float[Tensor, "b n d"], time: Float[Tensor, "b f d"], grid: Grid
    ) -> Float[Tensor, "b c f H W"]:
        """time: the embedding itself, not the blocks' modulation. H = h patch, W = w patch."""
        shift, scale = (self.table + time.unsqueeze(2)).unbind(2)
        x = self.linear(modulated_layer_norm(x, shift, scale))
        x = x.unflatten(1, grid).unflatten(4, (self.patch, self.patch, -1))  # b f h w p p c
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class TimeEmbedding(nn.Module):
    """A number per frame becomes a vector: sinusoid, linear, SiLU, linear. Also used for the guidance scale.

    It runs outside autocast: bf16 keeps three digits of a sinusoid and would merge neighbouring times.

    Args:
        width: d of the output.
        frequencies: channels of the sinusoid, half cosines, half sines.
        linear: factory of the linear layers.
    """

    def __init__(self, width: int, frequencies: int = 256, linear: Linear = nn.Linear):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = linear(frequencies, width)
        self.fc2 = linear(width, width)

    def forward(self, t: Float[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, "... d"]:
        """t in the unit that the network was trained with (SANA 0..1000, Sprint 0..1); dtype of the parameters."""
        with torch.autocast(t.device.type, enabled=False):
            return self.fc2(F.silu(self.fc1(sinusoid(t, self.frequencies).to(dtype))))


class GuidanceEmbedding(TimeEmbedding):
    """A guidance scale per sample becomes a vector that is added to the time's (SANA-Sprint, arXiv 2503.09641).

    Args:
        width: d of the output.
        scale: multiplies the guidance scale before its sinusoid.
        frequencies: channels of the sinusoid.
        linear: factory of the linear layers.
    """

    def __init__(self, width: int, scale: float = 0.1, frequencies: int = 256, linear: Linear = nn.Linear):
        super().__init__(width, frequencies, linear)
        self.scale = scale

    def forward(self, t: Float[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, "... d"]:
        """t: the guidance scale itself, such as 4.5."""
        return super().forward(t * self.scale, dtype)


class Modulation(nn.Module):
    """The time embedding becomes the six vectors (shift, scale, gate; shift, scale, gate) shared by all blocks."""

    def __init__(self, width: int, linear: Linear = nn.Linear):
        super().__init__()
        self.linear = linear(width, 6 * width)

    def forward(self, time: Float[Tensor, "b f d"]) -> Float[Tensor, "b f 6 d"]:
        with torch.autocast(time.device.type, enabled=False):
            return self.linear(F.silu(time)).unflatten(-1, (6, -1))


class TextEmbedding(nn.Module):
    """Caption features to the width of the network: linear, GELU (tanh), linear, RMSNorm.

    Args:
        text_channels: channels of the text encoder.
        width: d.
        norm: initial weight of the final RMSNorm (SANA 0.01: it keeps cross-attention small at first); None: no norm.
        norm_eps: eps of that norm.
        linear: factory of the linear layers.
    """

    def __init__(
        self,
        text_channels: int,
        width: int,
        norm: float | None = 0.01,
        norm_eps: float = 1e-5,
        linear: Linear = nn.Linear,
    ):
        super().__init__()
        self.fc1 = linear(text_channels, width)
        self.fc2 = linear(width, width)
        self.norm = nn.Identity() if norm is None else RMSNorm(width, norm_eps, initial=norm)

    def forward(self, text: Float[Tensor, "b l c"]) -> Float[Tensor, "b l d"]:
        return self.norm(self.fc2(F.gelu(self.fc1(text), approximate="tanh")))


class SinCos2d(nn.Module):
    """Fixed sine-cosine code of each token's column (first half of the width) and row (second half).

    Both axes are stretched over [0, base / interpolation) whatever the grid. Used by SANA at 2K (base 64,
    interpolation 1) and 4K (base 128, interpolation 2).

    Args:
        width: d, a multiple of 4.
        base: side in tokens of the nominal resolution.
        interpolation: divides the coordinates.

    Raises:
        ValueError: when width is no multiple of 4.
    """

    def __init__(self, width: int, base: int, interpolation: float = 1.0):
        super().__init__()
        if width % 4:
            raise ValueError(f"SinCos2d: width {width} is not a multiple of 4")
        self.width, self.base, self.interpolation = width, base, interpolation

    def forward(self, grid: Grid, device: torch.device | str, dtype: torch.dtype) -> Float[Tensor, "hw d"]:
        """The code of the h w tokens of any one frame, row-major."""
        device = torch.device(device)
        home = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        column, row = self._axis(grid.w, home), self._axis(grid.h, home)
        column = column.unsqueeze(0).expand(grid.h, -1, -1)
        row = row.unsqueeze(1).expand(-1, grid.w, -1)
        return torch.cat([column, row], dim=-1).flatten(0, 1).to(dtype).to(device)

    def _axis(self, size: int, device: torch.device) -> Float[Tensor, "size d_half"]:
        place = torch.arange(size, device=device, dtype=torch.float64) * (self.base / size / self.interpolation)
        quarter = self.width // 4
        omega = torch.exp(torch.arange(quarter, device=device, dtype=torch.float64) * (-math.log(1e4) / quarter))
        angle = place.unsqueeze(1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def sinusoid(t: Float[Tensor, ...], channels: int, period: float = 1e4) -> Float[Tensor, "... channels"]:
    """[cos(t w_k), sin(t w_k)] with w_k = period^(-k / half), k < half = channels / 2; in at least fp32."""
    dtype, half = torch.promote_types(t.dtype, torch.float32), channels // 2
    omega = torch.exp(torch.arange(half, device=t.device, dtype=dtype) * (-math.log(period) / half))
    angle = t.to(dtype).unsqueeze(-1) * omega
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
