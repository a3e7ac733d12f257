"""A network quantised by SVDQuant as one file in the layout that nunchaku's `NunchakuSanaTransformer2DModel` reads.

Names and shapes are those of nunchaku's SanaModel (src/SanaModel.cpp, src/Linear.cpp); the order of numbers within a
layer is that of `sana.checkpoint.nunchaku_order`. In each block

| here | there | bits |
|---|---|---|
| mixer.qkv | attn.qkv_proj: q, then k and v of each head in turn, with zero heads up to a multiple of 128 | 4 |
| its v | attn.pag_to_v, which only layers with perturbed-attention guidance read | 4 |
| mixer.proj, cross.q, cross.proj | attn.out_proj, cross_attn.q_linear, cross_attn.out_proj | 4 |
| cross.kv | cross_attn.kv_linear | 16 |
| ffn.inverted, ffn.depthwise | ff.inverted_conv, ff.depth_conv: value and gate of each channel in turn | 4, 16 |
| ffn.point | ff.point_conv | 4 |
| table | scale_shift_table | 16 |

and all else has diffusers' names, in 16 bits. Queries, keys and values are one layer here too, so one smoothing and one
branch serve them there as they did in the fit; rows only change places, and nothing is fitted or rounded again except
biases (to bfloat16).

nunchaku itself differs in three places. It adds no bias after self-attention (the file has it as attn.out_proj.bias,
which nunchaku does not look for). It adds 1e-6 to the denominator of that attention. With NVFP4 it rounds activations
without a scale per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.checkpoint.diffusers_config import require, transformer_config
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.names import list_names
from sana.checkpoint.nunchaku_order import (
    RANK,
    TILE,
    pack_codes,
    pack_columns,
    pack_down,
    pack_micro_scales,
    pack_up,
    pack_vector,
)
from sana.checkpoint.tensors import Tensors, from_dict
from sana.checkpoint.transformer import from_ours
from sana.checkpoint.write import Progress, in_place, write_safetensors

KIND = "svdquant_w4a4"
HEAD = 32
"""Channels per head of nunchaku's linear attention."""
FOUR_BITS = {
    "mixer.qkv": "attn.qkv_proj",
    "mixer.proj": "attn.out_proj",
    "cross.q": "cross_attn.q_linear",
    "cross.proj": "cross_attn.out_proj",
    "ffn.inverted": "ff.inverted_conv",
    "ffn.point": "ff.point_conv",
}
"""Layers of a block that nunchaku multiplies in 4 bits."""

Make = Callable[[Tensor], Tensor]
Rows = Callable[[Tensor, float], Tensor]
"""(rows, value of new ones) -> rows in another order, perhaps more of them."""


def nunchaku_tensors(state: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]], facts: Facts) -> Tensors:
    """The tensors of a quantised network under nunchaku's names and in its order, made when asked for.

    Args:
        state: of a quantised `sana.network.sana.Sana`.
        layers: name of a quantised layer -> its "kind" and settings, as a file's record has them.
        facts: all of the network's.

    Raises:
        CheckpointError: the network has parts that nunchaku's has not, or other layers are quantised than there.
    """
    source = from_dict(state)
    _check(layers, facts)
    made: dict[str, tuple[str, Make]] = {}
    for i in range(facts.depth):
        made |= _block(source, f"blocks.{i}", f"transformer_blocks.{i}", layers, facts)
    like = {new: make(source.like[old]) for new, (old, make) in made.items()}
    blocks = Tensors(like, lambda new: made[new][1](source[made[new][0]]))
    rest = _outside(source, layers, facts)
    return Tensors({**blocks.like, **rest.like}, lambda name: (blocks if name in blocks else rest)[name])


def write_nunchaku(
    path: str | Path,
    tensors: Tensors,
    layers: Mapping[str, Mapping[str, Any]],
    facts: Facts,
    progress: Progress | None = None,
) -> None:
    """Write the file, whole or not at all.

    Args:
        path: new file.
        tensors: as `nunchaku_tensors` made them.
        layers, facts: as given there.
        progress: called with the bytes of every tensor written.

    Raises:
        CheckpointError: the place is taken, a tensor is not finite, or a fact is missing.
    """
    settings = next(iter(layers.values()))
    metadata = {
        "format": "pt",
        "model_class": "NunchakuSanaTransformer2DModel",
        "config": json.dumps(transformer_config(facts)),
        "quantization_config": json.dumps(_described(settings["precision"], _up(settings["rank"], RANK))),
    }
    with in_place(path) as temporary:
        write_safetensors(temporary, tensors, metadata, progress)


