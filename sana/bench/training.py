"""``bench.py update``: a training step on cached latents and text, and its share of the card's arithmetic (MFU).

Operations are those of `Sana.flops`, three times, as torch's own counter counts the backward pass of grouped
convolutions as if they were not grouped. MFU refers to the 989 TFLOP/s of the datasheet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.bench.counts import PEAK, Kernel, backward_kernels, network_kernels
from sana.bench.measure import Bench, Case, measure, relative, set_floors
from sana.bench.parts import SIZES, made, our_network, their_network
from sana.bench.peers import compile_blocks
from sana.bench.rows import Row
from sana.bench.shapes import TEXT, Shape, caption_mask
from sana.network.sana import Sana
from sana.types import Condition

NAME = "training step, fused AdamW"


STEPS = (
    Shape("1600m", 1024, 16, (("mfu", 0.40), ("eager", 1.25), ("compiled", 1.05))),
    Shape("600m", 512, 64, (("mfu", 0.35),)),
)
TINY = (Shape("tiny", 64, 2),)


def chosen_steps(tiny: bool) -> tuple[Shape, ...]:
    """The rows of this machine: half the batch on cards of less than 100 GB."""
    if tiny:
        return TINY
    small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 100e9
    return tuple(replace(step, batch=step.batch // 2) for step in STEPS) if small else STEPS


def cases(tiny: bool) -> list[Case]:
    """All rows, then the first with blocks compiled on both sides."""
    steps = chosen_steps(tiny)
    found = [Case("update", NAME, s.text, _Update(s), 30) for s in steps]
    return [*found, *(Case("update", NAME, s.text, _Update(s, True), 60, "compiled") for s in steps[:1])]


class Trainee:
    """A network in fp32 with its optimizer; `step` is one update under autocast to bf16.

    Args:
        network: (x, t, text, mask) -> velocity (b, 32, h, w).
    """

    def __init__(
        self, module: nn.Module, network: Callable[..., Tensor], bench: Bench, given: dict[str, Tensor]
    ) -> None:
        self.module, self.network, self.device, self.given = module, network, bench.device, given
        self.autocast = bench.dtype != torch.float32
        fused: dict[str, Any] = {"fused": True} if bench.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, **fused)

    def loss(self) -> Tensor:
        """Mean square of the velocity's error on the linear path."""
        x0, eps, t = self.given["x0"], self.given["eps"], self.given["t"]
        at = t.view(-1, 1, 1, 1)
        xt = (1 - at) * x0 + at * eps
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            v = self.network(xt, t, self.given["text"], self.given["mask"])
        return F.mse_loss(v.float(), eps - x0)

    def step(self) -> Tensor:
        """Forward, backward, clipping to a norm of 1, update."""
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def batch(bench: Bench, step: Shape) -> dict[str, Tensor]:
    """Latents, noise, times, captions; a fifth of the caption is masked."""
    size, side, b = SIZES[step.size], step.px // 32, step.batch
    with made(torch.float32, bench.device, seed=3):
        x0, eps = torch.randn(b, 32, side, side), torch.randn(b, 32, side, side)
        text, t = torch.randn(b, TEXT, size.text_channels), torch.linspace(0.1, 0.9, b)
    mask = caption_mask(b, bench.device)
    return {"x0": x0, "eps": eps, "text": text.to(bench.dtype), "t": t, "mask": mask}


def make_ours(bench: Bench, step: Shape, given: dict[str, Tensor], compiled: bool) -> Trainee:
    """Our network."""
    network = our_network(SIZES[step.size], step.px, torch.float32, bench.device).train()
    if compiled:
        compile_blocks(network.blocks)

    def run(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return network(x.unsqueeze(2), t.unsqueeze(1), Condition(text, mask)).squeeze(2)

    return Trainee(network, run, bench, given)


def make_theirs(bench: Bench, step: Shape, given: dict[str, Tensor], compiled: bool) -> Trainee:
    """diffusers' network."""
    network = their_network(SIZES[step.size], step.px, torch.float32, bench.device).train()
    if compiled:
        compile_blocks(network.transformer_blocks)

    def run(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        times = (t * 1000 + 2**-10).floor()
        return network(x, text, timestep=times, encoder_attention_mask=mask.to(x.dtype), return_dict=False)[0]

    return Trainee(network, run, bench, given)


def step_kernels(step: Shape) -> list[Kernel]:
    """Forward, backward, weights cast to bf16 (6 bytes each), AdamW (28 bytes each)."""
    forward = network_kernels(SIZES[step.size], step.grid.tokens, TEXT, step.batch, 2)
    count = sum(p.numel() for p in _shape_of(step).parameters())
    return [*forward, *backward_kernels(forward), Kernel("cast", 0, 6.0 * count), Kernel("AdamW", 0, 28.0 * count)]


def operations(step: Shape) -> int:
    """Of one update."""
    return 3 * step.batch * _shape_of(step).flops(step.grid, TEXT)


def _shape_of(step: Shape) -> Sana:
    return our_network(SIZES[step.size], step.px, torch.float32, torch.device("meta"))


class _Update:
    def __init__(self, step: Shape, compiled: bool = False) -> None:
        self.step, self.compiled = step, compiled

    def __call__(self, bench: Bench, row: Row) -> None:
        from sana.checkpoint.diffusers import sana_from_diffusers

        step = self.step
        bench.drop()
        given = batch(bench, step)
        sides = {"theirs": make_theirs(bench, step, given, self.compiled)}
        sides["ours"] = make_ours(bench, step, given, self.compiled)
        sides["ours"].module.load_state_dict(sana_from_diffusers(sides["theirs"].module.state_dict()))
        set_floors(row, lambda: step_kernels(step))
        row.bars |= dict(step.bars)
        if not self.compiled:
            with torch.no_grad():
                row.error["ours"] = relative(sides["ours"].loss(), sides["theirs"].loss())
        # One after the other, as the activations and optimizer states of both are more than a card may hold.
        names = (
            {"ours": "ours compiled", "theirs": "compiled"} if self.compiled else {"ours": "ours", "theirs": "eager"}
        )
        for side, name in names.items():
            self.time(bench, row, sides.pop(side), name)
            gc.collect()
            bench.drop()
        self.judge(row)

    def time(self, bench: Bench, row: Row, trainee: Trainee, name: str) -> None:
        """One side's steps and peak memory."""
        alone = Row("", "", "", "")
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        measure(bench, alone, {"ours": trainee.step})
        if "ours" in alone.failed:
            row.failed[name] = alone.failed["ours"]
        if "ours" in alone.ms:
            row.ms[name] = alone.ms["ours"]
        if bench.device.type == "cuda":
            row.facts[f"peak_gib_{name.replace(' ', '_')}"] = torch.cuda.max_memory_allocated() / 2**30

    def judge(self, row: Row) -> None:
        """Ratios and MFU, ours being the faster of eager and compiled, which the row says."""
        mine = [row.ms[name]["median"] for name in ("ours", "ours compiled") if name in row.ms]
        if not mine:
            return
        count = operations(self.step)
        row.facts["mfu"] = count / (min(mine) * 1e-3) / PEAK
        row.facts["tflop"] = count / 1e12
        row.ratio = {peer: row.ms[peer]["median"] / min(mine) for peer in ("eager", "compiled") if peer in row.ms}
