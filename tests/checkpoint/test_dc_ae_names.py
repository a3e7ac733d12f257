"""DC-AE in the original naming: the published rules from original to diffusers names are the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from weights import script

from sana.checkpoint.dc_ae import open_dc_ae
from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers, dc_ae_to_diffusers
from sana.checkpoint.native_dc_ae import dc_ae_from_native, dc_ae_to_native
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.run.compose import compose

# original -> diffusers, applied one after the other (the rules that the published converter is described by)
RULES = [
    ("main.", ""), ("op_list.", ""), ("context_module", "attn"), ("local_module", "conv_out"),
    ("aggreg.0.0", "to_qkv_multiscale.0.proj_in"), ("aggreg.0.1", "to_qkv_multiscale.0.proj_out"),
    ("depth_conv.conv", "conv_depth"), ("inverted_conv.conv", "conv_inverted"), ("point_conv.conv", "conv_point"),
    ("point_conv.norm", "norm"), ("conv.conv.", "conv."), ("conv1.conv", "conv1"), ("conv2.conv", "conv2"),
    ("conv2.norm", "norm"), ("proj.norm", "norm_out"), ("encoder.project_in.conv", "encoder.conv_in"),
    ("encoder.project_out.0.conv", "encoder.conv_out"), ("encoder.stages", "encoder.down_blocks"),
    ("decoder.project_in.conv", "decoder.conv_in"), ("decoder.project_out.0", "decoder.norm_out"),
    ("decoder.project_out.2.conv", "decoder.conv_out"), ("decoder.stages", "decoder.up_blocks"),
]  # fmt: skip


def published(native: dict[str, torch.Tensor], merged_ends: bool) -> dict[str, tuple[int, ...]]:
    """diffusers' names and shapes of an original state dict, by the rules."""
    found: dict[str, tuple[int, ...]] = {}
    rules = list(RULES)
    if merged_ends:  # a convolution within the first and last resampling
        rules = [
            (a, f"{b}.conv" if a in ("encoder.project_in.conv", "decoder.project_out.2.conv") else b) for a, b in rules
        ]
    for name, tensor in native.items():
        for old, new in rules:
            name = name.replace(old, new)
        shape = tuple(tensor.shape)
        if name.endswith("qkv.conv.weight"):
            for part in "qkv":
                found[name.replace("qkv.conv.weight", f"to_{part}.weight")] = (shape[0] // 3, shape[1])
        elif name.endswith("proj.conv.weight"):
            found[name.replace("proj.conv.weight", "to_out.weight")] = shape[:2]
        else:
            found[name] = shape
    return found


@pytest.mark.parametrize("preset", ["dc_ae_f32c32", "dc_ae_lite_f32c32"])
def test_original_names_of_the_published_autoencoders(preset: str) -> None:
    node = compose("train", [f"encoder/autoencoder={preset}"]).resolved["encoder"]["autoencoder"]
    with torch.device("meta"):
        ours = DCAE(**{k: v for k, v in node.items() if k not in ("_target_", "weights")}).state_dict()
    native = dc_ae_to_native(ours, node["encoder_shuffle"], node["latent_shortcut"])
    assert len(native) == len(ours)
    lite = preset == "dc_ae_lite_f32c32"
    names = published(native, merged_ends=False)
    if lite:  # its decoder has no full-resolution stage, so its last convolution lies within a resampling
        names = {n.replace("decoder.conv_out.", "decoder.conv_out.conv.") if ".conv_out.conv" not in n else n: s
                 for n, s in names.items()}  # fmt: skip
    assert names == {n: tuple(t.shape) for n, t in dc_ae_to_diffusers(ours).items()}
    assert {n: t.shape for n, t in dc_ae_from_native(native).items()} == {n: t.shape for n, t in ours.items()}
    # names as other programs look for them in the published files
    assert "encoder.project_in.conv.bias" in native
    assert "decoder.project_in.main.conv.weight" in native
    assert "encoder.project_out.main.op_list.0.conv.weight" in native
    assert "decoder.stages.1.op_list.0.main.conv.conv.bias" in native


@pytest.mark.parametrize(("shuffle", "shortcut"), [(False, True), (True, True), (True, False), (False, False)])
def test_names_there_and_back(shuffle: bool, shortcut: bool) -> None:
    for depth in (0, 1):
        model = DCAE(
            channels=4, scale=1.0, encoder_widths=(8, 32, 64), encoder_depths=(depth, 1, 2),
            encoder_attention=(False, False, True), decoder_widths=(8, 32, 64), decoder_depths=(depth, 2, 1),
            decoder_attention=(False, True, True), kernels=(3, 5), encoder_shuffle=shuffle,
            decoder_shuffle=shuffle, latent_shortcut=shortcut,
        )  # fmt: skip
        ours = model.state_dict()
        native = dc_ae_to_native(ours, shuffle, shortcut)
        back = dc_ae_from_native(native)
        assert back.keys() == ours.keys()
        assert all(back[name] is ours[name] for name in ours)
    with pytest.raises(ValueError, match="no name of the original layout"):
        dc_ae_from_native({"encoder.input.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="no name of our layout"):
        dc_ae_to_native({"encoder.project_in.conv.weight": torch.ones(1)}, shuffle, shortcut)


def test_an_original_file_needs_its_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderDC(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    native = dc_ae_to_native(dc_ae_from_diffusers(theirs.state_dict()), False, True)
    path, target = tmp_path / "model.safetensors", tmp_path / "ours.safetensors"
    save_file(native, path)
    assert script("convert_checkpoint").main([str(path), str(target), "--to", "sana"]) == 2
    assert "fits no preset of conf/encoder/autoencoder, and its scale is in no tensor" in capsys.readouterr().err
    config = DCAE(
        channels=4, encoder_widths=(8, 16), encoder_depths=(1, 1), encoder_attention=(False, False),
        decoder_widths=(8, 16), decoder_depths=(1, 1), decoder_attention=(False, False),
    ).config  # fmt: skip
    (tmp_path / "model.safetensors.json").write_text(json.dumps(config))
    assert script("convert_checkpoint").main([str(path), str(target), "--to", "sana"]) == 0
    ours, said = open_dc_ae(target)
    assert said == config
    back = dc_ae_to_diffusers(ours)
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
