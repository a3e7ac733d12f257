"""The command line of conversion, and that diffusers loads what it writes and computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import AutoTokenizer, Gemma2Model
from weights import DEPTH, VARIANTS, equal, full, native_state, save, script, words

from sana.checkpoint.dc_ae import open_dc_ae
from sana.checkpoint.diffusers_config import facts_in_config, scheduler_config, transformer_config
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import read_header
from sana.checkpoint.record import read_record
from sana.checkpoint.source import EXTRA_FILE, open_source
from sana.checkpoint.tensors import read_safetensors
from sana.checkpoint.write import write_safetensors
from sana.model.load import load_weights
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.match import match
from sana.run.recipe import PROJECT, training_of
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.types import Condition

STATE = "state_dict"


def convert(*arguments: object, code: int = 0) -> None:
    assert script("convert_checkpoint").main([str(a) for a in arguments]) == code


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)[STATE]


def native_file(folder: Path, variant: str, seed: int = 0) -> Path:
    """An original file whose sidecar says what its tensors do not."""
    path = folder / "native.pth"
    torch.save({STATE: native_state(variant, seed)}, path)
    (folder / "native.pth.json").write_text(json.dumps(words(variant)))
    return path


def ours(path: Path) -> torch.nn.Module:
    """Our network with the weights of a file or folder."""
    source = open_source(path)
    record = source.record
    composed = training_of(record, path) if record and record.recipe else match(source)[1]
    network = build(composed.config.model.network, "network")
    network.load_state_dict({n: t for n, t in source.tensors.items() if not n.startswith("extra.")})
    return network.eval()


@torch.no_grad()
def difference(network: Any, theirs: Any, guidance: bool, channels: int, text: int, side: int = 6) -> float:
    """Greatest difference of the two networks' velocities, relative to the greatest velocity."""
    torch.manual_seed(1)
    x, y = torch.randn(2, channels, side, side + 2), torch.randn(2, 5, text)
    t, mask = torch.tensor([0.25, 0.875]), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    scale = torch.tensor([4.5, 3.0]) if guidance else None
    want = theirs(
        x,
        encoder_hidden_states=y,
        timestep=t if guidance else t * 1000,
        guidance=None if scale is None else scale * theirs.config.guidance_embeds_scale,
        encoder_attention_mask=mask.float(),
    ).sample
    got = network(x.unsqueeze(2), t[:, None], Condition(y, mask, scale)).squeeze(2)
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_round_is_exact_and_diffusers_agrees(tmp_path: Path, variant: str) -> None:
    native = native_file(tmp_path, variant)
    state = read(native)
    convert(native, tmp_path / "a.safetensors", "--to", "sana")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "--to", "diffusers")
    convert(tmp_path / "b", tmp_path / "c.pth", "--to", "native")
    assert equal(read(tmp_path / "c.pth"), state)
    convert(native, tmp_path / "d", "--to", "diffusers")
    convert(tmp_path / "d", tmp_path / "e.safetensors", "--to", "sana")
    assert equal(
        dict(read_safetensors(tmp_path / "e.safetensors")[0]), dict(read_safetensors(tmp_path / "a.safetensors")[0])
    )
    convert(tmp_path / "c.pth", tmp_path / "f.safetensors", "--to", "sana")
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()

    assert set(read_safetensors(tmp_path / "b" / EXTRA_FILE)[0]) == {
        n for n in state if n in ("pos_embed", "y_embedder.y_embedding") or n.startswith("logvar")
    }
    theirs, info = SanaTransformer2DModel.from_pretrained(tmp_path / "b" / "transformer", output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.num_layers == DEPTH
    guidance = VARIANTS[variant][1]
    for path in (native, tmp_path / "a.safetensors", tmp_path / "b"):
        assert difference(ours(path), theirs.eval(), guidance, 6, 10) < 1e-5, path
    scheduler = json.loads((tmp_path / "b/scheduler/scheduler_config.json").read_text())
    assert scheduler.get("flow_shift") == (None if guidance else 3.0)
    assert theirs.config.interpolation_scale == VARIANTS[variant][2]


def test_the_flow_shift_and_time_scale_that_other_converters_lose(tmp_path: Path) -> None:
    """0.6B at 1024 px has shift 4 (its own configuration), and the teachers of Sprint have timestep_scale 0.001."""

    def written(name: str, width: int, depth: int, norms: bool) -> tuple[dict, dict]:
        facts = match(open_source(save(tmp_path / name, full(width, depth, norms))))[0]
        return transformer_config(facts), scheduler_config(facts)

    config, scheduler = written("Sana_600M_1024px_MultiLing.pth", 1152, 28, False)
    assert (scheduler["flow_shift"], config["sample_size"], config["timestep_scale"]) == (4.0, 32, 1.0)
    config, scheduler = written("SANA1.5_4.8B_1024px.pth", 2240, 60, True)
    assert (scheduler["flow_shift"], config["num_layers"], config["qk_norm"]) == (3.0, 60, "rms_norm_across_heads")
    config, scheduler = written("Sana_1600M_4Kpx_BF16.pth", 2240, 20, False)
    assert (scheduler["flow_shift"], config["sample_size"], config["interpolation_scale"]) == (6.0, 128, 2.0)
    for name, width, depth in (
        ("SANA_Sprint_1.6B_1024px_teacher.pth", 2240, 20),
        ("Sana_Sprint_0.6B_1024px_teacher.pth", 1152, 28),
    ):
        config, _ = written(name, width, depth, True)
        assert config["timestep_scale"] == 0.001
        assert facts_in_config(config, None, "config.json")["time_scale"] == 1.0


CONFIG_VAE = {
    "latent_channels": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 32, 64),
    "decoder_block_out_channels": (8, 32, 64),
    "encoder_layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (2, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers at small widths, random but for the text encoder."""
    torch.manual_seed(0)
    text = PROJECT / "experiments/gemma_tiny"
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=96,
        sample_size=16, qk_norm="rms_norm_across_heads", interpolation_scale=2.0,
    )  # fmt: skip
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made = SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text),
        text_encoder=Gemma2Model.from_pretrained(text),
        vae=AutoencoderDC(**CONFIG_VAE),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(flow_shift=2.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
    )
    folder = tmp_path_factory.mktemp("pipeline") / "mine"
    made.save_pretrained(folder)
    return folder


