"""``bench.py models``: one forward of the denoiser against diffusers' with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sana.bench.counts import network_kernels
from sana.bench.measure import Bench, Case, captured, exact, measure, relative, say, set_floors, wide
from sana.bench.parts import SIZES, made, our_network, their_network
from sana.bench.peers import compile_blocks
from sana.bench.rows import Row
from sana.bench.shapes import TEXT, Shape, caption_mask
from sana.network.sana import Sana
from sana.nn.inference import for_inference
from sana.ops.choice import set_kernels
from sana.types import Condition

SHAPES = (
    Shape("1600m", 1024, 1, (("eager", 2.0), ("compiled", 1.1))),
    Shape("1600m", 1024, 16, (("eager", 1.3),)),
    Shape("600m", 512, 1, (("eager", 5.0),)),
    Shape("600m", 1024, 1),
)
TINY = (Shape("tiny", 128, 1), Shape("tiny", 64, 3))


def cases(tiny: bool) -> list[Case]:
    """All rows: first against diffusers as it is, then compiled."""
    shapes = TINY if tiny else SHAPES
    plain = [Case("models", "forward", s.text, _Forward(s), 15) for s in shapes]
    plain += [Case("models", "forward, caption reused", s.text, _Forward(s, reuse=True), 8) for s in shapes]
    return [*plain, *(Case("models", "forward", s.text, _Compiled(s), 30, "compiled") for s in shapes)]


class Pair:
    """Our network and diffusers' with the same weights, and inputs for both.

    Attributes:
        ours, theirs: the networks, without gradients.
    """

    def __init__(self, size: str, px: int, dtype: torch.dtype, device: torch.device) -> None:
        from sana.checkpoint.diffusers import sana_from_diffusers

        self.size, self.dtype, self.device = SIZES[size], dtype, device
        self.theirs = their_network(self.size, px, dtype, device).eval().requires_grad_(False)
        ours = our_network(self.size, px, dtype, device)
        ours.load_state_dict(sana_from_diffusers(self.theirs.state_dict()))
        self.ours: Sana = for_inference(ours.eval().requires_grad_(False))  # type: ignore[assignment]

    def inputs(self, shape: Shape) -> dict[str, Tensor]:
        """Latents, times, caption and its mask."""
        side, b = shape.px // 32, shape.batch
        with made(self.dtype, self.device, seed=1):
            x, text = torch.randn(b, 32, side, side), torch.randn(b, TEXT, self.size.text_channels)
            t = torch.linspace(0.3, 0.9, b, dtype=torch.float32)
        times = (t * 1000).floor() / 1000
        return {"x": x, "t": times, "text": text, "mask": caption_mask(b, self.device)}

    def run_ours(self, given: dict[str, Tensor], reuse: bool = False) -> Callable[[], Tensor]:
        """A forward; with the caption's keys and values made beforehand or within it."""
        x, t = given["x"].unsqueeze(2), given["t"].unsqueeze(1)
        condition: Any = Condition(given["text"], given["mask"])
        if reuse:
            with torch.no_grad():
                condition = self.ours.prepare(condition)

        def run() -> Tensor:
            with torch.no_grad():
                return self.ours(x, t, condition).squeeze(2)

        return run

    def run_theirs(self, given: dict[str, Tensor], network: Any = None) -> Callable[[], Tensor]:
        """A forward of diffusers' network, or of another one like it."""
        network = self.theirs if network is None else network
        dtype = next(network.parameters()).dtype
        x, text = given["x"].to(dtype), given["text"].to(dtype)
        mask, t = given["mask"].to(dtype), (given["t"] * 1000).round()

        def run() -> Tensor:
            with torch.no_grad():
                return network(x, text, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]

        return run


def pair(bench: Bench, size: str, px: int) -> Pair:
    """Both networks; one size at a time is held. Images of 2048 px and more have networks of their own."""
    name = f"networks {size}" + (f" {px}" if px >= 2048 else "")
    if name not in bench.held:
        bench.drop(*[other for other in bench.held if other.startswith(("networks", "wide"))])
    return bench.hold(name, lambda: Pair(size, px, bench.dtype, bench.device))


class _Forward:
    def __init__(self, shape: Shape, reuse: bool = False) -> None:
        self.shape, self.reuse = shape, reuse

    def __call__(self, bench: Bench, row: Row) -> None:
        shape, both = self.shape, pair(bench, self.shape.size, self.shape.px)
        given = both.inputs(shape)
        itemsize = bench.dtype.itemsize
        set_floors(row, lambda: network_kernels(both.size, shape.grid.tokens, TEXT, shape.batch, itemsize, self.reuse))
        row.bars |= {} if self.reuse else dict(shape.bars)
        ours, theirs = both.run_ours(given, self.reuse), both.run_theirs(given)
        name = f"wide {shape.size}"
        reference = bench.hold(name, lambda: copy.deepcopy(both.theirs).to(wide(bench.dtype)))
        with exact():
            expected = both.run_theirs(given, reference)()
        row.error = {"ours": relative(ours(), expected), "eager": relative(theirs(), expected)}
        set_kernels("naive")
        try:
            row.error["naive"] = relative(ours(), expected)
        finally:
            set_kernels("auto")
        sides: dict[str, Callable[[], Any]] = {}
        try:
            sides["ours"] = captured(ours, bench.device)
            row.error["ours"] = max(row.error["ours"], relative(sides["ours"](), expected))
            row.facts["graph"] = bench.device.type == "cuda"
        except Exception as error:  # then as it is, and said
            row.failed["graph"] = f"{type(error).__name__}: {str(error)[:200]}"
            sides["ours"] = ours
        sides |= {"eager": theirs, "ours without a graph": ours}
        del expected
        measure(bench, row, sides)
        without = row.ms.pop("ours without a graph", None)
        row.ratio.pop("ours without a graph", None)
        if without is not None:
            row.facts["ours_without_graph_ms"] = without["median"]
        operations = shape.batch * both.ours.flops(shape.grid, TEXT)
        row.facts["tflops"] = operations / row.ms["ours"]["median"] / 1e9


class _Compiled:
    """Adds diffusers' network with its blocks compiled, in turns with ours once more."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __call__(self, bench: Bench, row: Row) -> None:
        both = pair(bench, self.shape.size, self.shape.px)
        given = both.inputs(self.shape)
        compiled = copy.deepcopy(both.theirs)
        compile_blocks(compiled.transformer_blocks)
        fast = both.run_theirs(given, compiled)
        row.error["compiled"] = relative(fast(), both.run_theirs(given)())
        again = Row("", "", "", "")
        measure(bench, again, {"ours": captured(both.run_ours(given), bench.device), "compiled": fast})
        row.ms = again.ms | row.ms
        row.ms["compiled"], row.ratio["compiled"] = again.ms["compiled"], again.ratio["compiled"]
        say(f"  ours beside it {again.ms['ours']['median']:.3f} ms")
