"""Quantised networks from files: which layers were quantised how, written down and built again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sana.quant.conv_linear import ConvLinear
from sana.quant.fp8 import FP8Linear
from sana.quant.int8 import Int8Linear
from sana.quant.int8_weight import Int8WeightLinear
from sana.quant.layer import QuantisedLinear
from sana.quant.nvfp4 import NVFP4Linear
from sana.quant.w4a16 import W4A16Linear

LAYERS: Mapping[str, type[QuantisedLinear]] = {
    layer.kind: layer for layer in (Int8WeightLinear, Int8Linear, FP8Linear, NVFP4Linear, W4A16Linear)
}
"""Every format by its name."""


def describe(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of each quantised layer -> its format as "kind", and its settings.

    Raises:
        ValueError: the network has none, or 1x1 convolutions among them, which have no place in a file.
    """
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, ConvLinear):
            raise ValueError(f"{name} is a quantised 1x1 convolution; only networks of this project go into files")
        if isinstance(module, QuantisedLinear):
            found[name] = {"kind": module.kind, **module.settings()}
    if not found:
        raise ValueError(f"{type(network).__name__} has no quantised layer")
    return found


def rebuild(network: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Replace linear layers by quantised ones without content, to load a state into; in place.

    Args:
        network: in full precision; it may be on the meta device, and then the new layers are too.
        layers: as `describe` gave them.

    Raises:
        ValueError: no such layer in the network, no such format, or settings that it does not have.
    """
    modules = dict(network.named_modules())
    for name, given in layers.items():
        linear, settings = modules.get(name), {key: value for key, value in given.items() if key != "kind"}
        kind = LAYERS.get(given["kind"])
        if not isinstance(linear, nn.Linear) or not name:
            raise ValueError(f"the network has no linear layer {name!r}")
        if kind is None:
            raise ValueError(f"{name}: {given['kind']!r} is no format of this version; it knows {', '.join(LAYERS)}")
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        try:
            layer = kind.empty(*sizes, device=linear.weight.device, **settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {kind.kind} cannot be built with {settings}: {error}") from None
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, layer.train(linear.training))
    return network