def test_a_pipeline_of_diffusers_is_drawn_with(pipeline: Path) -> None:
    """`ckpt=` takes the network, the autoencoder and the text encoder from the folder."""
    composed = prepare("sample", [f"ckpt={pipeline}", "prompt=a red circle", "device=cpu", "precision=32-true"])
    assert (composed.config.size, composed.config.timestep.shift) == (64, 2.0)
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    theirs = SanaPipeline.from_pretrained(pipeline)
    network = restored.module.network.eval()
    assert difference(network, theirs.transformer, False, 4, 96) < 1e-5
    frozen = restored.module.frozen
    latent = torch.randn(1, 4, 3, 5)
    with torch.no_grad():
        want = theirs.vae.decode(latent / 0.41407).sample
        assert (frozen.autoencoder.decode(latent) - want).abs().max() < 1e-5 * want.abs().max()
    assert (frozen.text_encoder.lowercase, frozen.text_encoder.strip, restored.module.null_mask) == (True, True, "own")
    loaded = frozen.text_encoder.model
    assert equal(dict(loaded.state_dict()), dict(theirs.text_encoder.to(loaded.dtype).state_dict()))


def test_a_local_copy_of_a_repository_is_drawn_with(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline, tmp_path / "models" / "mine")
    composed = prepare("sample", ["ckpt=hf://org/mine", "prompt=a red circle"])
    assert (composed.config.size, composed.config.timestep.shift) == (64, 2.0)
    with pytest.raises(ConfigError, match="write hf://organisation/repository"):
        prepare("sample", ["ckpt=hf://mine", "prompt=a red circle"])


def test_a_pipeline_goes_out_and_comes_back(pipeline: Path, tmp_path: Path) -> None:
    before = SanaTransformer2DModel.from_pretrained(pipeline / "transformer").state_dict()
    convert(pipeline, tmp_path / "a.pth", "--to", "native")
    convert(tmp_path / "a.pth", tmp_path / "b", "--to", "diffusers", "--pipeline", pipeline)
    after = SanaPipeline.from_pretrained(tmp_path / "b")
    assert equal(dict(after.transformer.state_dict()), dict(before))
    assert equal(dict(after.vae.state_dict()), dict(AutoencoderDC.from_pretrained(pipeline / "vae").state_dict()))
    assert after.scheduler.config.flow_shift == 2.0
    assert isinstance(after.scheduler, DPMSolverMultistepScheduler)
    images = after("a red circle", height=64, width=64, num_inference_steps=2, use_resolution_binning=False,
                   complex_human_instruction=None, output_type="np").images  # fmt: skip
    assert images.shape == (1, 64, 64, 3)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "--to", "sana")
    record = read_record(tmp_path / "c.safetensors")
    assert record is not None
    assert str(tmp_path) not in json.dumps(record.recipe), "a header names no folder of this machine"


