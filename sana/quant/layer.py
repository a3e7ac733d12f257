"""What all quantised linear layers have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


class QuantisedLinear(nn.Module):
    """A linear layer for inference whose weight is stored in few bits; (..., in) -> (..., out).

    A subclass registers its buffers in `__init__`, uninitialised, and fills them in `from_linear`. All state is in
    buffers of plain dtypes, so that state dicts and safetensors hold a quantised network, and ``empty(...,
    **layer.settings())`` followed by `load_state_dict` makes the layer again. Casting the network (``.bfloat16()``)
    leaves these buffers as they are: a scale, or a float8 code, means nothing in another dtype.

    The output has the dtype of the input, or autocast's. The gradient of the input is that of the product with the
    dequantised weight (straight through the rounding of activations); weights have none, and forward-mode
    differentiation is refused, because rounding would silently make the tangent zero.

    Attributes:
        kind: name of the format, as in conf/quant.
        in_features, out_features: as of `nn.Linear`.
        bias: (out,) float32, or None.
    """

    kind: ClassVar[str]
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None, **settings: Any
    ) -> Self:
        """A layer with uninitialised buffers, to load a state into; `device` may be "meta".

        Args:
            in_features, out_features, bias: as of `nn.Linear`.
            device: of the buffers.
            settings: as `settings()` of the layer that was saved.
        """
        return cls(in_features, out_features, bias, device=device, **settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Self:
        """The quantised copy of a layer, on its device."""
        weight, bias = linear.weight.detach(), linear.bias
        layer = cls.empty(linear.in_features, linear.out_features, bias is not None, weight.device, **settings)
        if layer.bias is not None:
            layer.bias.copy_(bias.detach())
        layer.quantise(weight.float())
        return layer.train(linear.training)

    def settings(self) -> dict[str, Any]:
        """Plain values that `empty` needs besides the sizes."""
        return {}

    def quantise(self, weight: Tensor) -> None:
        """Fill the buffers from an (out, in) float32 weight."""
        raise NotImplementedError

    def dequantise(self) -> Tensor:
        """(out, in) float32: the weight that the buffers stand for."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) with bias, in the dtype of x."""
        raise NotImplementedError

    @classmethod
    def arithmetic(cls, device: torch.device) -> str:
        """How products are computed on a device, in words; begins with "emulated" where not in the format itself."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"{type(self).__name__} has no forward-mode derivative: rounding would make it zero")
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled() and x.requires_grad:
                return _StraightThrough.apply(x, self)  # type: ignore[return-value]
            return self.product(x)

    def extra_repr(self) -> str:
        """As of `nn.Linear`, with the settings."""
        own = "".join(f", {key}={value}" for key, value in self.settings().items())
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{own}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as every module; a cast leaves the buffers in their dtypes."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class RowScaledLinear(QuantisedLinear):
    """A linear layer with one byte per weight and a scale per output channel; rounding to nearest.

    Attributes:
        weight: (out, in) in the type that `round_rows` gives.
        scale: (out, 1) float32.
    """

    dtype: ClassVar[torch.dtype]
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None = None):
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.dtype, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, device=device))

    @staticmethod
    def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        """(m, k) -> codes (m, k) and scale (m, 1) float32 with x about codes * scale."""
        raise NotImplementedError

    def quantise(self, weight: Tensor) -> None:
        """Round to nearest."""
        codes, scale = self.round_rows(weight)
        self.weight.copy_(codes)
        self.scale.copy_(scale)

    def dequantise(self) -> Tensor:
        """(out, in) float32."""
        return self.weight.float() * self.scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dequantise().to(grad.dtype), None  # type: ignore[attr-defined]