def bias_lost(state: Mapping[str, Tensor], facts: Facts) -> float:
    """The largest |bias| after self-attention, which nunchaku does not add."""
    names = [f"blocks.{i}.mixer.proj.bias" for i in range(facts.depth)]
    return max(float(state[name].abs().max()) for name in names)


def _check(layers: Mapping[str, Mapping[str, Any]], facts: Facts) -> None:
    require(facts, "head_dim")
    if facts.self_norm or facts.cross_norm:
        raise CheckpointError("nunchaku: its Sana has no norm of queries and keys; this network has (SANA-1.5, Sprint)")
    if facts.head_dim != HEAD:
        raise CheckpointError(f"nunchaku: its self-attention has {HEAD} channels per head, this one {facts.head_dim}")
    wanted = [f"blocks.{i}.{name}" for i in range(facts.depth) for name in FOUR_BITS]
    if over := sorted(set(layers) - set(wanted)):
        patterns = ",".join(dict.fromkeys(f'"{_pattern(name)}"' for name in over))
        raise CheckpointError(
            f"nunchaku: keeps {list_names(over)} in 16 bits; quantise with quant.exclude=[{patterns}], and what you "
            "exclude already"
        )
    if lacking := [name for name in wanted if name not in layers]:
        raise CheckpointError(
            f"nunchaku: has {list_names(lacking)} in 4 bits; quantise them too (see quant.include and quant.exclude)"
        )
    if others := [name for name in wanted if layers[name]["kind"] != KIND]:
        raise CheckpointError(f"nunchaku: reads quant={KIND}; {others[0]} is {layers[others[0]]['kind']}")
    if len({(layer["precision"], layer["rank"]) for layer in layers.values()}) > 1:
        raise CheckpointError("nunchaku: layers of one file have one precision and one rank")


def _pattern(name: str) -> str:
    """The pattern of all blocks' layers of that name."""
    return "*." + name.split(".", 2)[2] if name.startswith("blocks.") else name


def _block(
    source: Tensors, us: str, them: str, layers: Mapping[str, Mapping[str, Any]], facts: Facts
) -> dict[str, tuple[str, Make]]:
    """New name -> old name, and how its tensor is made of the old one."""
    width, hidden = facts.width, hidden_filled(facts)

    def heads(x: Tensor, value: float) -> Tensor:
        q, k, v = (_fill(part, TILE, value) for part in x.chunk(3))
        pairs = torch.stack([k.unflatten(0, (-1, HEAD)), v.unflatten(0, (-1, HEAD))], dim=1)
        return torch.cat([q, pairs.flatten(0, 2)])

    def values(x: Tensor, value: float) -> Tensor:
        return x[2 * width :]

    def gates(x: Tensor, value: float) -> Tensor:
        value_, gate = (_fill(part, hidden, value) for part in x.chunk(2))
        return torch.stack([value_, gate], dim=1).flatten(0, 1)

    made: dict[str, tuple[str, Make]] = {}
    rows: dict[str, Rows] = {"mixer.qkv": heads, "ffn.inverted": gates}
    for ours, theirs in FOUR_BITS.items():
        settings = layers[f"{us}.{ours}"]
        made |= _layer(source, f"{us}.{ours}", f"{them}.{theirs}", settings, rows.get(ours, _same))
    made |= _layer(source, f"{us}.mixer.qkv", f"{them}.attn.pag_to_v", layers[f"{us}.mixer.qkv"], values)
    return made | {
        f"{them}.scale_shift_table": (f"{us}.table", _half),
        f"{them}.cross_attn.kv_linear.weight": (f"{us}.cross.kv.weight", _half),
        f"{them}.cross_attn.kv_linear.bias": (f"{us}.cross.kv.bias", _half),
        f"{them}.ff.depth_conv.weight": (
            f"{us}.ffn.depthwise.weight",
            lambda x: _half(gates(x, 0).permute(0, 2, 3, 1).contiguous()),
        ),
        f"{them}.ff.depth_conv.bias": (f"{us}.ffn.depthwise.bias", lambda x: _half(gates(x, 0))),
    }


