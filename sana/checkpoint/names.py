"""What each parameter of a SANA transformer is called here, in the original files and in diffusers.

| here | original (.pth) | diffusers |
|---|---|---|
| q, k, v in one matrix; k, v of the caption in one | the same | apart |
| 1x1 and patch convolutions are linear (out, in) | kernels (out, in, p, p) | kernels |

So every way between the three only renames, cuts, joins and reshapes, and no bit changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

EXTRAS = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
"""What original files hold beside the network: a position table (recomputed here for every size), the null caption
(the text encoder gives it here), the head that weighs the loss in Sprint's training."""


@dataclass(frozen=True)
class Rule:
    """One of our parameters.

    Attributes:
        ours, native: its name here and in the original files.
        diffusers: the parameters that it is joined from along dimension 0.
        kernel: elsewhere it is the kernel of a convolution: square sides that are flattened here.
        patch: that kernel's side is the patch, not 1.
    """

    ours: str
    native: str
    diffusers: tuple[str, ...]
    kernel: bool = False
    patch: bool = False


@dataclass(frozen=True)
class Shape:
    """What a SANA transformer's parameter names depend on."""

    depth: int
    self_norm: bool = False
    cross_norm: bool = False
    guidance: bool = False
    text_norm: bool = True


def rules(shape: Shape) -> list[Rule]:
    """One rule per parameter, in the order of our state dict."""
    time = "time_embed." if shape.guidance else "time_embed.emb."
    found = [
        *_linear("patch_embed.linear", "x_embedder.proj", "patch_embed.proj", kernel=True, patch=True),
        *_linear("time_embed.fc1", "t_embedder.mlp.0", f"{time}timestep_embedder.linear_1"),
        *_linear("time_embed.fc2", "t_embedder.mlp.2", f"{time}timestep_embedder.linear_2"),
    ]
    if shape.guidance:
        found += _linear("guidance_embed.fc1", "cfg_embedder.mlp.0", "time_embed.guidance_embedder.linear_1")
        found += _linear("guidance_embed.fc2", "cfg_embedder.mlp.2", "time_embed.guidance_embedder.linear_2")
    found += [
        *_linear("modulation.linear", "t_block.1", "time_embed.linear"),
        *_linear("text_embed.fc1", "y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        *_linear("text_embed.fc2", "y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ]
    if shape.text_norm:
        found.append(Rule("text_embed.norm.weight", "attention_y_norm.weight", ("caption_norm.weight",)))
    for i in range(shape.depth):
        found += _block(shape, f"blocks.{i}", f"transformer_blocks.{i}")
    return [
        *found,
        Rule("final.table", "final_layer.scale_shift_table", ("scale_shift_table",)),
        *_linear("final.linear", "final_layer.linear", "proj_out"),
    ]


def shape_of(names: Collection[str], layout: str) -> Shape:
    """The shape that a set of names has; gaps in it show later, as missing names.

    Args:
        names: of parameters.
        layout: "sana" (ours), "native" or "diffusers".

    Raises:
        ValueError: no block is named.
    """
    blocks = "transformer_blocks." if layout == "diffusers" else "blocks."
    indices = [int(n.split(".")[1]) for n in names if n.startswith(blocks) and n.split(".")[1].isdigit()]
    if not indices:
        raise ValueError(f"not a SANA transformer: no key begins with '{blocks}' among {len(names)} keys")
    if max(indices) >= len(names):  # a table of that length would be made before anything is missed
        raise ValueError(f"not a SANA transformer: block {max(indices)} among {len(names)} keys")
    own, other, guidance, text = {
        "sana": (".mixer.q_norm.", ".cross.q_norm.", "guidance_embed.", "text_embed.norm."),
        "native": (".attn.q_norm.", ".cross_attn.q_norm.", "cfg_embedder.", "attention_y_norm."),
        "diffusers": (".attn1.norm_q.", ".attn2.norm_q.", "time_embed.guidance_embedder.", "caption_norm."),
    }[layout]
    return Shape(
        depth=max(indices) + 1,
        self_norm=any(own in name for name in names),
        cross_norm=any(other in name for name in names),
        guidance=any(name.startswith(guidance) for name in names),
        text_norm=any(name.startswith(text) for name in names),
    )


def list_names(names: list[str], limit: int = 12) -> str:
    """Names for a message, the first `limit` of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + rest) if names else "none"


def _linear(
    ours: str, native: str, *theirs: str, bias: bool = True, kernel: bool = False, patch: bool = False
) -> list[Rule]:
    made = [Rule(f"{ours}.weight", f"{native}.weight", tuple(f"{name}.weight" for name in theirs), kernel, patch)]
    if bias:
        made.append(Rule(f"{ours}.bias", f"{native}.bias", tuple(f"{name}.bias" for name in theirs)))
    return made


def _block(shape: Shape, us: str, them: str) -> list[Rule]:
    def norms(ours: str, native: str, theirs: str) -> list[Rule]:
        return [
            Rule(
                f"{us}.{ours}.{p}_norm.weight", f"{us}.{native}.{p}_norm.weight", (f"{them}.{theirs}.norm_{p}.weight",)
            )
            for p in "qk"
        ]

    return [
        Rule(f"{us}.table", f"{us}.scale_shift_table", (f"{them}.scale_shift_table",)),
        *_linear(f"{us}.mixer.qkv", f"{us}.attn.qkv", *(f"{them}.attn1.to_{p}" for p in "qkv"), bias=False),
        *(norms("mixer", "attn", "attn1") if shape.self_norm else []),
        *_linear(f"{us}.mixer.proj", f"{us}.attn.proj", f"{them}.attn1.to_out.0"),
        *_linear(f"{us}.cross.q", f"{us}.cross_attn.q_linear", f"{them}.attn2.to_q"),
        *_linear(f"{us}.cross.kv", f"{us}.cross_attn.kv_linear", f"{them}.attn2.to_k", f"{them}.attn2.to_v"),
        *(norms("cross", "cross_attn", "attn2") if shape.cross_norm else []),
        *_linear(f"{us}.cross.proj", f"{us}.cross_attn.proj", f"{them}.attn2.to_out.0"),
        *_linear(f"{us}.ffn.inverted", f"{us}.mlp.inverted_conv.conv", f"{them}.ff.conv_inverted", kernel=True),
        *_linear(f"{us}.ffn.depthwise", f"{us}.mlp.depth_conv.conv", f"{them}.ff.conv_depth"),
        *_linear(f"{us}.ffn.point", f"{us}.mlp.point_conv.conv", f"{them}.ff.conv_point", bias=False, kernel=True),
    ]
