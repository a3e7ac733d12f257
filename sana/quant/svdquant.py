"""SVDQuant (Li et al. 2024, arXiv:2411.05007): 4-bit weights and activations beside a branch of low rank.

Outliers of the activations move into the weight by a scale per input channel (smoothing), the largest directions of the
weight go into a branch of rank 32 in 16 bits, and what remains is easy to round. The search for the scales and the
alternation of branch and rounding are those of the published quantiser, as described in its paper and its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sana.quant import e2m1
from sana.quant.calibrate import Activations, Run, collect
from sana.quant.convert import NotConverted, convert
from sana.quant.int4 import dequantise_groups, pack_codes, quantise_groups, unpack_codes
from sana.quant.layer import QuantisedLinear
from sana.quant.low_rank import low_rank

Precision = Literal["int4", "nvfp4"]
GROUP = {"int4": 64, "nvfp4": e2m1.BLOCK}
WEIGHT_LEVELS, TOKEN_LEVELS = 7.5, 7.0
"""Of int4: a weight may use all 16 codes; activations are symmetric, as in the published kernels."""
STEPS = 20  # of the smoothing exponent


class SVDQuantLinear(QuantisedLinear):
    """y = Q(x / s) Q(R)^T + (x D) U^T + b with R = W diag(s) - U (diag(s) D)^T, 4 bits in both Q.

    Activations are rounded as they come, per token and group: of 64 with int4, of 16 with NVFP4 (e4m3 scales, an fp32
    scale per token). The products of the same numbers are taken in fp32 on every device: this emulates the format, and
    its time says nothing about it. Buffers have the names and logical shapes of nunchaku's layers;
    `sana.checkpoint.nunchaku` puts them in the order in which its kernels read them.

    Attributes:
        qweight: (out, k / 2) uint8, two codes per byte, k the inputs filled up to a multiple of the group.
        wscales: (k / group, out) bfloat16, or float8_e4m3fn with NVFP4.
        wtscale: (1,) float32, with NVFP4 only: the scale over all of them.
        smooth_factor: (in,) bfloat16, s.
        proj_down: (in, rank) bfloat16, D.
        proj_up: (out, rank) bfloat16, U.
    """

    kind: ClassVar[str] = "svdquant_w4a4"
    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        rank: int = 32,
        precision: Precision = "int4",
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        if precision not in GROUP:
            raise ValueError(f"svdquant: precision={precision!r} must be one of {', '.join(GROUP)}")
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"svdquant: rank={rank} must be 0 (no branch) or positive")
        self.rank, self.precision, group = min(rank, in_features, out_features), precision, GROUP[precision]
        groups, fp4 = -(-in_features // group), precision == "nvfp4"

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.register_buffer("qweight", empty(out_features, groups * group // 2, dtype=torch.uint8))
        self.register_buffer(
            "wscales", empty(groups, out_features, dtype=torch.float8_e4m3fn if fp4 else torch.bfloat16)
        )
        self.register_buffer("wtscale", empty(1, dtype=torch.float32) if fp4 else None)
        self.register_buffer("smooth_factor", empty(in_features))
        self.register_buffer("proj_down", empty(in_features, self.rank))
        self.register_buffer("proj_up", empty(out_features, self.rank))

    def settings(self) -> dict[str, Any]:
        """For `empty`."""
        return {"rank": self.rank, "precision": self.precision}

    def quantise(self, weight: Tensor) -> None:
        """Without calibration: no smoothing, and the branch of the weight itself."""
        self.fill(weight, weight.new_ones(self.in_features), *low_rank(weight, self.rank))

    def fill(self, weight: Tensor, smooth: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Fill the buffers; what remains of the weight is rounded against the branch as it is stored.

        Args:
            weight: (out, in) float32.
            smooth: (in,) positive, s.
            up, down: (out, rank), (rank, in): the branch U A of W diag(s).

        Returns:
            Q(R), (out, in) float32.
        """
        self.smooth_factor.copy_(smooth)
        smooth = self.smooth_factor.float()
        self.proj_up.copy_(up)
        self.proj_down.copy_((down / smooth).mT)
        rest = weight * smooth - self.proj_up.float() @ (self.proj_down.float() * smooth.unsqueeze(1)).mT
        if self.wtscale is None:
            codes, scales = quantise_groups(rest, GROUP["int4"], WEIGHT_LEVELS)
            self.qweight.copy_(pack_codes(codes))
        else:
            self.wtscale.copy_(e2m1.tensor_scale(rest.abs().amax()))
            packed, scales = e2m1.quantise(rest, self.wtscale)
            self.qweight.copy_(packed)
        self.wscales.copy_(scales.mT)
        return self.rest()

    def rest(self) -> Tensor:
        """Q(R), (out, in) float32."""
        scales = self.wscales.mT
        if self.wtscale is None:
            full = dequantise_groups(unpack_codes(self.qweight), scales)
        else:
            full = e2m1.dequantise(self.qweight, scales, self.wtscale)
        return full[:, : self.in_features]

    def dequantise(self) -> Tensor:
        """(out, in) float32: what multiplies activations that are not rounded."""
        return self.rest() / self.smooth_factor.float() + self.proj_up.float() @ self.proj_down.float().mT

    def round_tokens(self, rows: Tensor) -> Tensor:
        """Q of smoothed tokens, (n, in) -> (n, in) float32."""
        if self.wtscale is None:
            full = dequantise_groups(*quantise_groups(rows, GROUP["int4"], TOKEN_LEVELS))
        else:
            scale = e2m1.tensor_scale(rows.abs().amax(dim=1, keepdim=True))
            full = e2m1.dequantise(*e2m1.quantise(rows, scale), scale)
        return full[:, : self.in_features]

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features).float()
        y = F.linear(self.round_tokens(rows / self.smooth_factor.float()), self.rest(), self.bias)
        y = y + (rows @ self.proj_down.float()) @ self.proj_up.float().mT
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """No kernel of ours multiplies in 4 bits."""
        return "emulated: 4-bit products of tokens and weights are taken in fp32 of the same numbers, on every device"


