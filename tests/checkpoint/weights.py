"""Random weights in the published layouts, their names and shapes written out from the published code's description
(not from the tables under test)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

WIDTH, DEPTH, HIDDEN, TEXT, CHANNELS, HEADS = 64, 3, 160, 10, 6, 4
VARIANTS = {
    # name: (q/k norms, guidance, interpolation of the position table)
    "sana": (False, False, None),
    "sana 2K": (False, False, 1.0),
    "sana 4K": (False, False, 2.0),
    "sana15": (True, False, None),
    "sprint": (True, True, None),
}


def native_state(
    variant: str, seed: int = 0, depth: int = DEPTH, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A state dict as the original code saves it."""
    norms, guidance, _ = VARIANTS[variant]
    d, m = WIDTH, HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 64, d),
        "x_embedder.proj.weight": (d, CHANNELS, 1, 1),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "t_block.1.weight": (6 * d, d),
        "t_block.1.bias": (6 * d,),
        "y_embedder.y_embedding": (300, TEXT),
        "y_embedder.y_proj.fc1.weight": (d, TEXT),
        "y_embedder.y_proj.fc1.bias": (d,),
        "y_embedder.y_proj.fc2.weight": (d, d),
        "y_embedder.y_proj.fc2.bias": (d,),
        "attention_y_norm.weight": (d,),
        "final_layer.linear.weight": (CHANNELS, d),
        "final_layer.linear.bias": (CHANNELS,),
        "final_layer.scale_shift_table": (2, d),
    }
    if guidance:
        shapes |= {
            "cfg_embedder.mlp.0.weight": (d, 256),
            "cfg_embedder.mlp.0.bias": (d,),
            "cfg_embedder.mlp.2.weight": (d, d),
            "cfg_embedder.mlp.2.bias": (d,),
            "logvar_linear.weight": (1, d),
            "logvar_linear.bias": (1,),
        }
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= {
            b + "scale_shift_table": (6, d),
            b + "attn.qkv.weight": (3 * d, d),
            b + "attn.proj.weight": (d, d),
            b + "attn.proj.bias": (d,),
            b + "cross_attn.q_linear.weight": (d, d),
            b + "cross_attn.q_linear.bias": (d,),
            b + "cross_attn.kv_linear.weight": (2 * d, d),
            b + "cross_attn.kv_linear.bias": (2 * d,),
            b + "cross_attn.proj.weight": (d, d),
            b + "cross_attn.proj.bias": (d,),
            b + "mlp.inverted_conv.conv.weight": (2 * m, d, 1, 1),
            b + "mlp.inverted_conv.conv.bias": (2 * m,),
            b + "mlp.depth_conv.conv.weight": (2 * m, 1, 3, 3),
            b + "mlp.depth_conv.conv.bias": (2 * m,),
            b + "mlp.point_conv.conv.weight": (d, m, 1, 1),
        }
        if norms:
            shapes |= {b + f"{a}.{p}_norm.weight": (d,) for a in ("attn", "cross_attn") for p in "qk"}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5).to(dtype)
        for name, shape in shapes.items()
    }


def full(
    width: int, depth: int, norms: bool = False, guidance: bool = False, base: int | None = None
) -> dict[str, Tensor]:
    """Original names and shapes of a full-size network, on the meta device."""
    d, m = width, int(2.5 * width)
    shapes = {
        "x_embedder.proj.weight": (d, 32, 1, 1), "x_embedder.proj.bias": (d,), "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,), "t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,),
        "t_block.1.weight": (6 * d, d), "t_block.1.bias": (6 * d,), "y_embedder.y_embedding": (300, 2304),
        "y_embedder.y_proj.fc1.weight": (d, 2304), "y_embedder.y_proj.fc1.bias": (d,),
        "y_embedder.y_proj.fc2.weight": (d, d), "y_embedder.y_proj.fc2.bias": (d,), "attention_y_norm.weight": (d,),
        "final_layer.linear.weight": (32, d), "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, d),
    }  # fmt: skip
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= {
            b + "scale_shift_table": (6, d), b + "attn.qkv.weight": (3 * d, d), b + "attn.proj.weight": (d, d),
            b + "attn.proj.bias": (d,), b + "cross_attn.q_linear.weight": (d, d), b + "cross_attn.q_linear.bias": (d,),
            b + "cross_attn.kv_linear.weight": (2 * d, d), b + "cross_attn.kv_linear.bias": (2 * d,),
            b + "cross_attn.proj.weight": (d, d), b + "cross_attn.proj.bias": (d,),
            b + "mlp.inverted_conv.conv.weight": (2 * m, d, 1, 1), b + "mlp.inverted_conv.conv.bias": (2 * m,),
            b + "mlp.depth_conv.conv.weight": (2 * m, 1, 3, 3), b + "mlp.depth_conv.conv.bias": (2 * m,),
            b + "mlp.point_conv.conv.weight": (d, m, 1, 1),
        }  # fmt: skip
        if norms:
            shapes |= {b + f"{a}.{p}_norm.weight": (d,) for a in ("attn", "cross_attn") for p in "qk"}
    if guidance:
        shapes |= {"cfg_embedder.mlp.0.weight": (d, 256), "cfg_embedder.mlp.0.bias": (d,),
                   "cfg_embedder.mlp.2.weight": (d, d), "cfg_embedder.mlp.2.bias": (d,)}  # fmt: skip
    if base is not None:
        shapes["pos_embed"] = (1, base * base, d)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def save(path: Path, state: dict[str, Tensor]) -> Path:
    """A file whose tensors are zeros that take no room on the disk."""
    sparse = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    torch.save({"state_dict": sparse}, path)
    return path


def diffusers_model(variant: str, depth: int = DEPTH, sample: int = 8) -> SanaTransformer2DModel:
    """diffusers' class of the same shape."""
    norms, guidance, interpolation = VARIANTS[variant]
    return SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        num_layers=depth,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=WIDTH // HEADS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT,
        sample_size=sample,
        patch_size=1,
        interpolation_scale=interpolation,
        guidance_embeds=guidance,
        qk_norm="rms_norm_across_heads" if norms else None,
    )


def words(variant: str) -> dict[str, object]:
    """What the tensors of a variant do not tell, as a sidecar says it."""
    _, guidance, interpolation = VARIANTS[variant]
    said: dict[str, object] = {"heads": HEADS, "head_dim": 32, "size": 256, "position": interpolation is not None}
    if interpolation is not None:
        said["interpolation"] = interpolation
    return said if guidance else said | {"flow_shift": 3.0}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, shapes, types and bits."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    if name in sys.modules:
        return sys.modules[name]
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
