"""``bench.py warm``: compiles what the rows with compiled peers will ask for; they find it in the cache on disk.

Run beside the other rows, on other cores. Blocks of one class share their code, so networks of two
blocks will do (the first has its tokens in another memory layout).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sana.bench import decoding, models, operators, parts, training
from sana.bench.measure import Bench, one_line, say
from sana.bench.peers import compile_blocks
from sana.bench.rows import Book, Row
from sana.bench.run import DTYPES, add_arguments  # noqa: F401  (the same options, so that one command line serves both)
from sana.bench.shapes import Shape


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    tiny, device = options.size == "tiny", torch.device(options.device)
    bench = Bench(device, DTYPES[options.dtype], Book(None), tiny, seconds=0.0)
    for name, size in list(parts.SIZES.items()):
        parts.SIZES[name] = replace(size, depth=2)
    works: list[tuple[str, Callable[[], object]]] = []
    shapes = models.TINY if tiny else models.SHAPES
    works += [(shape.text, lambda shape=shape: _network(bench, shape)) for shape in shapes]
    for case in operators.attention_cases(tiny):
        if case.part == "compiled":
            works.append((f"{case.name} {case.shape}", lambda case=case: case.run(bench, Row("", "", "", ""))))
    steps = training.chosen_steps(tiny)[:1]
    works += [(f"training {step.text}", lambda step=step: _training(bench, step)) for step in steps]
    pictures = decoding.cases(tiny)[-1:]
    works += [("decoder", lambda: pictures[0].run(bench, Row("", "", "", "")))]
    for name, work in works:
        start = time.monotonic()
        try:
            work()
            say(f"{name}: {time.monotonic() - start:.1f} s")
        except Exception as error:  # the row itself will say so too
            say(f"{name}: {one_line(error)}")
    return 0


def _network(bench: Bench, shape: Shape) -> None:
    both = models.pair(bench, shape.size, shape.px)
    given = both.inputs(shape)
    compile_blocks(both.theirs.transformer_blocks)
    both.run_theirs(given)()
    bench.drop()


def _training(bench: Bench, step: Shape) -> None:
    given = training.batch(bench, step)
    for make in (training.make_theirs, training.make_ours):
        make(bench, step, given, compiled=True).step()
