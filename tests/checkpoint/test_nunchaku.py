"""SVDQuant networks in nunchaku's layout: its names and shapes, the numbers of our layers in them, and, computed the
way nunchaku's blocks compute, the outputs of ours.

What is expected of nunchaku is written out from src/SanaModel.cpp, src/Linear.cpp and the epilogues of
src/kernels/zgemm in nunchaku-ai/nunchaku at 92e46957cdb8; no kernel of it is run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from safetensors import safe_open
from test_nunchaku_order import digest, numbers, signed
from torch import Tensor, nn
from weights import script

from sana.checkpoint import nunchaku_order as order
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.nunchaku import nunchaku_tensors
from sana.checkpoint.record import Record
from sana.checkpoint.write import write_consolidated
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.quant.convert import convert
from sana.quant.int8_weight import int8_weight
from sana.quant.low_rank import low_rank
from sana.quant.rebuild import describe
from sana.quant.svdquant import SVDQuant, SVDQuantLinear
from sana.run.build import build
from sana.run.recipe import recipe_of
from sana.run.saved import prepare
from sana.types import Context, Grid

EXCLUDE = ("*_embed.*", "modulation.*", "final.*", "*.cross.kv")  # as in conf/quant/svdquant_w4a4.yaml
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CASES = [(96, "int4", 8, 0), (160, "int4", 32, 1), (160, "nvfp4", 32, 2), (96, "nvfp4", 0, 3)]


def quantised(
    network: nn.Module, precision: str, rank: int, seed: int, exclude: tuple[str, ...] = EXCLUDE
) -> nn.Module:
    """Without calibration, but with smoothing that differs between inputs; what stays is exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, linear: nn.Linear) -> SVDQuantLinear:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = SVDQuantLinear.empty(*sizes, rank=rank, precision=precision)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        smooth = torch.rand(linear.in_features, generator=generator).add(0.25).bfloat16().float()
        layer.fill(linear.weight.detach(), smooth, *low_rank(linear.weight.detach() * smooth, rank))
        return layer

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.bfloat16())
    return convert(network.eval(), make, kind="svdquant_w4a4", exclude=exclude)


def facts_for(width: int, depth: int = 2) -> Facts:
    return Facts(
        "sana", depth, width, int(2.5 * width), in_channels=4, patch=1, text_channels=24, head_dim=32,
        heads=width // 32, size=256, ratio=32, time_scale=1000.0, flow_shift=3.0, position=False,
    )  # fmt: skip


