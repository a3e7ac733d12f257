"""Original files, our names and diffusers: the same bits every way round, the same function, the full-size counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel
from weights import DEPTH, VARIANTS, WIDTH, diffusers_model, equal, native_state

from sana.checkpoint.diffusers import sana_from_diffusers, sana_to_diffusers
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import EXTRAS
from sana.checkpoint.tensors import Tensors, from_dict
from sana.checkpoint.transformer import from_ours, sana_from_native, sana_to_native, to_ours
from sana.run.build import build
from sana.run.compose import compose


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_native_ours_diffusers_native_is_exact(variant: str, seed: int) -> None:
    native = native_state(variant, seed)
    ours = sana_from_native(native)
    main, extra = from_ours(ours, "diffusers")
    assert main.keys() == diffusers_model(variant).state_dict().keys()
    assert set(extra) == {name for name in native if name in EXTRAS}
    back = {**to_ours(main, "diffusers"), **{f"extra.{name}": value for name, value in extra.items()}}
    assert equal(back, ours)
    assert equal(sana_to_native(back), native)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(variant: str, dtype: torch.dtype) -> None:
    native = native_state(variant, 2, dtype=dtype)
    assert equal(sana_to_native(sana_from_native(native)), native)


def test_rows_of_fused_matrices_go_where_the_published_code_has_them() -> None:
    native = native_state("sana15")
    theirs = sana_to_diffusers({n: t for n, t in sana_from_native(native).items() if not n.startswith("extra.")})
    qkv, kv = native["blocks.1.attn.qkv.weight"], native["blocks.1.cross_attn.kv_linear.bias"]
    for i, part in enumerate("qkv"):
        assert torch.equal(theirs[f"transformer_blocks.1.attn1.to_{part}.weight"], qkv[i * WIDTH : (i + 1) * WIDTH])
    assert torch.equal(theirs["transformer_blocks.1.attn2.to_k.bias"], kv[:WIDTH])
    assert torch.equal(theirs["transformer_blocks.1.attn2.to_v.bias"], kv[WIDTH:])
    assert torch.equal(theirs["transformer_blocks.2.attn2.norm_k.weight"], native["blocks.2.cross_attn.k_norm.weight"])


def test_one_tensor_is_made_at_a_time() -> None:
    native, asked = native_state("sana15"), []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return native[name]

    ours = to_ours(Tensors(from_dict(native).like, read), "native")
    main, _ = from_ours(ours, "diffusers")
    assert not asked
    main["transformer_blocks.0.attn1.to_k.weight"]
    assert asked == ["blocks.0.attn.qkv.weight"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks.1.attn.qkv.weight": None}, "missing blocks.1.attn.qkv.weight, unexpected none"),
        ({"blocks.1.attn.extra.weight": torch.ones(1)}, "missing none, unexpected blocks.1.attn.extra.weight"),
        ({"blocks.2.attn.q_norm.weight": None}, "missing blocks.2.attn.q_norm.weight"),
        ({"blocks.99999999.attn.proj.bias": torch.ones(1)}, "block 99999999 among"),
        ({f"blocks.{i}.scale_shift_table": None for i in range(DEPTH)}, "missing blocks.0.scale_shift_table"),
    ],
)
def test_names_that_are_not_exactly_those_of_a_network_are_refused(change: dict, says: str) -> None:
    state = {n: t for n, t in (native_state("sana15") | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=says):
        to_ours(state, "native")


def test_what_diffusers_has_no_place_for_is_refused() -> None:
    state = {
        n: t for n, t in native_state("sana15").items() if "cross_attn.q_norm" not in n and "cross_attn.k_norm" not in n
    }
    ours = sana_from_native(state)
    assert equal(sana_to_native(ours), state), "the original code can norm one attention only"
    with pytest.raises(CheckpointError, match="one switch for the q/k norms"):
        from_ours(ours, "diffusers")


PUBLISHED = {
    # experiment: parameters (sana's README and papers; 1604.46M in a published training log), then diffusers' config
    "image/sana_600m_512px": (591_747_872, 28, 36, 16, 72, None, 16, None),
    "image/sana_600m_1024px": (591_747_872, 28, 36, 16, 72, None, 32, None),
    "image/sana_1600m_512px": (1_604_462_752, 20, 70, 20, 112, None, 16, None),
    "image/sana_1600m_1024px": (1_604_462_752, 20, 70, 20, 112, None, 32, None),
    "image/sana_1600m_2048px": (1_604_462_752, 20, 70, 20, 112, None, 64, 1.0),
    "image/sana_1600m_4096px": (1_604_462_752, 20, 70, 20, 112, None, 128, 2.0),
    "image/sana15_1600m_1024px": (1_604_641_952, 20, 70, 20, 112, "rms_norm_across_heads", 32, None),
    "image/sana15_4800m_1024px": (4_721_825_952, 60, 70, 20, 112, "rms_norm_across_heads", 32, None),
}


def full_size(depth: int, heads: int, cross: int, channels: int, norm: str | None, sample: int, scale: float | None,
              guidance: bool = False) -> SanaTransformer2DModel:  # fmt: skip
    with torch.device("meta"):
        return SanaTransformer2DModel(
            in_channels=32, out_channels=32, num_attention_heads=heads, attention_head_dim=32, num_layers=depth,
            num_cross_attention_heads=cross, cross_attention_head_dim=channels, cross_attention_dim=heads * 32,
            caption_channels=2304, mlp_ratio=2.5, sample_size=sample, patch_size=1, qk_norm=norm,
            interpolation_scale=None if scale is None else 1.0 if sample == 8 else scale, guidance_embeds=guidance,
        )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_keys_and_counts(name: str) -> None:
    count, depth, heads, cross, channels, norm, sample, scale = PUBLISHED[name]
    theirs = full_size(depth, heads, cross, channels, norm, min(sample, 16), scale)  # the table is no parameter
    with torch.device("meta"):
        ours = build(compose("train", [f"experiment={name}"]).config.network, "network")
    state = from_ours(ours.state_dict(), "diffusers")[0]
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in state.like.items()} == wanted
    assert sum(p.numel() for p in ours.parameters()) == count
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert to_ours(theirs.state_dict(), "diffusers").keys() == ours.state_dict().keys()


@pytest.mark.parametrize(("depth", "heads", "cross", "channels"), [(28, 36, 16, 72), (20, 70, 20, 112)])
def test_full_size_sprint_keys(depth: int, heads: int, cross: int, channels: int) -> None:
    theirs = full_size(depth, heads, cross, channels, "rms_norm_across_heads", 16, None, guidance=True)
    width = heads * 32
    with torch.device("meta"):
        ours = build(
            compose(
                "train",
                [f"network={'sana_600m' if depth == 28 else 'sana_1600m'}", "network.guidance_embed=true",
                 "block.mixer.qk_norm=true", "block.cross.qk_norm=true", "network.time_scale=1.0",
                 "network.floor_time=false"],
            ).config.network,
            "network",
        )  # fmt: skip
    state = from_ours(ours.state_dict(), "diffusers")[0]
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in state.like.items()} == wanted
    block_norms, guidance = 4 * width * depth, 256 * width + width + width**2 + width
    plain = 591_747_872 if depth == 28 else 1_604_462_752
    assert sum(p.numel() for p in ours.parameters()) == plain + block_norms + guidance
    assert sum(p.numel() for p in theirs.parameters()) == plain + block_norms + guidance


def test_copies_are_copies() -> None:
    theirs = diffusers_model("sana").state_dict()
    ours = sana_from_diffusers(theirs)
    before = theirs["proj_out.bias"].clone()
    ours["final.linear.bias"] += 1
    assert torch.equal(theirs["proj_out.bias"], before)
