"""What a set of tensors is, read from names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.names import shape_of
from sana.checkpoint.record import EXTRA
from sana.checkpoint.transformer import Layout

LATER = "is not part of this version; weights of SANA 1.0, 1.5 and Sprint are"

OTHERS: tuple[tuple[str, str, str], ...] = (
    # what it is, a name that gives it away (searched in every name), what to say of it
    ("adapters", r"\.lora_[AB]\.|\.lora_(up|down)\.", "adapters (LoRA), which change a network and are none"),
    ("controlnet", r"^controlnet\.\d+\.|^controlnet_blocks\.|^input_block\.", "a ControlNet; its network " + LATER),
    ("world", r"\.attn\.A_log$|^plucker_embedder\.|\.q_proj_cam\.", "a SANA-WM world model; its network " + LATER),
    ("video2", r"\.attn\.beta_proj\.|\.(w_attn|w_mlp)$", "SANA-Video 2; its network " + LATER),
    ("video", r"\.mlp\.t_conv\.|\.ff\.conv_temp\.|^patch_embedding\.", "SANA-Video; its network " + LATER),
    ("sprint", r"^(generator|dit|student)\.|\.heads\.\d+\.", "a training state of several networks; save one of them"),
    ("text", r"(^|\.)layers\.\d+\.self_attn\.", "a text encoder; give it as encoder.text.path"),
    ("batch_norm", r"^(en|de)coder\..*\.running_mean$", "a DC-AE with batch norms, which none of SANA's has"),
)  # fmt: skip


def kind_of(names: Collection[str]) -> tuple[str, Layout]:
    """ "transformer" or "dc_ae", and whose names they are.

    Raises:
        CheckpointError: another family, by its name, or nothing that is known here.
    """
    for _, pattern, what in OTHERS:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            raise CheckpointError(f"is {what} (it has {found})")
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        if any(".op_list." in name or ".project_in." in name for name in names):
            return "dc_ae", "native"
        return "dc_ae", "diffusers" if any("_blocks." in name for name in names) else "sana"
    if any(name.startswith("transformer_blocks.") for name in names):
        return "transformer", "diffusers"
    if any(name.startswith("blocks.") for name in names):
        return "transformer", "native" if any(name.startswith("x_embedder.") for name in names) else "sana"
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(f"holds no weights that are known here ({len(names)} keys, first {shown or 'none'})")


def recognise(tensors: Mapping[str, Tensor], layout: Layout) -> Facts:
    """Facts of a transformer as its tensors tell them.

    Args:
        tensors: by name; only shapes are looked at, so the meta device will do.
        layout: of the names, from `kind_of`.

    Raises:
        CheckpointError: a tensor that tells something is missing, or has too many or too few dimensions.
    """
    patch_name, text_name, point_name, final_name = {
        "sana": ("patch_embed.linear.weight", "text_embed.fc1.weight", "blocks.0.ffn.point.weight",
                 "final.linear.weight"),
        "native": ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.point_conv.conv.weight",
                   "final_layer.linear.weight"),
        "diffusers": ("patch_embed.proj.weight", "caption_projection.linear_1.weight",
                      "transformer_blocks.0.ff.conv_point.weight", "proj_out.weight"),
    }[layout]  # fmt: skip
    shapes = {}
    for name in (patch_name, text_name, point_name, final_name):
        if name not in tensors:
            raise CheckpointError(f"is no SANA transformer: {name} is missing")
        shapes[name] = tuple(tensors[name].shape)
    embed = shapes[patch_name]
    if len(embed) == 5:
        raise CheckpointError(f"is SANA-Video; its network {LATER} ({patch_name} has the shape {embed})")
    want = 2 if layout == "sana" else 4
    wrong = [f"{n} {s}" for n, s in shapes.items() if len(s) != (want if n in (patch_name, point_name) else 2)]
    if wrong:
        raise CheckpointError(f"is no SANA transformer of known layers: {wrong[0]}")
    names = [name for name in tensors if not name.startswith(EXTRA)]
    try:
        shape = shape_of(names, layout)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    # Our patch embedding is linear: 32 inputs are 32 channels, or 8 in patches of 2x2. The header knows.
    channels, patch = (None, None) if layout == "sana" else (embed[1], embed[2])
    table = tensors.get("pos_embed", tensors.get(EXTRA + "pos_embed"))
    base = None
    if table is not None and table.ndim == 3:
        side = math.isqrt(table.shape[1])
        base = side if side * side == table.shape[1] else None
    norms = shape.self_norm or shape.cross_norm
    return Facts(
        family="sprint" if shape.guidance else "sana15" if norms else "sana",
        depth=shape.depth,
        width=embed[0],
        hidden=shapes[point_name][1],
        in_channels=channels,
        patch=patch,
        text_channels=shapes[text_name][1],
        self_norm=shape.self_norm,
        cross_norm=shape.cross_norm,
        text_norm=shape.text_norm,
        guidance=shape.guidance,
        base=base,
    )
