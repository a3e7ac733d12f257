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
            _uniform(module.linear.bias, fan_in=module.linear.weight.shape[1])
        elif isinstance(module, MixFFN):
            for layer in (module.inverted, module.depthwise, module.point):
                fan_in = layer.weight[0].numel()
                _uniform(layer.weight, fan_in)
                if layer.bias is not None:
                    _uniform(layer.bias, fan_in)
        elif isinstance(module, TimeEmbedding | TextEmbedding):
            _narrow(module.fc1)
            _narrow(module.fc2)
            if isinstance(module, GuidanceEmbedding):
                nn.init.zeros_(module.fc2.weight)
        elif isinstance(module, Modulation):
            _narrow(module.linear)


def _narrow(layer: nn.Module) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _uniform(parameter: torch.Tensor, fan_in: int) -> None:
    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
