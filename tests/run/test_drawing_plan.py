"""The memory of drawing: weights by closed form, activations as a real drawing allocates them, cards, and refusals."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from sana.model.load import load_weights
from sana.model.placing import cast_parts, place_painter
from sana.ops.allocations import Allocations
from sana.run.build import build
from sana.run.compose import compose
from sana.run.drawing_plan import (
    CARDS,
    GIB,
    DrawingPlan,
    Stage,
    advice,
    images_at_once,
    make_drawing_plan,
    print_drawing_plan,
)
from sana.run.error import ConfigError
from sana.run.launch import launch
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.sampler.guided import FewStep, Sampler

GEMMA, AUTOENCODER, NETWORK = 2_614_341_888, 312_250_275, 1_604_462_752
LARGE = "recipe=image/sana_1600m_1024px"


SMALL = (LARGE, "height=256", "width=256", "bins=false", "precision=bf16-true", "dtype.autoencoder=bfloat16")


def plan(*overrides: str) -> DrawingPlan:
    return make_drawing_plan(prepare("sample", ["dry_run=true", *overrides]))


@pytest.mark.slow
def test_weights_are_the_published_counts_in_their_types() -> None:
    found = plan(*SMALL)
    half = {"text encoder": 2 * GEMMA, "network": 2 * NETWORK, "autoencoder": 2 * AUTOENCODER}
    assert found.parts == pytest.approx(half, abs=1000)  # and some frequencies
    assert {stage.weights for stage in found.stages.values()} == {sum(found.parts.values())}
    whole = (LARGE, "height=256", "width=256", "bins=false")
    full = plan(*whole, "precision=32-true")
    assert full.parts == half | {"network": 4 * NETWORK, "autoencoder": 4 * AUTOENCODER, **_text_of(found)}
    mixed = plan(
        *whole, "dtype.autoencoder=float32"
    )  # under autocast the linear layers of the 20 blocks are in 16 bits
    d, ffn = 2240, 11200
    linear = 20 * (d * (3 * d + d + d + 2 * d + d + ffn + ffn // 2) + 5 * d + ffn)
    assert mixed.parts == full.parts | {"network": 4 * NETWORK - 2 * linear}
    assert AUTOENCODER * 2 < plan(*whole).parts["autoencoder"] < AUTOENCODER * 4  # of which the decoder's convolutions
    parts = plan(*SMALL, "offload=model")
    assert {name: stage.weights for name, stage in parts.stages.items()} == parts.parts == found.parts


def _text_of(found: DrawingPlan) -> dict[str, int]:
    return {"text encoder": found.parts["text encoder"]}


@pytest.mark.slow
def test_one_layer_at_a_time() -> None:
    layers = plan(*SMALL, "offload=sequential")
    # In no list lies Gemma's table of words; of its layers the largest is one of the MLP's.
    assert layers.stages["text encoder"].weights == pytest.approx(2 * 2304 * (256_000 + 9216 + 1), abs=1000)
    # In no list: embeddings, modulation, the final layer, and the blocks' tables; the largest layer is the FFN's first.
    d = 2240
    trunk = 33 * d + 257 * d + d + d * d + 6 * d * (d + 1) + 2305 * d + d * (d + 1) + 2304 + 33 * 32 + 2 * d
    assert layers.stages["network"].weights == pytest.approx(2 * (trunk + 20 * 6 * d + 11200 * (d + 1)), rel=0.01)


@pytest.mark.slow
def test_int8_is_a_byte_per_weight_and_a_scale_per_row() -> None:
    """2240 wide, 20 blocks: every matrix in bytes, float32 scales and biases, what is no matrix in bfloat16."""
    found = plan(*SMALL, "quant=int8_weight")
    d, ffn = 2240, 11200
    shapes = [(3 * d, d), (d, d), (d, d), (2 * d, d), (d, d), (ffn, d), (d, ffn // 2)] * 20
    shapes += [(d, 32), (d, 256), (d, d), (6 * d, d), (d, 2304), (d, d), (32, d)]
    biases = 20 * (5 * d + ffn) + (d + 2 * d + 6 * d + 2 * d + 32)  # in float32
    matrices, rows = sum(o * i for o, i in shapes), sum(o for o, _ in shapes)
    assert found.parts["network"] == matrices + 4 * rows + 2 * (NETWORK - matrices) + 2 * biases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ckpt", "extra"),
    [("scenes", ["precision=bf16-mixed", "quant=int8_weight"]), ("scenes_sprint", ["precision=32-true"])],
)
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
    painter, node = place_painter(restored.module, restored.device, bf16=restored.bf16), composed.config.sampler
    solver, grid = build(node.solver, "solver"), build(node.grid, "grid")
    sampler = (FewStep if ckpt == "scenes_sprint" else Sampler)(solver, grid, node.steps, node.guidance)
    prompts, seeds = [f"{'red ' * words}{i}" for i in range(n)], list(range(n))
    with restored.autocast(), torch.no_grad():
        painter.remember(prompts)
        with Allocations() as drawing:
            latents = painter.latents(prompts, seeds, sampler, 64, 64)
        with Allocations() as decoding:
            painter.decode(latents)
    # There are noise and the solver's memory too; and the image in float32, which is much beside so small a decoder.
    assert drawing.peak == pytest.approx(expected.stages["network"].activations, rel=0.05)
    assert decoding.peak == pytest.approx(expected.stages["autoencoder"].activations, rel=0.15)


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], 1),
        (["n=3"], 3),
        (["prompt=a ring"], 4),
        (["prompt=[a,b,c]", "n=30"], 16),
        (["prompt=a", "seed=[3,5]"], 2),
        (["prompt=a", "best_of=5", "judge=oracle"], 5),
    ],
)
def test_images_at_once(given: list[str], expected: int) -> None:
    assert images_at_once(compose("sample", ["dry_run=true", "ckpt=scenes", *given]).raw) == expected


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
    composed = prepare("sample", ["dry_run=true", "recipe=image/tiny", "quant=int8", "offload=model"])
    print_drawing_plan(composed, console)
    text = console.export_text()
    assert "quant=int8" in text
    assert "offload=model" in text
    assert "64x64 px" in text
