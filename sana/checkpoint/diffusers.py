"""SANA transformer weights between our names and those of diffusers' `SanaTransformer2DModel`.

Both ways only rename, split, join and reshape, so a round trip returns the same bits. diffusers keeps q, k and v apart
and writes 1x1 convolutions as four-dimensional kernels; ours are fused and linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Rule:
    """One of our parameters and the diffusers parameters it is joined from along dimension 0.

    kernel: the 1x1 or patch convolution has this many spatial sizes to drop or restore: 0 none, 2 for a kernel.
    """

    ours: str
    theirs: tuple[str, ...]
    kernel: bool = False


def _linear(ours: str, *theirs: str, bias: bool = True, kernel: bool = False) -> list[_Rule]:
    rules = [_Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), kernel)]
    if bias:
        rules.append(_Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)))
    return rules


def _rules(depth: int, qk_norm: bool, guidance: bool, text_norm: bool) -> list[_Rule]:
    time = "time_embed." if guidance else "time_embed.emb."
    rules = [
        *_linear("patch_embed.linear", "patch_embed.proj", kernel=True),
        *_linear("time_embed.fc1", f"{time}timestep_embedder.linear_1"),
        *_linear("time_embed.fc2", f"{time}timestep_embedder.linear_2"),
        *_linear("modulation.linear", "time_embed.linear"),
        *_linear("text_embed.fc1", "caption_projection.linear_1"),
        *_linear("text_embed.fc2", "caption_projection.linear_2"),
        *_linear("final.linear", "proj_out"),
        _Rule("final.table", ("scale_shift_table",)),
    ]
    if guidance:
        rules += _linear("guidance_embed.fc1", "time_embed.guidance_embedder.linear_1")
        rules += _linear("guidance_embed.fc2", "time_embed.guidance_embedder.linear_2")
    if text_norm:
        rules.append(_Rule("text_embed.norm.weight", ("caption_norm.weight",)))
    for i in range(depth):
        us, them = f"blocks.{i}", f"transformer_blocks.{i}"
        rules += [
            _Rule(f"{us}.table", (f"{them}.scale_shift_table",)),
            *_linear(f"{us}.mixer.qkv", *(f"{them}.attn1.to_{part}" for part in "qkv"), bias=False),
            *_linear(f"{us}.mixer.proj", f"{them}.attn1.to_out.0"),
            *_linear(f"{us}.cross.q", f"{them}.attn2.to_q"),
            *_linear(f"{us}.cross.kv", f"{them}.attn2.to_k", f"{them}.attn2.to_v"),
            *_linear(f"{us}.cross.proj", f"{them}.attn2.to_out.0"),
            *_linear(f"{us}.ffn.inverted", f"{them}.ff.conv_inverted", kernel=True),
            *_linear(f"{us}.ffn.depthwise", f"{them}.ff.conv_depth"),
            *_linear(f"{us}.ffn.point", f"{them}.ff.conv_point", bias=False, kernel=True),
        ]
        if qk_norm:
            for ours, theirs in (("mixer", "attn1"), ("cross", "attn2")):
                for part in "qk":
                    rules.append(_Rule(f"{us}.{ours}.{part}_norm.weight", (f"{them}.{theirs}.norm_{part}.weight",)))
    return rules


def sana_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `SanaTransformer2DModel` -> state dict of `sana.network.sana.Sana`.

    Depth, q/k norms and the guidance embedding are read from the names present.

    Raises:
        ValueError: naming the keys that are missing or not understood.
    """
    rules = _rules(
        depth=_depth(state, "transformer_blocks"),
        qk_norm=any(".norm_q." in name for name in state),
        guidance=any("guidance_embedder" in name for name in state),
        text_norm=True,
    )
    _check(state, (name for rule in rules for name in rule.theirs), "diffusers SANA transformer")
    converted = {}
    for rule in rules:
        parts = [state[name].flatten(1) if rule.kernel else state[name] for name in rule.theirs]
        converted[rule.ours] = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
    return converted


def sana_to_diffusers(state: Mapping[str, Tensor], patch: int = 1) -> dict[str, Tensor]:
    """State dict of `sana.network.sana.Sana` -> state dict of `SanaTransformer2DModel`; patch as in the network.

    Raises:
        ValueError: naming the keys that are missing or that diffusers has no place for.
    """
    rules = _rules(
        depth=_depth(state, "blocks"),
        qk_norm=any(".q_norm." in name for name in state),
        guidance=any(name.startswith("guidance_embed.") for name in state),
        text_norm=True,
    )
    _check(state, (rule.ours for rule in rules), "SANA network, as far as diffusers can hold it")
    converted = {}
    for rule in rules:
        side = patch if rule.ours.startswith("patch_embed.") else 1
        for name, part in zip(rule.theirs, state[rule.ours].chunk(len(rule.theirs)), strict=True):
            converted[name] = (part.unflatten(1, (-1, side, side)) if rule.kernel else part).clone()
    return converted


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    """Number of layers named in the state dict; gaps are left for `_check` to name."""
    indices = [int(name.split(".")[1]) for name in state if name.startswith(f"{blocks}.")]
    if not indices:
        raise ValueError(f"not a SANA transformer: no key begins with '{blocks}.' among {len(state)} keys")
    return max(indices) + 1


def _check(state: Mapping[str, Tensor], expected: Iterable[str], what: str) -> None:
    wanted = set(expected)
    missing, extra = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or extra:
        raise ValueError(f"state dict is not that of a {what}: missing {_name(missing)}, unexpected {_name(extra)}")


def _name(keys: list[str], limit: int = 12) -> str:
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (", ".join(keys[:limit]) + rest) if keys else "none"