def network_of(width: int, head_dim: int = 32) -> Sana:
    mixer, cross = partial(LinearAttention, head_dim=head_dim), partial(CrossAttention, heads=width // 32)
    return Sana(4, width, 2, 24, [partial(Block, mixer=mixer, cross=cross, ffn=MixFFN)])


def exported(width: int, precision: str, rank: int, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    network = quantised(network_of(width), precision, rank, seed)
    made = nunchaku_tensors(network.state_dict(), describe(network), facts_for(width))
    tensors = {name: made[name] for name in made}
    for name, like in made.like.items():
        assert (like.shape, like.dtype) == (tensors[name].shape, tensors[name].dtype), name
    return network, tensors


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def registered(width: int, precision: str, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a block of nunchaku's Sana allocates, and the two tensors that it does not look for."""
    half, fp4 = torch.bfloat16, precision == "nvfp4"
    d, h = up(width, 128), up(int(2.5 * width), 64)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def gemm(name: str, inputs: int, outputs: int, bias: bool) -> None:
        k, n, r = up(inputs, 128), up(outputs, 128), up(min(rank, width), 16)
        found[f"{name}.qweight"] = (n, k // 2), torch.int8
        found[f"{name}.wscales"] = ((k // 16, n), torch.float8_e4m3fn) if fp4 else ((k // 64, n), half)
        found[f"{name}.smooth"] = (k,), half
        if rank:
            found[f"{name}.lora_down"], found[f"{name}.lora_up"] = ((k, r), half), ((n, r), half)
        if bias:
            found[f"{name}.bias"] = (n,), half
        if fp4:
            found[f"{name}.wtscale"] = (1,), torch.float32

    gemm("attn.qkv_proj", width, 3 * d, False)
    gemm("attn.pag_to_v", width, d, False)
    gemm("attn.out_proj", d, width, True)  # whose bias nunchaku has no place for
    gemm("cross_attn.q_linear", width, width, True)
    gemm("cross_attn.out_proj", width, width, True)
    gemm("ff.inverted_conv", width, 2 * h, True)
    gemm("ff.point_conv", h, width, False)
    return found | {
        "cross_attn.kv_linear.weight": ((2 * width, width), half),
        "cross_attn.kv_linear.bias": ((2 * width,), half),
        "ff.depth_conv.weight": ((2 * h, 3, 3, 1), half),
        "ff.depth_conv.bias": ((2 * h,), half),
        "scale_shift_table": ((6, width), half),
    }


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_that_nunchaku_allocates(case: tuple[int, str, int, int]) -> None:
    width, precision, rank, _ = case
    tensors = exported(*case)[1]
    for i in range(2):
        prefix = f"transformer_blocks.{i}."
        own = {n.removeprefix(prefix): (tuple(t.shape), t.dtype) for n, t in tensors.items() if n.startswith(prefix)}
        assert own == registered(width, precision, rank)
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": width // 32, "attention_head_dim": 32,
              "num_layers": 2, "num_cross_attention_heads": width // 32, "cross_attention_head_dim": 32,
              "cross_attention_dim": width, "caption_channels": 24, "sample_size": 8, "patch_size": 1}  # fmt: skip
    theirs = SanaTransformer2DModel(**config).bfloat16()
    rest = {name: t for name, t in tensors.items() if not name.startswith("transformer_blocks.")}
    missing, unexpected = theirs.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(name.startswith("transformer_blocks.") for name in missing)


def test_of_the_size_of_the_published_model() -> None:
    """1.6B on the meta device. The published int4 file has a qkv_proj.qweight of 6912 x 1152 (nunchaku's issue 488)."""
    width = 2240
    block = partial(Block, mixer=LinearAttention, cross=partial(CrossAttention, heads=20), ffn=MixFFN)
    with torch.device("meta"):
        network = Sana(4, width, 2, 24, [block])
    network = SVDQuant(exclude=list(EXCLUDE))(network)
    like = nunchaku_tensors(network.state_dict(), describe(network), facts_for(width)).like
    own = {
        name.split(".", 2)[2]: tuple(t.shape) for name, t in like.items() if name.startswith("transformer_blocks.1.")
    }
    assert own == {name: shape for name, (shape, _) in registered(width, "int4", 32).items()}
    assert own["attn.qkv_proj.qweight"] == (6912, 1152)
    assert own["ff.depth_conv.weight"] == (2 * 5632, 3, 3, 1)


def read(tensors: dict[str, Tensor], name: str, precision: str) -> SVDQuantLinear:
    """A layer of nunchaku's as one of ours, with its outputs, inputs and rank as filled up there."""
    part = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
    codes = order.unpack_codes(part["qweight"])
    n, k = codes.shape
    rank = part["lora_down"].shape[1] if "lora_down" in part else 0
    layer = SVDQuantLinear.empty(k, n, "bias" in part, rank=rank, precision=precision)
    if precision == "int4":
        codes = (codes.to(torch.int8) << 4 >> 4).add(8).to(torch.uint8)  # two's complement
        layer.wscales.copy_(order.unpack_columns(part["wscales"]).mT)
    else:
        assert layer.wtscale is not None
        layer.wtscale.copy_(part["wtscale"])
        layer.wscales.copy_(order.unpack_micro_scales(part["wscales"]).mT)
    layer.qweight.copy_(codes[:, 0::2] | codes[:, 1::2] << 4)
    layer.smooth_factor.copy_(order.unpack_vector(part["smooth"]))
    if rank:
        layer.proj_down.copy_(order.unpack_down(part["lora_down"]))
        layer.proj_up.copy_(order.unpack_up(part["lora_up"]))
    if layer.bias is not None:
        layer.bias.copy_(order.unpack_vector(part["bias"]))
    return layer


def places(name: str, width: int) -> list[tuple[int, int]]:
    """(row of nunchaku's layer, row of ours)."""
    d, h = up(width, 128), int(2.5 * width)
    if name == "attn.qkv_proj":
        pairs = [(c, c) for c in range(width)]
        for c in range(width):
            pairs.append((d + 64 * (c // 32) + c % 32, width + c))
            pairs.append((d + 64 * (c // 32) + 32 + c % 32, 2 * width + c))
        return pairs
    if name == "attn.pag_to_v":
        return [(c, 2 * width + c) for c in range(width)]
    if name == "ff.inverted_conv":
        return [(2 * c, c) for c in range(h)] + [(2 * c + 1, h + c) for c in range(h)]
    return [(c, c) for c in range(width)]


LAYERS = {
    "attn.qkv_proj": "mixer.qkv", "attn.pag_to_v": "mixer.qkv", "attn.out_proj": "mixer.proj",
    "cross_attn.q_linear": "cross.q", "cross_attn.out_proj": "cross.proj", "ff.inverted_conv": "ffn.inverted",
    "ff.point_conv": "ffn.point",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_layers(case: tuple[int, str, int, int]) -> None:
    """Rounded activations, 4-bit weights, branch and bias; new outputs are zero, new inputs count for nothing."""
    width, precision, _, seed = case
    network, tensors = exported(*case)
    generator = torch.Generator().manual_seed(seed)
    for theirs, ours in LAYERS.items():
        layer, there = network.get_submodule(f"blocks.1.{ours}"), read(
            tensors, f"transformer_blocks.1.{theirs}", precision
        )  # fmt: skip
        x = torch.randn(7, layer.in_features, generator=generator)
        full = F.pad(x, (0, there.in_features - layer.in_features))
        got, want = there(full), layer(x)
        rows = torch.tensor(places(theirs, width))
        torch.testing.assert_close(got[:, rows[:, 0]], want[:, rows[:, 1]], rtol=1e-5, atol=1e-5, msg=theirs)
        new = torch.ones(there.out_features, dtype=torch.bool)
        new[rows[:, 0]] = False
        assert not got[:, new].any()
        assert torch.equal(there.rest()[rows[:, 0], : layer.in_features], layer.rest()[rows[:, 1]])


def exact(layer: SVDQuantLinear) -> Tensor:
    """(out, in) float64: the weight for activations that are not rounded."""
    branch = layer.proj_up.double() @ layer.proj_down.double().mT
    return layer.rest().double() / layer.smooth_factor.double() + branch


def attention_of_nunchaku(x: Tensor, weight: Callable[[str], Tensor], d: int, eps: float) -> Tensor:
    """Queries in the first third; then 32 keys and 32 values of each head. No bias anywhere."""
    width = x.shape[-1]
    qkv = x @ weight("attn.qkv_proj")[: 3 * d, :width].mT
    q = qkv[..., :d].relu().unflatten(-1, (-1, 32))
    pairs = qkv[..., d:].unflatten(-1, (-1, 64))
    k, v = pairs[..., :32].relu(), pairs[..., 32:]
    above = torch.einsum("bnhi,bmhi,bmhj->bnhj", q, k, v)
    below = torch.einsum("bnhi,bmhi->bnh", q, k).unsqueeze(-1) + eps
    return (above / below).flatten(2) @ weight("attn.out_proj")[:width, :d].mT


def ffn_of_nunchaku(x: Tensor, weight: Callable[[str], Tensor], part: Callable[[str], Tensor], h: int) -> Tensor:
    """Value and gate in neighbouring channels; images are channels-last, kernels (channels, 3, 3, 1)."""
    width, (rows, columns) = x.shape[-1], (3, 5)
    u = F.silu(x @ weight("ff.inverted_conv")[: 2 * h, :width].mT + part("ff.inverted_conv.bias")[: 2 * h])
    image = u.unflatten(1, (rows, columns)).movedim(-1, 1)
    kernel = part("ff.depth_conv.weight").movedim(-1, 1)
    mixed = F.conv2d(image, kernel, part("ff.depth_conv.bias"), padding=1, groups=2 * h).movedim(1, -1).flatten(1, 2)
    gated = mixed[..., 0::2] * F.silu(mixed[..., 1::2])
    return gated @ weight("ff.point_conv")[:width, :h].mT


@pytest.mark.parametrize("case", CASES)
def test_computed_as_nunchaku_computes_it_is_our_block(case: tuple[int, str, int, int]) -> None:
    width, precision, _, seed = case
    network, tensors = exported(*case)
    block = copy.deepcopy(network.get_submodule("blocks.0")).double()
    for name in set(LAYERS.values()):
        layer = block.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        plain.weight.data = exact(layer)
        if layer.bias is not None:
            plain.bias.data = layer.bias.double()
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, plain)
    block.mixer.proj.bias.data.zero_()  # nunchaku adds none

    def weight(name: str) -> Tensor:
        return exact(read(tensors, f"transformer_blocks.0.{name}", precision))

    def part(name: str) -> Tensor:
        tensor = tensors[f"transformer_blocks.0.{name}"].double()
        return order.unpack_vector(tensor) if name == "ff.inverted_conv.bias" else tensor

    x = torch.randn(2, 15, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        want = block.mixer(x, Context(Grid(1, 3, 5), None))
        got = attention_of_nunchaku(x, weight, up(width, 128), block.mixer.eps)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        want = block.ffn(x, Context(Grid(1, 3, 5), None))
        got = ffn_of_nunchaku(x, weight, part, up(int(2.5 * width), 64))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert torch.equal(part("cross_attn.kv_linear.weight"), block.cross.kv.weight)
        assert torch.equal(part("scale_shift_table"), block.table)


LAYER = {
    # What deepcompressor's convert_to_nunchaku_w4x4y16_linear_state_dict (deepcompressor/backend/nunchaku/convert.py at
    # 69f3473f5e1c) made of the layer below, run once on a CPU.
    "int4": {"qweight": "57592e210ba7492ec2c6f52be5b40116", "wscales": "401517d40926c9f50f91e070a5133d1f",
             "smooth": "25ab68219063138ec006afe0538e5b10", "lora_down": "31d8253b3b22bd72d223a0080c45e33f",
             "lora_up": "b1f2639cf0a5f897d222600ef6525d52"},
    "nvfp4": {"qweight": "ba995bd5813afef3ad643aa26e232215", "wscales": "03f3f0e03f25c0cbcaf5784788c9e3e7",
              "smooth": "3ec2ab41a4ff98dde87451c21f838c75", "lora_down": "41ef09d4d6d3580f285881fd016f6253",
              "lora_up": "32e565076a1292b196c2dee10279474b"},
}  # fmt: skip


@pytest.mark.parametrize(("precision", "width", "rank"), [("int4", 192, 16), ("nvfp4", 256, 32)])
def test_a_layer_is_what_the_published_converter_makes_of_it(precision: str, width: int, rank: int) -> None:
    """Filled up, unsmoothed and packed. Its weight: codes times powers of two, which its rounding finds again."""
    network = quantised(network_of(width), precision, rank, 0)
    layer = network.get_submodule("blocks.0.cross.q")
    codes, fp4 = numbers(width, width, 1, 16).to(torch.uint8), precision == "nvfp4"
    if fp4:
        codes[codes == 8] = 0  # it knows no negative zero
        layer.wtscale.fill_(0.125)
    group = 16 if fp4 else 64
    layer.qweight.copy_(codes[:, 0::2] | codes[:, 1::2] << 4)
    layer.wscales.copy_((2.0 ** (numbers(width, width // group, 2, 5) - 3)).mT)
    layer.smooth_factor.copy_((2.0 ** (numbers(width, 1, 3, 5) - 2)).flatten())
    layer.proj_up.copy_(signed(width, rank, 4))
    layer.proj_down.copy_(signed(width, rank, 5))
    tensors = nunchaku_tensors(network.state_dict(), describe(network), facts_for(width))
    name = "transformer_blocks.0.cross_attn.q_linear"
    assert {part: digest(tensors[f"{name}.{part}"]) for part in LAYER[precision]} == LAYER[precision]


@pytest.mark.slow
def test_a_quantised_file_becomes_one_that_diffusers_can_configure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["network.width=96", "network.depth=2", "block.cross.heads=3"]
    plain += ["block.mixer.qk_norm=false", "block.cross.qk_norm=false"]
    composed = prepare("train", plain)
    network = quantised(build(composed.config.model, "model").network, "int4", 16, 0)
    quant = {"quant": {}, "layers": describe(network)}
    source, target = tmp_path / "q.safetensors", tmp_path / "svdq-int4_r16-dots.safetensors"
    write_consolidated(source, network.state_dict(), Record(recipe_of(composed.resolved, []), quant=quant))

    convert_checkpoint = script("convert_checkpoint")
    assert convert_checkpoint.main([str(source), str(target), "--to", "nunchaku"]) == 0
    said = capsys.readouterr()
    assert "int4, rank 16, 12 layers" in said.out
    largest = max(float(network.get_submodule(f"blocks.{i}.mixer.proj").bias.abs().max()) for i in range(2))
    assert f"no bias after self-attention; here the largest is {largest:.3g}" in said.err
    with safe_open(target, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        table = file.get_tensor("transformer_blocks.1.scale_shift_table")
    assert torch.equal(table, network.get_submodule("blocks.1").table.bfloat16())
    with torch.device("meta"):
        theirs = SanaTransformer2DModel.from_config(json.loads(metadata["config"]))
    rest = {name for name in names if not name.startswith("transformer_blocks.")}
    assert rest == {name for name in theirs.state_dict() if not name.startswith("transformer_blocks.")}
    assert json.loads(metadata["quantization_config"])["rank"] == 16
    assert json.loads(metadata["quantization_config"])["weight"]["dtype"] == "int4"

    assert (
        convert_checkpoint.main([str(source), str(tmp_path / "b.safetensors"), "--to", "nunchaku", "--dtype=fp16"]) == 2
    )
    assert "--dtype does not apply" in capsys.readouterr().err
    assert convert_checkpoint.main(["scenes", str(tmp_path / "b.safetensors"), "--to", "nunchaku"]) == 2
    assert "quant=svdquant_w4a4 out=FILE.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def refused(network: nn.Module, facts: Facts) -> str:
    with pytest.raises(CheckpointError) as error:
        nunchaku_tensors(network.state_dict(), describe(network), facts)
    return str(error.value)


def test_what_nunchaku_does_not_have_is_named() -> None:
    facts = facts_for(64)
    said = refused(quantised(network_of(64), "int4", 8, 0, ("*_embed.*", "modulation.*")), facts)
    assert "keeps blocks.0.cross.kv, blocks.1.cross.kv, final.linear in 16 bits" in said
    assert 'quant.exclude=["*.cross.kv","final.linear"]' in said
    said = refused(quantised(network_of(64), "int4", 8, 0, (*EXCLUDE, "*.ffn.point")), facts)
    assert "has blocks.0.ffn.point, blocks.1.ffn.point in 4 bits" in said
    said = refused(int8_weight(network_of(64), exclude=EXCLUDE), facts)
    assert "reads quant=svdquant_w4a4; blocks.0.mixer.qkv is int8_weight" in said
    network = quantised(network_of(64), "int4", 8, 0)
    assert "no norm of queries and keys" in refused(network, Facts(**{**facts.told(), "self_norm": True}))
    assert "has 32 channels per head, this one 64" in refused(network, Facts(**{**facts.told(), "head_dim": 64}))
    state = network.state_dict()
    del state["text_embed.norm.weight"], state["final.table"]
    with pytest.raises(CheckpointError, match=r"missing final\.table"):
        nunchaku_tensors(state, describe(network), facts)