def candidates(activations: Tensor, weight: Tensor) -> Iterator[tuple[float, float, Tensor]]:
    """Smoothing scales to try: ``max |x|^a / max |w|^b`` per channel, 1 where that is not defined.

    Args:
        activations: (k,) max |x| of each channel.
        weight: (k,) max |w| of each channel.

    Returns:
        The 39 pairs (0, 0), (a, 0) and (a, 1 - a) for a = 1/20 ... 19/20, each with its (k,) scales.
    """
    pairs = [(0.0, 0.0)]
    for i in range(1, STEPS):
        pairs += [(i / STEPS, 0.0), (i / STEPS, (STEPS - i) / STEPS)]
    for a, b in pairs:
        scale = (activations.double() ** a / weight.double() ** b).to(torch.bfloat16).float()
        yield a, b, torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


@torch.no_grad()
def fit(layer: SVDQuantLinear, weight: Tensor, given: Activations, rounds: int = 100) -> list[float]:
    """Fit a layer to the activations that it will see: smoothing, branch and rest by the least error of the output.

    Every smoothing scale is tried with the branch of its smoothed weight. Then, with the best one, branch and rounding
    take turns: the branch becomes that of what rounding left, until the error grows.

    Args:
        layer: filled.
        weight: (out, in) float32.
        given: on the same device. All three may be fake tensors, to plan memory; an error is 0 then.
        rounds: of the alternation at most.

    Returns:
        Errors |y' - y|^2 / |y|^2 over the tokens: of the best smoothing, then of each round, the last of which may be
        larger and is undone.
    """
    expected = F.linear(given.rows, weight)
    norm = expected.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    bias, layer.bias = layer.bias, None  # cancels in the error

    def error() -> float:
        found = (layer.product(given.rows).double() - expected).square().sum() / norm
        return 0.0 if isinstance(found, FakeTensor) else float(found)

    best, smooth = float("inf"), torch.ones_like(given.largest)
    tried = candidates(given.largest, weight.abs().amax(dim=0))
    for _, _, scale in islice(tried, 2) if isinstance(weight, FakeTensor) else tried:  # all take the same memory
        layer.fill(weight, scale, *low_rank(weight * scale, layer.rank))
        if (found := error()) < best:
            best, smooth = found, scale
    up, down = low_rank(weight * smooth, layer.rank)
    rest, errors = layer.fill(weight, smooth, up, down), [best]
    for _ in range(rounds if layer.rank else 0):
        state = {name: tensor.clone() for name, tensor in layer.named_buffers()}
        rest = layer.fill(weight, smooth, *low_rank(weight * smooth - rest, layer.rank))
        errors.append(error())
        if errors[-1] >= errors[-2]:
            for name, tensor in layer.named_buffers():
                tensor.copy_(state[name])
            break
    layer.bias = bias
    return errors


@dataclass
class SVDQuant:
    """(network, run) -> the network with its linear layers replaced by fitted `SVDQuantLinear`, in place.

    Args:
        precision: of weights and activations: "int4" in groups of 64, or "nvfp4" in blocks of 16.
        rank: of the branch.
        rounds: of branch and rounding at most.
        prompts: what is drawn to calibrate: so many of those that come along, or these texts.
        rows: tokens kept of each layer.
        include, exclude: patterns as of `fnmatch` of the layers to convert; `exclude` wins.
    """

    precision: Precision = "int4"
    rank: int = 32
    rounds: int = 100
    prompts: int | list[str] = 16
    rows: int = 1024
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    calibrates: ClassVar[bool] = True

    def __call__(self, network: nn.Module, run: Run | None = None) -> nn.Module:
        """Calibrate and convert.

        Args:
            network: in full precision. On the meta device nothing is fitted, and no run is needed.
            run: makes the network work, see `sana.quant.calibrate.collect`.

        Raises:
            ValueError: no run; or as `sana.quant.convert.convert`.
        """
        meta = all(parameter.is_meta for parameter in network.parameters())
        if run is None and not meta:
            raise ValueError("svdquant_w4a4: needs calibration: give a run, which makes the network work")
        seen = {} if run is None else collect(network, run, self.rows)

        def make(name: str, linear: nn.Linear) -> SVDQuantLinear:
            if meta:
                return SVDQuantLinear.from_linear(linear, rank=self.rank, precision=self.precision)
            if name not in seen:
                raise NotConverted("calibration never reached it")
            sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.detach()
            layer = SVDQuantLinear.empty(*sizes, weight.device, rank=self.rank, precision=self.precision)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias.detach())
            fit(layer, weight.float(), seen.pop(name), self.rounds)
            return layer.train(linear.training)

        return convert(network, make, kind=SVDQuantLinear.kind, include=self.include, exclude=self.exclude)
