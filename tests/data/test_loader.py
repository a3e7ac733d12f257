"""Batches as a trainer gets them: shares of ranks, values, bad samples, workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_source import Pictures

from sana.data.caption import PowerScore, Proportion
from sana.data.loader import MicroBatches, Samples, Slot, loader, to_float
from sana.data.planner import plan
from sana.data.transform import resize_and_crop
from sana.ops.random import uniform
from sana.types import Batch

CHOICE = Proportion({"short": 1.0, "long": 1.0})


def slots(samples: list[int], size: tuple[int, int] = (8, 8), first: int = 0) -> list[Slot]:
    return [Slot(first + k, sample, *size) for k, sample in enumerate(samples)]


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_the_world(world: int, accumulate: int, buckets: int) -> None:
    """Nor do positions: those of a step are consecutive, and resuming goes on with the next step."""
    batch, ids = 12, np.arange(50)
    planner = plan([ids], [ids % buckets], batch, 3)
    sizes = [(8, 8 * (1 + k)) for k in range(buckets)]
    micro = batch // world // accumulate
    ranks = [
        list(islice(MicroBatches(planner, sizes, 24, rank, world, micro), 3 * accumulate)) for rank in range(world)
    ]
    for step in range(3):
        joined = [s for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate] for s in part]
        bucket, samples = planner.at(24 + 12 * step)
        assert [s.position for s in joined] == list(range(24 + 12 * step, 36 + 12 * step))
        assert [s.sample for s in joined] == samples.tolist()
        assert {(s.height, s.width) for s in joined} == {sizes[bucket]}


def test_batches_that_do_not_divide_are_refused() -> None:
    planner = plan([np.arange(20)], None, 8, 0)
    with pytest.raises(ValueError, match="does not divide by 3"):
        MicroBatches(planner, [(8, 8)], world=3)
    with pytest.raises(ValueError, match="micro-batches of 3"):
        MicroBatches(planner, [(8, 8)], micro=3)


def test_values_are_those_of_the_files() -> None:
    first, second = Pictures(5, [(9, 13)]), Pictures(4, [(20, 11)], seed=1)
    samples = Samples([first, second], CHOICE, 0)
    assert len(samples) == 9
    batch = samples.__getitems__(slots([6, 0, 4], (8, 10), first=100))
    expected = [second.pixels[1], first.pixels[0], first.pixels[4]]
    assert batch.image is not None
    assert batch.image.dtype == torch.uint8
    for got, pixels in zip(batch.image, expected, strict=True):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), resize_and_crop(pixels, 8, 10))
    assert batch.index.tolist() == [100, 101, 102]
    assert batch.key == ["00000.tar/000001", "00000.tar/000000", "00000.tar/000004"]
    assert batch.weight is not None
    assert batch.weight.tolist() == [1, 1, 1]
    assert batch.bad == []


def test_a_caption_depends_on_the_position_alone() -> None:
    samples = Samples([Pictures(3)], CHOICE, 0)
    whole = samples.__getitems__(slots([k % 3 for k in range(400)]))
    assert abs(whole.source.count("short") - 200) < 40  # four standard deviations
    part = samples.__getitems__(slots([k % 3 for k in range(100, 110)], first=100))
    assert part.caption == whole.caption[100:110]
    assert part.source == whole.source[100:110]


@pytest.mark.parametrize("first", [0, 1019, 1020, 5000])
def test_numbers_drawn_ahead_are_those_of_the_positions(first: int) -> None:
    samples, where = Samples([Pictures(9)], CHOICE, 3), slots([0, 5, 2, 8, 8], first=first)
    for some in (where, where[::-1], [where[0], where[3]], where[1:2], where):
        index = torch.tensor([slot.position for slot in some])
        assert samples._draws(some, index) == uniform(3, index, "caption").tolist()


def test_scores_choose_among_captions() -> None:
    batch = Samples([Pictures(3)], PowerScore(0.1, 25.0), 0).__getitems__(slots([0, 1, 2]))
    assert batch.caption == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("broken", [[1], [3], [0, 2], [1, 2, 3], [0, 1, 2]])
def test_a_bad_sample_is_replaced_at_weight_zero(broken: list[int]) -> None:
    pictures = Pictures(4, [(9, 13)])
    clean = Samples([pictures], CHOICE, 0).__getitems__(slots([0, 1, 2, 3]))
    for i in broken:
        pictures.files[i] = pictures.files[i][:60]
    batch = Samples([pictures], CHOICE, 0).__getitems__(slots([0, 1, 2, 3]))
    assert batch.weight is not None
    assert batch.image is not None
    assert clean.image is not None
    assert batch.weight.tolist() == [float(i not in broken) for i in range(4)]
    assert [(b.shard, b.key) for b in batch.bad] == [("00000.tar", f"{i:06d}") for i in broken]
    assert all(b.reason for b in batch.bad)
    assert batch.key == clean.key
    assert torch.equal(batch.index, clean.index)
    for i in range(4):
        # The next good one stands in, past the end from the start.
        place = next(k % 4 for k in range(i, i + 4) if k % 4 not in broken)
        assert torch.equal(batch.image[i], clean.image[place])
        assert batch.caption[i] == clean.caption[place]
        assert (batch.source[i] == "") == (i in broken)


def test_a_batch_of_bad_samples_is_zero() -> None:
    pictures = Pictures(2)
    pictures.files = [b"", b"nothing"]
    batch = Samples([pictures], CHOICE, 0).__getitems__(slots([0, 1], (16, 24)))
    assert batch.image is not None
    assert batch.image.shape == (2, 3, 16, 24)
    assert not batch.image.any()
    assert batch.weight is not None
    assert batch.weight.tolist() == [0, 0]
    assert batch.caption == ["", ""]
    assert len(batch.bad) == 2


def test_captions_that_the_rule_refuses_are_bad() -> None:
    batch = Samples([Pictures(2)], Proportion({"human": 1.0}), 0).__getitems__(slots([0]))
    assert batch.bad[0].reason.startswith("no caption: ")


def same(a: Batch, b: Batch) -> bool:
    tensors = [(x.image, y.image) for x, y in [(a, b)]] + [(a.index, b.index), (a.weight, b.weight)]
    rest = (a.caption, a.key, a.bad, a.source) == (b.caption, b.key, b.bad, b.source)
    return rest and all(x is not None and y is not None and torch.equal(x, y) for x, y in tensors)


def test_workers_change_nothing() -> None:
    pictures = Pictures(23, [(9, 13), (12, 7)])
    pictures.files[5] = b"broken"
    planner = plan([np.arange(23)], [np.arange(23) % 2], 4, 0)
    runs = []
    for workers in (0, 2):
        batches = MicroBatches(planner, [(8, 8), (16, 8)], 8, micro=2)
        runs.append(list(islice(loader(Samples([pictures], CHOICE, 0), batches, workers), 24)))
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert sum(len(batch.bad) for batch in runs[0]) > 0


TRAINER = """
import os, sys
import numpy as np
from memory_source import Pictures
from sana.data.caption import Caption, Proportion
from sana.data.loader import MicroBatches, Samples, loader
from sana.data.planner import plan

class Wordy(Pictures):
    def captions(self, i):
        return (Caption("long", "x" * 100_000),)

batches = MicroBatches(plan([np.arange(9)], None, 4, 0), [(8, 8)])
made = iter(loader(Samples([Wordy(9)], Proportion({"long": 1.0}), 0), batches, 2))
next(made)
print(*(worker.pid for worker in made._workers), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's part is Linux's")
def test_workers_end_with_a_trainer_that_is_killed() -> None:
    """Their next batches do not fit into a pipe that nobody reads any more."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    said, _ = process.communicate(timeout=120)  # waits for all who hold the output: the workers too
    assert process.returncode == -9
    assert len(said.split()) == 2
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in said.split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid: str) -> bool:
    """Whether a process has not ended; a zombie has, whoever adopted it has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_pixels_span_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255, 51], dtype=torch.uint8)).tolist() == pytest.approx(
        [-1.0, 1.0, 51 / 127.5 - 1]
    )