def test_what_the_pipeline_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(native_file(tmp_path, "sana"), tmp_path / "b", "--to", "diffusers")
    assert "still lacks vae, text_encoder, tokenizer" in capsys.readouterr().out


def test_an_autoencoder_goes_in_and_out(pipeline: Path, tmp_path: Path) -> None:
    before = AutoencoderDC.from_pretrained(pipeline / "vae").state_dict()
    convert(pipeline / "vae", tmp_path / "a.safetensors", "--to", "sana")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "native")
    assert any(".op_list." in name for name in read_header(tmp_path / "b.safetensors").entries)
    convert(tmp_path / "b.safetensors", tmp_path / "vae", "--to", "diffusers")
    loaded, info = AutoencoderDC.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values())
    assert equal(dict(loaded.state_dict()), dict(before))
    assert loaded.config.scaling_factor == 0.41407
    assert open_dc_ae(tmp_path / "b.safetensors")[1] == open_dc_ae(tmp_path / "a.safetensors")[1]
    convert(
        native_file(tmp_path, "sana"), tmp_path / "p", "--to", "diffusers", "--autoencoder", tmp_path / "a.safetensors"
    )
    assert equal(dict(AutoencoderDC.from_pretrained(tmp_path / "p/vae").state_dict()), dict(before))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{native}", "{tmp}/a.pth", "--to", "sana"], "writes a file that ends in .safetensors"),
        (["{native}", "{tmp}/a.safetensors", "--to", "native"], "writes a file that ends in .pth"),
        (["{tmp}/none.pth", "{tmp}/a.safetensors", "--to", "sana"], "none.pth does not exist"),
        (["{native}", "{native}", "--to", "native"], "native.pth: exists already"),
        (["{native}", "{tmp}/a.safetensors", "--to", "sana", "--recipe", "image/sana_600m_512px"],
         "width is 64 in the file"),
        (["{native}", "{tmp}/a.safetensors", "--to", "sana", "--pipeline", "x"], "are for --to diffusers"),
        (["{native}", "{tmp}/a", "--to", "diffusers", "--pipeline", "{tmp}"], "has none of vae"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    native = native_file(tmp_path, "sana")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    convert(*(a.format(native=native, tmp=tmp_path) for a in arguments), code=2)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_loading_says_every_key_and_takes_what_is_allowed_by_name(tmp_path: Path) -> None:
    native = native_file(tmp_path, "sana")
    convert(native, tmp_path / "a.safetensors", "--to", "sana")
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    state = {n: t for n, t in tensors.items() if n not in ("final.linear.bias", "blocks.1.mixer.proj.bias")}
    state |= {"blocks.0.odd.weight": torch.ones(2), "time_embed.fc1.bias": torch.ones(3)}
    path = tmp_path / "b.safetensors"
    write_safetensors(path, state, metadata)
    record = read_record(path)
    assert record is not None
    assert record.recipe is not None
    module: Any = SimpleNamespace(network=build(training_of(record, path).config.model.network, "network"))
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, path)
    message = str(caught.value)
    assert "missing: blocks.1.mixer.proj.bias, final.linear.bias (2)" in message
    assert "extra: blocks.0.odd.weight (1)" in message
    assert "of another shape: time_embed.fc1.bias (3,), not (64,) (1)" in message
    state["time_embed.fc1.bias"] = tensors["time_embed.fc1.bias"]
    write_safetensors(path, state, metadata)
    with pytest.raises(CheckpointError, match=r"missing: final.linear.bias \(1\)$"):
        load_weights(module, path, allow_missing=["*.proj.bias"], allow_extra=["*odd*"])
    kept = module.network.final.linear.bias.clone()
    load_weights(module, path, allow_missing=["*.proj.bias", "final.linear.bias"], allow_extra=["*odd*"])
    assert torch.equal(module.network.final.linear.bias, kept)
    assert torch.equal(module.network.final.table, tensors["final.table"])
