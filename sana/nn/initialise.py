"""How SANA's weights start (NVlabs/Sana; nothing but the guidance embedding starts at zero)."""

from __future__ import annotations

import math

import torch
from torch import nn

from sana.nn.block import Block
from sana.nn.embed import FinalLayer, GuidanceEmbedding, Modulation, PatchEmbed, TextEmbedding, TimeEmbedding
from sana.nn.mix_ffn import MixFFN
from sana.nn.norm import RMSNorm


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Draw every parameter of `network` anew, in place, from torch's global generator.

    - linear layers: Xavier uniform, bias 0, except
    - the patch embedding's bias and all of Mix-FFN: uniform in +-1/sqrt(fan_in), as torch does for convolutions;
    - time, guidance, modulation and caption layers: normal with standard deviation 0.02, bias 0;
    - the guidance embedding's last layer: zero, so that a student starts as its teacher (SANA-Sprint);
    - modulation tables: normal with standard deviation 1/sqrt(width);
    - norm weights: their `initial` value.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, module.initial)
        elif isinstance(module, Block | FinalLayer):
            nn.init.normal_(module.table, std=1 / math.sqrt(module.table.shape[1]))
    for module in network.modules():  # the exceptions, after the rule
        if isinstance(module, PatchEmbed):
            _as_convolution(module.linear, bias_only=True)
        elif isinstance(module, MixFFN):
            for layer in (module.inverted, module.depthwise, module.point):
                _as_convolution(layer)
        elif isinstance(module, Modulation):
            _narrow(module.linear)
        elif isinstance(module, TimeEmbedding | TextEmbedding):
            _narrow(module.fc1)
            _narrow(module.fc2)
            if isinstance(module, GuidanceEmbedding):
                nn.init.zeros_(module.fc2.get_parameter("weight"))


def _as_convolution(layer: nn.Module, bias_only: bool = False) -> None:
    weight = layer.get_parameter("weight")
    bound = 1 / math.sqrt(weight[0].numel())
    for name, parameter in layer.named_parameters():
        if name == "bias" or not bias_only:
            nn.init.uniform_(parameter, -bound, bound)


def _narrow(layer: nn.Module) -> None:
    nn.init.normal_(layer.get_parameter("weight"), std=0.02)
    nn.init.zeros_(layer.get_parameter("bias"))
