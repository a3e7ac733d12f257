"""``bench.py blocks``: blocks of 0.6B's width on CPUs against diffusers' `SanaTransformerBlock` with the same weights.

Forward and training step at 512 and 1024 px in fp32 and bf16 (training: fp32 weights under autocast), and twenty steps
of sampling where ours computes the caption's keys and values and everything of the times once. Ratios are speeds:
seconds of diffusers over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.bench.measure import Bench, Case, attempt, exact, measure, relative, say, wide
from sana.bench.parts import SIZES, Size, made, our_network, their_network
from sana.bench.rows import Book, Row, plot, table
from sana.bench.run import about
from sana.bench.shapes import TEXT, caption_mask
from sana.flow.grid import dpm_grid
from sana.nn.inference import for_inference
from sana.sampler.flow_dpm import flow_dpm
from sana.types import Condition, Context, Grid

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--size", choices=["600m", "tiny"], default="600m", help="width of the blocks")
    parser.add_argument("--layers", type=int, default=4, help="how many of them")
    parser.add_argument("--px", type=int, nargs="+", default=[512, 1024], help="sides of the images")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument(
        "--rows", choices=["forward", "train", "sampling"], nargs="+", default=["forward", "train", "sampling"]
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of each row; of sampling a third")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--json", type=Path, default=None, help="file of the results, begun anew")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of the ratios")


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    if options.layers < 1 or options.repeats < 1 or any(px < 32 or px % 32 for px in options.px):
        print("bench.py blocks: --layers and --repeats are at least 1, --px multiples of 32", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, book = torch.device("cpu"), Book(None)
    bench = Bench(device, torch.float32, book, seconds=0.0)
    size = replace(SIZES[options.size], depth=options.layers)
    for case in cases(options, size):
        bench.dtype = DTYPES[case.dtype or "fp32"]
        attempt(case, bench)
        if options.json is not None:
            save(options.json, book)
    print(table(book.rows.values()))
    print(json.dumps(keys(book), indent=1))
    if options.plot is not None:
        plot(book.rows.values(), options.plot)
    return 0


def cases(options: argparse.Namespace, size: Size) -> list[Case]:
    """The rows that are asked for."""
    found = []
    for dtype in options.dtypes:
        for px in options.px:
            shape = Shape(size, px, options.repeats)
            text = f"{options.layers} blocks d{size.width} {px}px"
            for name in ("forward", "train"):
                if name in options.rows:
                    found.append(
                        Case("blocks", name, f"{text} b1", partial(globals()[f"_{name}"], shape), 0, dtype=dtype)
                    )
    if "sampling" in options.rows:
        text = f"{options.layers} blocks d{size.width} {options.px[0]}px b2, {STEPS} steps"
        found.append(
            Case(
                "blocks",
                "sampling",
                text,
                partial(_sampling, Shape(size, options.px[0], options.repeats)),
                0,
                dtype="fp32",
            )
        )
    return found


def keys(book: Book) -> dict[str, float]:
    """forward_fp32, forward_bf16, train_fp32, train_bf16, sampling: the least ratio over the resolutions."""
    found: dict[str, float] = {}
    for row in book.rows.values():
        key = row.name if row.name == "sampling" else f"{row.name}_{row.dtype}"
        if "eager" in row.ratio:
            found[key] = min(found.get(key, float("inf")), row.ratio["eager"])
    return found


def save(path: Path, book: Book) -> None:
    """Keys, rows and facts of the machine, whole or not at all."""
    whole = Book(None, about(torch.device("cpu")) | {"load_average": os.getloadavg()[0]})
    whole.path, whole.rows = path.with_name(path.name + ".rows"), book.rows
    whole.put(next(iter(book.rows.values())))
    held = json.loads(whole.path.read_text(encoding="utf-8"))
    whole.path.write_text(json.dumps(keys(book) | held, indent=1) + "\n", encoding="utf-8")
    os.replace(whole.path, path)


@dataclass(frozen=True)
class Shape:
    """Attributes: size with the depth that is measured; px of the images; turns."""

    size: Size
    px: int
    repeats: int

    @property
    def grid(self) -> Grid:
        """In tokens."""
        return Grid(1, self.px // 32, self.px // 32)


class Stacks:
    """The same blocks twice, and one input for both.

    Attributes:
        ours, theirs: lists of blocks.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        from sana.checkpoint.diffusers import sana_from_diffusers

        size, self.shape = shape.size, shape
        theirs = their_network(size, shape.px, dtype, device)
        ours = our_network(size, shape.px, dtype, device)
        ours.load_state_dict(sana_from_diffusers(theirs.state_dict()))
        self.ours, self.theirs = nn.ModuleList(ours.blocks), theirs.transformer_blocks
        with made(dtype, device, seed=1):
            self.x, self.text = torch.randn(1, shape.grid.tokens, size.width), torch.randn(1, TEXT, size.width)
            self.modulation = 0.3 * torch.randn(1, 1, 6, size.width)
        self.mask = caption_mask(1, torch.device("cpu"))
        self.bias = ((1 - self.mask.to(dtype)) * -10000.0).unsqueeze(1)

    def run_ours(self, x: Tensor) -> Tensor:
        """Through all blocks."""
        context = Context(self.shape.grid, self.modulation, self.mask)
        for block in self.ours:
            x = block(x, context, self.text)[0]
        return x

    def run_theirs(self, x: Tensor) -> Tensor:
        """Through all blocks."""
        grid = self.shape.grid
        for block in self.theirs:
            x = block(x, None, self.text, self.bias, self.modulation.flatten(1), grid.h, grid.w)
        return x

    def to(self, dtype: torch.dtype) -> Stacks:
        """Everything in another type, in place."""
        self.ours.to(dtype)
        self.theirs.to(dtype)
        self.x, self.text, self.modulation = self.x.to(dtype), self.text.to(dtype), self.modulation.to(dtype)
        self.bias = self.bias.to(dtype)
        return self


