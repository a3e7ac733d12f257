"""The memory of SVDQuant's calibration: what is kept by closed form, the whole as a real calibration allocates it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.model.load import load_weights
from sana.model.placing import cast_parts
from sana.model.quantise import quantise
from sana.ops.allocations import Allocations
from sana.quant.calibrate import Activations, collect
from sana.quant.svdquant import SVDQuant, SVDQuantLinear, fit
from sana.run.build import build
from sana.run.calibration_plan import calibration_peak
from sana.run.drawing_plan import make_drawing_plan, print_drawing_plan
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.sampler.guided import Sampler


def network(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    layers = [nn.Linear(48, 96, **like), nn.SiLU(), nn.Linear(96, 32, **like), nn.SiLU(), nn.Linear(32, 48, **like)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("tokens", "calls", "rows"), [(100, 5, 200), (100, 2, 200), (65, 3, 10)])
def test_what_is_kept_is_counted_to_the_byte(tokens: int, calls: int, rows: int) -> None:
    """Of each call 64 tokens, all of which stay until the last; then `rows` of a layer."""
    made, given, live = network(), torch.randn(tokens, 48), 0

    def run(module: nn.Module) -> None:
        nonlocal live
        for _ in range(calls):
            module(given)
        live = allocations.live

    with torch.no_grad(), Allocations() as allocations:
        found = collect(made, run, rows)
        after = allocations.live
    widths = (48, 96, 32)
    assert live == sum(4 * k * (64 * calls + 1) for k in widths)
    assert after == sum(4 * k * (min(rows, 64 * calls) + 1) for k in widths)
    assert after == sum(4 * (a.rows.numel() + a.largest.numel()) for a in found.values())


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_a_real_calibration(precision: Any, dtype: torch.dtype) -> None:
    quant, tokens, calls = SVDQuant(precision, rank=8, rounds=3, rows=150), 100, 4
    given = torch.randn(tokens, 48).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = network(dtype)
        like = torch.empty(tokens, 48, dtype=dtype)
    planned = calibration_peak(
        quant, fake, quant(network(dtype, "meta")), lambda _: None, lambda module, _: module(like),
        batches=1, calls=calls, latents=0, autocast=False,
    )  # fmt: skip

    def run(module: nn.Module) -> None:
        for _ in range(calls):
            module(given)

    made = network(dtype)
    with Allocations() as real:
        quant(made, run)
    assert planned == pytest.approx(real.peak, rel=0.05)


def test_fitting_takes_the_same_of_fake_tensors() -> None:
    peaks = []
    for mode in (FakeTensorMode(), None):
        with mode or torch.no_grad():
            layer = SVDQuantLinear.empty(70, 130, False, "cpu", rank=8)
            weight, given = torch.randn(130, 70), Activations(torch.randn(90, 70), torch.rand(70))
            with Allocations() as work:
                fit(layer, weight, given, 3)
        peaks.append(work.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_plan_is_what_a_checkpoint_takes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts fill the text encoder's rows, as the plan takes it."""
    prompts = [f"{'red ' * 20}{i}" for i in range(4)]
    settings = [f"quant.prompts=[{','.join(prompts)}]", "quant.rounds=2"]
    settings += [f"precision={precision}", "device=cpu", "batch_size=2", "sampler.steps=5"]
    composed = prepare("sample", ["ckpt=scenes", "prompt=a ring", "quant=svdquant_w4a4", *settings])
    expected = make_drawing_plan(composed).stages["calibration"]
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    cast_parts(restored.module, precision, "auto", "auto")
    module = restored.module
    weights = sum(p.numel() * p.element_size() for p in module.network.parameters())
    others = (module.frozen.text_encoder, module.frozen.autoencoder)
    assert expected.weights == pytest.approx(
        weights + sum(p.numel() * p.element_size() for part in others for p in part.parameters()), rel=0.02
    )

    def made(node: Any, name: str) -> Any:  # a list of a configuration is no tuple to the checks of types here
        if name != "sampler":
            return build(node, name)
        return Sampler(build(node.solver, "solver"), build(node.grid, "grid"), node.steps, node.guidance)

    monkeypatch.setattr("sana.model.quantise.build", made)
    with Allocations() as real:
        quantise(composed, restored)
    assert real.peak == pytest.approx(expected.activations, rel=0.1)


def test_the_plan_says_so() -> None:
    console = Console(record=True, width=200)
    composed = prepare("sample", ["dry_run=true", "recipe=image/tiny", "quant=svdquant_w4a4", "offload=model"])
    print_drawing_plan(composed, console)
    line = next(line for line in console.export_text().splitlines() if "during calibration" in line)
    assert "all parts, the network in full precision" in line
    plan = make_drawing_plan(composed)
    assert plan.peak == plan.stages["calibration"].bytes > max(plan.stages[name].bytes for name in plan.parts)
    other = make_drawing_plan(prepare("sample", ["dry_run=true", "recipe=image/tiny", "quant=int8_weight"]))
    assert "calibration" not in other.stages
