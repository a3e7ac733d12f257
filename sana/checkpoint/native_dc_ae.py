"""DC-AE weights between our names and those of the original files (efficientvit); both ways exact to the bit.

The same tensors under other names: the original wraps each block in its residual (``main``) and each stage in a
sequence (``op_list``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STAGE = r"(?P<side>encoder|decoder)\.stages\.(?P<s>\d+)\.op_list\.(?P<i>\d+)\."
_SCALE = r"context_module\.main\.aggreg\.(?P<k>\d+)\."
_FROM: tuple[tuple[str, str], ...] = (
    # original (a pattern), ours
    (r"encoder\.project_in\.conv\.conv\.", "encoder.input.conv."),
    (r"encoder\.project_in\.conv\.", "encoder.input."),
    (r"encoder\.project_out\.(main\.)?op_list\.0\.conv\.", "encoder.output."),
    (r"decoder\.project_in\.(main\.)?conv\.", "decoder.input."),
    (r"decoder\.project_out\.op_list\.0\.", "decoder.norm."),
    (r"decoder\.project_out\.op_list\.2\.conv\.conv\.", "decoder.output.conv."),
    (r"decoder\.project_out\.op_list\.2\.conv\.", "decoder.output."),
    (_STAGE + r"main\.conv1\.conv\.", "{side}.stages.{s}.{i}.conv1."),
    (_STAGE + r"main\.conv2\.conv\.", "{side}.stages.{s}.{i}.conv2."),
    (_STAGE + r"main\.conv2\.norm\.", "{side}.stages.{s}.{i}.norm."),
    (_STAGE + r"main\.conv\.(conv\.)?", "{side}.stages.{s}.{i}.conv."),
    (_STAGE + r"context_module\.main\.qkv\.conv\.", "{side}.stages.{s}.{i}.attention.qkv."),
    (_STAGE + _SCALE + r"0\.", "{side}.stages.{s}.{i}.attention.scales.{k}.depthwise."),
    (_STAGE + _SCALE + r"1\.", "{side}.stages.{s}.{i}.attention.scales.{k}.pointwise."),
    (_STAGE + r"context_module\.main\.proj\.conv\.", "{side}.stages.{s}.{i}.attention.proj."),
    (_STAGE + r"context_module\.main\.proj\.norm\.", "{side}.stages.{s}.{i}.attention.norm."),
    (_STAGE + r"local_module\.main\.inverted_conv\.conv\.", "{side}.stages.{s}.{i}.ffn.expand."),
    (_STAGE + r"local_module\.main\.depth_conv\.conv\.", "{side}.stages.{s}.{i}.ffn.depthwise."),
    (_STAGE + r"local_module\.main\.point_conv\.conv\.", "{side}.stages.{s}.{i}.ffn.project."),
    (_STAGE + r"local_module\.main\.point_conv\.norm\.", "{side}.stages.{s}.{i}.ffn.norm."),
)  # fmt: skip
_INSIDE: tuple[tuple[str, str], ...] = (
    # ours within a block, original
    ("conv1.", "main.conv1.conv."),
    ("conv2.", "main.conv2.conv."),
    ("norm.", "main.conv2.norm."),
    ("attention.qkv.", "context_module.main.qkv.conv."),
    ("attention.proj.", "context_module.main.proj.conv."),
    ("attention.norm.", "context_module.main.proj.norm."),
    ("ffn.expand.", "local_module.main.inverted_conv.conv."),
    ("ffn.depthwise.", "local_module.main.depth_conv.conv."),
    ("ffn.project.", "local_module.main.point_conv.conv."),
    ("ffn.norm.", "local_module.main.point_conv.norm."),
)


def dc_ae_from_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an original file -> state dict of `sana.encoder.autoencoder.dc_ae.DCAE`.

    Raises:
        ValueError: a name of another layout.
    """
    # Without blocks at full resolution the first convolution is a resampling, which a strided one does not show.
    merged = not any(name.startswith("encoder.stages.0.") for name in state)
    return {_to_ours(name, merged): tensor for name, tensor in state.items()}


def dc_ae_to_native(state: Mapping[str, Tensor], encoder_shuffle: bool, latent_shortcut: bool) -> dict[str, Tensor]:
    """State dict of `DCAE` -> state dict of the original code.

    Args:
        state: ours.
        encoder_shuffle, latent_shortcut: as the DCAE was built; they decide how deep some layers are wrapped.

    Raises:
        ValueError: a name of another layout.
    """
    return {_to_native(name, encoder_shuffle, latent_shortcut): tensor for name, tensor in state.items()}


def _to_ours(name: str, merged: bool) -> str:
    if merged and (match := re.match(r"encoder\.project_in\.conv\.(conv\.)?", name)):
        return "encoder.input.conv." + name[match.end() :]
    for pattern, ours in _FROM:
        if match := re.match(pattern, name):
            return ours.format(**match.groupdict()) + name[match.end() :]
    raise ValueError(f"DC-AE weights: {name!r} is no name of the original layout")


def _to_native(name: str, encoder_shuffle: bool, latent_shortcut: bool) -> str:
    wrap = "main." if latent_shortcut else ""
    ends = {
        "encoder.input.conv.": "encoder.project_in.conv.conv." if encoder_shuffle else "encoder.project_in.conv.",
        "encoder.input.": "encoder.project_in.conv.",
        "encoder.output.": f"encoder.project_out.{wrap}op_list.0.conv.",
        "decoder.input.": f"decoder.project_in.{wrap}conv.",
        "decoder.norm.": "decoder.project_out.op_list.0.",
        "decoder.output.conv.": "decoder.project_out.op_list.2.conv.conv.",
        "decoder.output.": "decoder.project_out.op_list.2.conv.",
    }
    for ours, native in ends.items():
        if name.startswith(ours):
            return native + name.removeprefix(ours)
    head = re.match(r"(encoder|decoder)\.stages\.(\d+)\.(\d+)\.", name)
    if head is not None:
        side, s, i = head.groups()
        inner, prefix = name[head.end() :], f"{side}.stages.{s}.op_list.{i}."
        if scale := re.match(r"attention\.scales\.(\d+)\.(depthwise|pointwise)\.", inner):
            part = 0 if scale[2] == "depthwise" else 1
            return f"{prefix}context_module.main.aggreg.{scale[1]}.{part}.{inner[scale.end() :]}"
        if inner.startswith("conv."):
            # A strided convolution is the residual's main part itself; the other resamplers hold one.
            deep = side == "decoder" or encoder_shuffle
            return prefix + ("main.conv.conv." if deep else "main.conv.") + inner.removeprefix("conv.")
        for ours, native in _INSIDE:
            if inner.startswith(ours):
                return prefix + native + inner.removeprefix(ours)
    raise ValueError(f"DC-AE weights: {name!r} is no name of our layout")
