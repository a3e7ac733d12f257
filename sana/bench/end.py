"""``bench.py end``: from a prompt to uint8 pixels, against diffusers' pipelines with the same weights.

Every repeat has a prompt that was not seen before, so nothing remembers its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from sana.bench.counts import Kernel, decoder_kernels, network_kernels, text_kernels
from sana.bench.measure import Bench, Case, measure, once, set_floors
from sana.bench.parts import SIZES
from sana.bench.rows import Row
from sana.bench.sides import Work, make_both

TOKENS = 40


@dataclass(frozen=True)
class Drawing:
    """One row: network, resolution, steps, and what it has to reach."""

    size: str
    px: int
    steps: int
    layers: int = 26
    bars: tuple[tuple[str, float], ...] = ()

    @property
    def text(self) -> str:
        """For the row."""
        return f"{self.size} {self.px}px b1, prompt of {TOKENS} tokens"


DRAWINGS = (
    Drawing("1600m", 1024, 20, bars=(("ms", 330.0),)),
    Drawing("sprint-1600m", 1024, 1, bars=(("ms", 45.0), ("eager", 2.2))),
)
TINY = (Drawing("tiny", 64, 3, 1), Drawing("sprint-tiny", 64, 1, 1))


def cases(tiny: bool) -> list[Case]:
    """With guidance in twenty steps, and in one."""
    return [Case("end", _name(d), d.text, _Draw(d), 25) for d in (TINY if tiny else DRAWINGS)]


def _name(drawing: Drawing) -> str:
    return "one step" if drawing.steps == 1 else f"{drawing.steps} steps, guided"


def drawing_kernels(drawing: Drawing, itemsize: int) -> list[Kernel]:
    """Of text encoder, denoiser and decoder."""
    size, tokens = SIZES[drawing.size], (drawing.px // 32) ** 2
    rows = 1 if size.guidance else 2
    first = network_kernels(size, tokens, TOKENS, rows, itemsize)
    steps = [network_kernels(size, tokens, TOKENS, rows, itemsize, reuse=True)] * (drawing.steps - 1)
    text, decoder = text_kernels(drawing.layers, TOKENS, 1, itemsize), decoder_kernels(size, drawing.px, 1, itemsize)
    return [*text, *first, *(kernel for step in steps for kernel in step), *decoder]


class _Draw:
    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def __call__(self, bench: Bench, row: Row) -> None:
        drawing = self.drawing
        bench.drop()
        set_floors(row, lambda: drawing_kernels(drawing, bench.dtype.itemsize))
        row.bars |= dict(drawing.bars)
        work = Work(drawing.size, drawing.px, drawing.steps, 1, drawing.layers, bench.dtype, bench.device)
        ours, theirs = make_both(work, watched=False)
        seeds = count()

        def fresh() -> tuple[list[str], int]:
            seed = next(seeds)
            return work.prompts(TOKENS, seed), seed

        def draw_theirs() -> Any:
            prompts, seed = fresh()
            return (theirs.draw(prompts, seed, output="pt") * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

        given = fresh()
        mine = torch.from_numpy(ours.draw(*given)).double()
        other = theirs.draw(*given, output="pt").double().permute(0, 2, 3, 1).cpu() * 255
        row.facts["mean_difference_of_255"] = (mine - other).abs().mean().item()
        measure(bench, row, {"ours": lambda: ours.draw(*fresh()), "eager": draw_theirs})
        self.stages(bench, row, ours, work, fresh)

    def stages(self, bench: Bench, row: Row, ours: Any, work: Work, fresh: Any) -> None:
        """Where our time goes: each stage from an idle device, the least of five."""
        painter, sampler, found = ours.painter, ours.sampler(), {}
        times: dict[str, list[float]] = {"text": [], "denoiser": [], "decoder": []}
        for _ in range(5):
            prompts, seed = fresh()

            def denoise(prompts: list[str] = prompts, seed: int = seed) -> None:
                found["z"] = painter.latents(prompts, ours.seeds(seed), sampler, work.px, work.px)

            times["text"].append(once(lambda prompts=prompts: painter.remember(prompts), 1, bench.device))
            times["denoiser"].append(once(denoise, 1, bench.device))
            times["decoder"].append(once(lambda: painter.decode(found["z"]), 1, bench.device))
        row.facts |= {f"{stage}_ms": min(one) for stage, one in times.items()}