def _forward(shape: Shape, bench: Bench, row: Row) -> None:
    stacks = Stacks(shape, bench.dtype, bench.device)
    for_inference(stacks.ours.requires_grad_(False))
    stacks.theirs.requires_grad_(False)
    with torch.no_grad():
        found = {"ours": stacks.run_ours(stacks.x), "eager": stacks.run_theirs(stacks.x)}

        def timed(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with torch.no_grad():
                    return function(stacks.x)

            return run

        measure(bench, row, {"ours": timed(stacks.run_ours), "eager": timed(stacks.run_theirs)}, shape.repeats)
        reference = stacks.to(wide(bench.dtype))
        expected = reference.run_theirs(reference.x)
    row.error = {side: relative(out, expected) for side, out in found.items()}
    row.bars = {"eager": 0.95}


def _train(shape: Shape, bench: Bench, row: Row) -> None:
    """Forward, backward and AdamW; in bf16 under autocast with fp32 weights."""
    stacks = Stacks(shape, torch.float32, bench.device)
    target = torch.randn_like(stacks.x)
    autocast = bench.dtype != torch.float32

    def step(blocks: nn.ModuleList, function: Callable[[Tensor], Tensor], optimizer: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(x)
        loss = F.mse_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    gradients = {}
    for side, blocks, function in (("ours", stacks.ours, stacks.run_ours), ("eager", stacks.theirs, stacks.run_theirs)):
        x = stacks.x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(x)
        F.mse_loss(out.float(), target).backward()
        gradients[side] = x.grad
        blocks.zero_grad(set_to_none=True)
    sides = {}
    for side, blocks, function in (("ours", stacks.ours, stacks.run_ours), ("eager", stacks.theirs, stacks.run_theirs)):
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=0.0, fused=True)  # weights stay, so that both keep pace
        x = stacks.x.clone().requires_grad_()
        sides[side] = partial(step, blocks, function, optimizer, x)
    measure(bench, row, sides, shape.repeats)
    for blocks in (stacks.ours, stacks.theirs):
        blocks.zero_grad(set_to_none=True)
    reference = stacks.to(torch.float32 if autocast else torch.float64)
    x = reference.x.clone().requires_grad_()
    F.mse_loss(reference.run_theirs(x), target.to(x.dtype)).backward()
    assert x.grad is not None
    row.error = {side: relative(gradient, x.grad) for side, gradient in gradients.items() if gradient is not None}
    row.bars = {"eager": 0.95}


def _sampling(shape: Shape, bench: Bench, row: Row) -> None:
    """Twenty steps of DPM-Solver++ on a batch of two (conditional, unconditional) with captions of 300 tokens."""
    from sana.checkpoint.diffusers import sana_from_diffusers

    size, side = shape.size, shape.px // 32
    theirs: Any = their_network(size, shape.px, bench.dtype, bench.device).eval().requires_grad_(False)
    network = our_network(size, shape.px, bench.dtype, bench.device)
    network.load_state_dict(sana_from_diffusers(theirs.state_dict()))
    ours: Any = for_inference(network.eval().requires_grad_(False))
    with made(bench.dtype, bench.device, seed=4):
        noise, text = torch.randn(2, 32, 1, side, side), torch.randn(2, TEXT, size.text_channels)
    mask = caption_mask(2, torch.device("cpu"))
    grid = dpm_grid(STEPS, 3.0)

    @torch.no_grad()
    def draw_ours() -> Tensor:
        prepared = ours.prepare(Condition(text, mask), grid[:-1])
        return flow_dpm(lambda x, t: ours(x, t[:, None].to(x.dtype), prepared), noise, grid)

    def field(network: Any, text: Tensor, x: Tensor, t: Tensor) -> Tensor:
        times = (t.float() * 1000 + 2**-10).floor()
        return network(x.squeeze(2), text, timestep=times, encoder_attention_mask=mask.to(x.dtype), return_dict=False)[
            0
        ].unsqueeze(2)

    @torch.no_grad()
    def draw_theirs() -> Tensor:
        return flow_dpm(partial(field, theirs, text), noise, grid)

    found = {"ours": draw_ours(), "eager": draw_theirs()}
    measure(bench, row, {"ours": draw_ours, "eager": draw_theirs}, max(3, shape.repeats // 3))
    with exact():
        expected = flow_dpm(
            partial(field, theirs.to(wide(bench.dtype)), text.to(wide(bench.dtype))), noise.to(wide(bench.dtype)), grid
        )
    row.error = {name: relative(out, expected) for name, out in found.items()}
    row.bars = {"eager": 1.15}
    say(f"  {STEPS} steps")
