"""DC-AE weights between our names and those of diffusers' `AutoencoderDC`; both ways exact to the bit.

Only names and shapes differ: diffusers cuts the fused qkv convolution into three linears and squeezes the 1x1
convolutions around the attention; all other weights are renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PATTERNS: tuple[tuple[str, str], ...] = (
    # ours, diffusers; {s} and {i} stand for digits
    ("encoder.input.", "encoder.conv_in."),
    ("encoder.output.", "encoder.conv_out."),
    ("decoder.input.", "decoder.conv_in."),
    ("decoder.output.", "decoder.conv_out."),
    ("decoder.norm.", "decoder.norm_out."),
    ("encoder.stages.{s}.{i}.", "encoder.down_blocks.{s}.{i}."),
    ("decoder.stages.{s}.{i}.", "decoder.up_blocks.{s}.{i}."),
)
_BLOCK: tuple[tuple[str, str], ...] = (
    ("attention.scales.{s}.depthwise.", "attn.to_qkv_multiscale.{s}.proj_in."),
    ("attention.scales.{s}.pointwise.", "attn.to_qkv_multiscale.{s}.proj_out."),
    ("attention.proj.", "attn.to_out."),
    ("attention.norm.", "attn.norm_out."),
    ("attention.qkv.", "attn.to_qkv."),  # cut or joined apart from the renaming
    ("ffn.expand.", "conv_out.conv_inverted."),
    ("ffn.depthwise.", "conv_out.conv_depth."),
    ("ffn.project.", "conv_out.conv_point."),
    ("ffn.norm.", "conv_out.norm."),
)
_SQUEEZED = "attn.to_out.weight"
_FUSED = "attn.to_qkv.weight"
_PARTS = ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")


def _replace_prefix(name: str, table: tuple[tuple[str, str], ...], source: int) -> str | None:
    """The name with its prefix translated from column `source` to the other column, or None where no row matches."""
    for row in table:
        pattern = re.escape(row[source]).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{i\}", r"(?P<i>\d+)")
        if match := re.match(pattern, name):
            return row[1 - source].format(**match.groupdict()) + name[match.end() :]
    return None


def _rename(name: str, source: int) -> str:
    outer = _replace_prefix(name, _PATTERNS, source)
    if outer is None:
        side = ("our", "diffusers'")[source]
        raise ValueError(f"DC-AE weights: {name!r} is no name of {side} layout")
    head = re.match(r"(?:en|de)coder\.[a-z_]+\.\d+\.\d+\.", outer)
    if head is None:
        return outer
    inner = outer[head.end() :]
    return head.group() + (_replace_prefix(inner, _BLOCK, source) or inner)


def dc_ae_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `AutoencoderDC` -> state dict of `sana.encoder.autoencoder.dc_ae.DCAE`.

    Raises:
        ValueError: a name of another layout, or one of to_q, to_k, to_v without the others.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None:
            renamed = _rename(name, source=1)
            ours[renamed] = tensor[..., None, None] if name.endswith(_SQUEEZED) else tensor
        elif part == _PARTS[0]:
            prefix = name.removesuffix(part)
            missing = [prefix + other for other in _PARTS if prefix + other not in state]
            if missing:
                raise ValueError(f"DC-AE weights: {name!r} without {missing}")
            fused = torch.cat([state[prefix + other] for other in _PARTS])
            ours[_rename(prefix + _FUSED, source=1)] = fused[..., None, None]
        elif name.removesuffix(part) + _PARTS[0] not in state:
            raise ValueError(f"DC-AE weights: {name!r} without {name.removesuffix(part) + _PARTS[0]!r}")
    return ours


def dc_ae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `sana.encoder.autoencoder.dc_ae.DCAE` -> state dict of `AutoencoderDC`.

    Raises:
        ValueError: a name of another layout.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed = _rename(name, source=0)
        if renamed.endswith(_FUSED):
            prefix = renamed.removesuffix(_FUSED)
            parts = tensor.flatten(1).chunk(3)
            theirs |= {prefix + part: rows for part, rows in zip(_PARTS, parts, strict=True)}
        else:
            theirs[renamed] = tensor.flatten(1) if renamed.endswith(_SQUEEZED) else tensor
    return theirs
