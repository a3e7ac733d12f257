"""sample.py as a user calls it, on the recipe of 0.6B at 512 px with small widths: against diffusers' SanaPipeline, and
its inputs, names and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image

from sana.checkpoint.diffusers import sana_to_diffusers
from sana.checkpoint.diffusers_dc_ae import dc_ae_to_diffusers
from sana.model.generate import NOISE_SEED
from sana.ops.random import normal
from sana.run.build import build
from sana.run.compose import compose
from sana.run.saved import to_yaml

ROOT = Path(__file__).resolve().parents[2]
WIDTHS, LAYERS = (8, 8, 8, 32, 32, 32), (1, 1, 1, 1, 1, 1)
RECIPE = [
    "experiment=image/sana_600m_512px",
    "network.width=96",
    "network.depth=3",
    "network.text_channels=64",
    "network.text_norm=1.0",
    "block.cross.heads=4",
    "encoder/text=gemma_random",
    "encoder.text.channels=64",
    "encoder.text.dtype=float32",
    "encoder.autoencoder.weights=null",
    *(f"encoder.autoencoder.{side}_widths={list(WIDTHS)}" for side in ("encoder", "decoder")),
    *(f"encoder.autoencoder.{side}_depths={list(LAYERS)}" for side in ("encoder", "decoder")),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with random weights, and its parts. The autoencoder's are fixed by the seed it is built under."""
    folder = tmp_path_factory.mktemp("run")
    composed = compose("train", RECIPE)
    (folder / "config.yaml").write_text(to_yaml(composed))
    (folder / "status.json").write_text('{"status": "finished"}')
    torch.manual_seed(0)
    module = build(composed.config.model, "model")
    with torch.no_grad():
        for p in module.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    autoencoder = folder / "autoencoder.safetensors"
    from sana.encoder.autoencoder.dc_ae import save

    save(module.frozen.autoencoder, autoencoder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for node in (config["encoder"]["autoencoder"], config["model"]["autoencoder"]):
        assert node["weights"] is None
        node["weights"] = str(autoencoder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints").mkdir()
    content = {"state_dict": module.state_dict(), "updates": {"network": 3}, "ema": {}}
    torch.save(content, folder / "checkpoints" / "step_00000003.ckpt")
    return folder, module


def diffusers_images(module, prompts, seeds, height, width, grid):
    transformer = SanaTransformer2DModel(
        num_attention_heads=3,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=24,
        cross_attention_dim=96,
        caption_channels=64,
        sample_size=16,
    )
    transformer.load_state_dict(sana_to_diffusers(module.network.state_dict()))
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae = AutoencoderDC(
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=LAYERS,
        decoder_layers_per_block=LAYERS,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_conv_act_fn="relu",
        scaling_factor=0.41407,
    )
    vae.load_state_dict(dc_ae_to_diffusers(module.frozen.autoencoder.state_dict()))
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    encoder = module.frozen.text_encoder
    pipeline = SanaPipeline(encoder.tokenizer, encoder.model, vae.eval(), transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(NOISE_SEED, torch.tensor(seeds), "sampling noise", (32, 1, *grid)).squeeze(2)
    return pipeline(
        prompts, num_inference_steps=4, height=height, width=width, latents=noise, complex_human_instruction=None,
        negative_prompt="blurry", output_type="np", return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.slow
def test_pictures_are_those_of_diffusers(sample, run, tmp_path):
    """Through the bin of the ratio (384 x 672 for 16:9 and half as much again), its resizing and its rounding."""
    folder, module = run
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a bench, wooden", "seed": [5, 2**33]}, {"prompt": "two stars", "seed": [7, 8]}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [f"ckpt={folder}", f"prompt={prompts}", f"out={tmp_path / 'out'}", "width=1344", "height=768",
                 "sampler.steps=4", "precision=32-true", "negative=blurry", "negative_mask=own"]  # fmt: skip
    code, out, err = sample(*arguments)
    assert code == 0, err
    paths = [Path(line) for line in out.split()]
    assert [path.name for path in paths] == [
        "00000_a_bench_wooden_5.png", "00000_a_bench_wooden_8589934592.png", "00001_two_stars_7.png",
        "00001_two_stars_8.png",
    ]  # fmt: skip
    texts = [line["prompt"] for line in lines for _ in range(2)]
    want = diffusers_images(module, texts, [5, 2**33, 7, 8], 768, 1344, (12, 21))
    assert want.std() > 0.02
    for path, image in zip(paths, want, strict=True):
        got = np.asarray(Image.open(path)) / 255
        assert np.abs(got - image).max() < 0.51 / 255 + 1e-3
        record = json.loads(path.with_suffix(".json").read_text())
        assert (record["size"], record["drawn"]) == ([1344, 768], [672, 384])
        assert record["sampler"]["grid"]["shift"] == 3.0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sample(*arguments) == [0, out, ""]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_the_published_mask_of_nothing_is_the_default(sample, run, tmp_path):
    folder, _ = run
    common = [f"ckpt={folder}", "prompt=a cat", "n=1", "sampler.steps=1", "precision=32-true"]
    pictures = []
    for mask in ("null", "caption", "own"):
        code, path, err = sample(*common, f"negative_mask={mask}", f"out={tmp_path / mask}")
        assert code == 0, err
        pictures.append(np.asarray(Image.open(path.strip())).astype(int))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("precision=16-mixed", "precision: 16-mixed is refused: the sums of linear attention"),
        ("dtype.text=float16", "dtype.text: float16 is refused: Gemma-2"),
        ("dtype.autoencoder=float16", "dtype.autoencoder: float16 is refused: DC-AE"),
        ("bins=false width=100", "100x100 pixels cannot be drawn: this model draws multiples of 32, such as 96x96"),
        ("prompt=nowhere.jsonl", "prompt: there is no file nowhere.jsonl"),
        ("sampler.pag_scale=2 sampler.pag_layers=[3]", "sampler.pag_layers: [3], but the network has layers 0 to 2"),
        ("seed=[4,4]", "seed: 4 is given twice"),
        ("device=mps", "device: mps is not here"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(sample, run, tmp_path, setting, said):
    arguments = [f"ckpt={run[0]}", "prompt=x", f"out={tmp_path / 'out'}", *setting.split()]
    code, out, err = sample(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"sample.py: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_small_cards_and_other_precisions_draw_nearly_the_same(sample, run, tmp_path):
    common = [f"ckpt={run[0]}", "prompt=a cat", "seed=[3]", "sampler.steps=2", "width=256", "height=256", "bins=false"]
    pictures = {}
    for name, settings in {
        "plain": ["precision=32-true"],
        "model": ["precision=32-true", "offload=model"],
        "sequential": ["precision=32-true", "offload=sequential", "preview=1", "grid=true"],
        "bf16": ["precision=bf16-true", "dtype.autoencoder=bfloat16", "dtype.text=bfloat16"],
    }.items():
        code, out, err = sample(*common, *settings, f"out={tmp_path / name}")
        assert code == 0, err
        pictures[name] = np.asarray(Image.open(out.split()[0])).astype(int)
    assert (pictures["plain"] == pictures["model"]).all()
    assert (pictures["plain"] == pictures["sequential"]).all()
    assert sorted(p.name for p in (tmp_path / "sequential").iterdir()) == [
        "a_cat_3.json", "a_cat_3.png", "grid.json", "grid.png"
    ]  # fmt: skip
    assert 0 < np.abs(pictures["plain"] - pictures["bf16"]).mean() < 12