def _layer(source: Tensors, us: str, them: str, settings: Mapping[str, Any], rows: Rows) -> dict[str, tuple[str, Make]]:
    """The tensors of one 4-bit layer. New outputs and inputs have code 0, scale 1, smoothing 1."""
    fp4 = settings["precision"] == "nvfp4"

    def codes(x: Tensor) -> Tensor:
        full = torch.stack([x & 15, x >> 4], dim=-1).flatten(1)  # e2m1, or integers + 8: the top bit makes them signed
        return pack_codes(_fill2(rows(full if fp4 else full ^ 8, 0), TILE, TILE, 0))

    def scales(x: Tensor) -> Tensor:
        if not fp4:
            return pack_columns(_fill2(rows(x.mT, 1), TILE, TILE // 64, 1))
        one = 0x38  # 1 as e4m3; bytes, as not every operation knows the type
        full = _fill2(rows(x.view(torch.uint8).mT, one), TILE, TILE // 16, one)
        return pack_micro_scales(full.view(torch.float8_e4m3fn))

    found: dict[str, tuple[str, Make]] = {
        "qweight": ("qweight", codes),
        "wscales": ("wscales", scales),
        "smooth": ("smooth_factor", lambda x: pack_vector(_half(_fill(x, TILE, 1)))),
    }
    if fp4:
        found["wtscale"] = ("wtscale", _same_tensor)
    if settings["rank"]:
        found["lora_down"] = ("proj_down", lambda x: pack_down(_half(_fill2(x, TILE, RANK, 0))))
        found["lora_up"] = ("proj_up", lambda x: pack_up(_half(_fill2(rows(x, 0), TILE, RANK, 0))))
    if f"{us}.bias" in source:
        found["bias"] = ("bias", lambda x: pack_vector(_half(_fill(rows(x, 0), TILE, 0))))
    return {f"{them}.{new}": (f"{us}.{old}", make) for new, (old, make) in found.items()}


def _outside(source: Tensors, layers: Mapping[str, Mapping[str, Any]], facts: Facts) -> Tensors:
    """What is not in the blocks, under diffusers' names.

    Raises:
        CheckpointError: names that a SANA network of this project does not have.
    """
    own = {f"{layer}.{name}" for layer in layers for name in _BUFFERS}
    plain = {name: like for name, like in source.like.items() if name not in own}
    # Only names matter of the layers in blocks; their tensors are never asked for.
    plain |= {f"{layer}.weight": torch.empty(6, 1, device="meta") for layer in layers}
    theirs, _ = from_ours(Tensors(plain, source.__getitem__), "diffusers", require(facts, "patch").patch)
    like = {n: t for n, t in theirs.like.items() if not n.startswith("transformer_blocks.")}
    return Tensors({name: _half(t) for name, t in like.items()}, lambda name: _half(theirs[name]))


_BUFFERS = ("qweight", "wscales", "wtscale", "smooth_factor", "proj_down", "proj_up")


def hidden_filled(facts: Facts) -> int:
    """Hidden channels of nunchaku's Mix-FFN: its rounding of ratio times width, filled up to a multiple of 64."""
    exact = transformer_config(facts)["mlp_ratio"] * facts.width
    return _up(math.floor(exact + 0.5), 64)


def _described(precision: str, rank: int) -> dict[str, Any]:
    """nunchaku's words for the format."""
    if precision == "nvfp4":
        kind = {"dtype": "fp4_e2m1_all", "group_size": 16}
        weight, activation = {"scale_dtype": [None, "fp8_e4m3_nan"]}, {"scale_dtype": "fp8_e4m3_nan"}
    else:
        kind = {"dtype": "int4", "group_size": 64}
        weight, activation = {"scale_dtype": None}, {"scale_dtype": None}
    return {"method": "svdquant", "weight": kind | weight, "activation": kind | activation, "rank": rank}


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _fill(x: Tensor, multiple: int, value: float) -> Tensor:
    """More rows up to a multiple."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % multiple), value=value)


def _fill2(x: Tensor, rows: int, columns: int, value: float) -> Tensor:
    """More rows and columns up to multiples."""
    return F.pad(x, (0, -x.shape[1] % columns, 0, -len(x) % rows), value=value)


def _same(x: Tensor, value: float) -> Tensor:
    return x


def _same_tensor(x: Tensor) -> Tensor:
    return x


def _half(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)
