"""The memory of drawing: weights by closed form, activations as a real drawing allocates them, cards, and refusals."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from sana.model.load import load_weights
from sana.model.placing import cast_parts, place_painter
from sana.ops.allocations import Allocations
from sana.run.build import build
from sana.run.drawing_plan import CARDS, GIB, DrawingPlan, Stage, advice, make_drawing_plan, print_drawing_plan
from sana.run.error import ConfigError
from sana.run.launch import launch
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.sampler.guided import FewStep, Sampler

GEMMA, AUTOENCODER, NETWORK = 2_614_341_888, 312_250_275, 1_604_462_752
LARGE = "recipe=image/sana_1600m_1024px"


def plan(*overrides: str) -> DrawingPlan:
    return make_drawing_plan(prepare("sample", ["dry_run=true", *overrides]))


def test_weights_are_the_published_counts_in_their_types() -> None:
    found = plan(LARGE, "height=256", "width=256", "bins=false")
    assert found.parts == {"text encoder": 2 * GEMMA, "network": 4 * NETWORK, "autoencoder": 4 * AUTOENCODER}
    half = plan(LARGE, "height=256", "width=256", "bins=false", "precision=bf16-true", "dtype.autoencoder=bfloat16")
    assert half.parts == {"text encoder": 2 * GEMMA, "network": 2 * NETWORK, "autoencoder": 2 * AUTOENCODER}
    assert {stage.weights for stage in half.stages.values()} == {2 * (GEMMA + NETWORK + AUTOENCODER)}


def test_one_part_at_a_time() -> None:
    small = (LARGE, "height=256", "width=256", "bins=false", "precision=bf16-true")
    found = plan(*small, "offload=model")
    assert {name: stage.weights for name, stage in found.stages.items()} == found.parts
    layers = plan(*small, "offload=sequential")
    # The largest layers: Gemma's table of words, the FFN's expansion (bias included), a convolution of DC-AE's last
    # stages; what lies in no list comes to it.
    assert 2 * 256_000 * 2304 <= layers.stages["text encoder"].weights < 2 * 257_000 * 2304
    expansion = 2 * 11200 * 2241
    assert expansion < layers.stages["network"].weights < found.parts["network"] // 10
    assert [s.activations for s in layers.stages.values()] == [s.activations for s in found.stages.values()]


def test_int8_is_a_byte_per_weight_and_a_scale_per_row() -> None:
    """2240 wide, 20 blocks: every matrix in bytes, float32 scales and biases, what is no matrix in float32."""
    found = plan(LARGE, "height=256", "width=256", "bins=false", "quant=int8_weight")
    d, ffn = 2240, 11200
    shapes = [(3 * d, d), (d, d), (d, d), (2 * d, d), (d, d), (ffn, d), (d, ffn // 2)] * 20
    shapes += [(d, 32), (d, 256), (d, d), (6 * d, d), (d, 2304), (d, d), (32, d)]
    matrices, rows = sum(o * i for o, i in shapes), sum(o for o, _ in shapes)
    assert found.parts["network"] == matrices + 4 * rows + 4 * (NETWORK - matrices)


@pytest.mark.parametrize("ckpt", ["scenes", "scenes_sprint"])
@pytest.mark.parametrize("extra", [["precision=32-true"], ["precision=bf16-mixed", "quant=int8_weight"]])
def test_activations_are_those_of_a_real_drawing(ckpt: str, extra: list[str]) -> None:
    n, words = 3, 24
    settings = ["device=cpu", f"n={n}", "prompt=" + "red " * words, *extra]
    composed = prepare("sample", [f"ckpt={ckpt}", *settings])
    expected = make_drawing_plan(composed)
    assert expected.images == n
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    cast_parts(restored.module, composed.config.precision, "auto", "auto")
    if composed.config.quant is not None:
        restored.module.network = build(composed.config.quant, "quant")(restored.module.network)
    painter, node = place_painter(restored.module, restored.device), composed.config.sampler
    solver, grid = build(node.solver, "solver"), build(node.grid, "grid")
    sampler = (FewStep if ckpt == "scenes_sprint" else Sampler)(solver, grid, node.steps, node.guidance)
    prompts, seeds = [f"{'red ' * words}{i}" for i in range(n)], list(range(n))
    with restored.autocast(), torch.no_grad():
        with Allocations() as drawing:
            latents = painter.latents(prompts, seeds, sampler, 64, 64)
        with Allocations() as decoding:
            painter.decode(latents)
    # Captions are embedded in the same call here, and there is noise, and the solver's memory; all of them small.
    assert drawing.peak == pytest.approx(expected.stages["network"].activations, rel=0.15)
    assert decoding.peak == pytest.approx(expected.stages["autoencoder"].activations, rel=0.05)


def test_tiles_bound_the_decoder_and_the_advice_says_so() -> None:
    composed = prepare("sample", ["dry_run=true", LARGE, "quant=int8_weight", "dtype.autoencoder=bfloat16"])
    found = make_drawing_plan(composed)
    line = advice(composed, found)
    assert line is not None
    assert line.startswith("autoencoder.max_memory_gib=")
    budget = float(line.split("=")[1].split()[0])
    tiled = plan(LARGE, "quant=int8_weight", "dtype.autoencoder=bfloat16", f"autoencoder.max_memory_gib={budget}")
    assert tiled.parts["autoencoder"] + tiled.stages["autoencoder"].activations <= budget * GIB
    assert tiled.peak < found.peak
    assert f"{tiled.peak / GIB:.2f} GiB" in line
    assert tiled.tile is not None
    assert found.tile is None


@pytest.mark.parametrize("card", CARDS)
def test_the_smallest_card(card: int) -> None:
    def made(size: int) -> DrawingPlan:
        return DrawingPlan({}, {"network": Stage(size, 0)}, 1, 64, 64, None)

    assert made(card * GIB - 1).card == card
    assert made(card * GIB).card == (None if card == CARDS[-1] else CARDS[CARDS.index(card) + 1])


def test_images_at_once() -> None:
    assert plan("ckpt=scenes").images == 1
    assert plan("ckpt=scenes", "n=3").images == 3
    assert plan("ckpt=scenes", "prompt=a ring").images == 4
    assert plan("ckpt=scenes", "prompt=[a,b,c]", "n=30").images == 16
    assert plan("ckpt=scenes", "prompt=a", "seed=[3,5]").images == 2


def test_the_command_prints_it_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def never(_: object) -> None:
        raise AssertionError("nothing may be drawn")

    assert launch("sample", never, ["dry_run=true", "recipe=image/tiny"]) == 0
    out = capsys.readouterr().out
    assert "weights, network" in out
    assert "peak" in out
    assert "fits a card of 8 GB" in out
    assert launch("sample", never, ["dry_run=true", "recipe=nonsense"]) == 2
    assert "there is no experiment or model nonsense" in capsys.readouterr().err
    assert launch("sample", never, ["dry_run=true"]) == 2
    assert "recipe=NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=dc_ae/tiny"], "does not draw from prompts"),
        (["recipe=image/tiny", "dtype.text=float16"], "refused"),
        (["recipe=image/tiny", "height=63"], "cannot be drawn"),
        (["recipe=image/tiny", "autoencoder.max_memory_gib=0.0001"], "too little"),
        (["recipe=image/tiny", "encoder.text.path=/nowhere"], "unknown key"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*overrides)


def test_the_printed_table_names_the_parts_of_the_command() -> None:
    console = Console(record=True, width=200)
    composed = prepare("sample", ["dry_run=true", "recipe=sprint_600m", "quant=int8_weight", "offload=model"])
    print_drawing_plan(composed, console)
    text = console.export_text()
    assert "quant=int8_weight" in text
    assert "offload=model" in text
    assert "1024x1024 px" in text
