"""Ranks, workers and shards change neither the order nor what an epoch holds, nor does a stop in between."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_source import Pictures

from sana.data.bucket import Buckets
from sana.data.caption import Proportion
from sana.data.formats.open import open_source
from sana.data.loader import MicroBatches
from sana.data.planner import Planner, plan

ROOT = Path(__file__).resolve().parents[2]
COUNT, BATCH = 70, 6
RANKS, WORKERS, SHARDS = (1, 2, 3), (0, 2, 4), (3, 7, 64)
CELLS = [(1, 0, 3), (2, 2, 7), (3, 0, 64), (1, 4, 64), (2, 0, 3), (3, 2, 7)]
"""(ranks, workers, shards) of the runs with real processes: each value of each at least once."""


def choice() -> Proportion:
    return Proportion({"short": 1.0, "long": 1.0})


def table() -> Buckets:
    return Buckets([(8, 8), (8, 16), (16, 8)], [1.0, 0.5, 2.0])


def sizes() -> list[tuple[int, int]]:
    return list(table().sizes)


def planned(source: Any, seed: int = 5) -> Planner:
    """Three buckets of very different sizes."""
    buckets = table().nearest(source.index.column("height"), source.index.column("width"))
    return plan([np.arange(len(source))], [buckets], BATCH, seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    pictures = Pictures(COUNT, [(8, 8)] * 5 + [(8, 16)] + [(8, 8)] * 7 + [(16, 9)])
    root = tmp_path_factory.mktemp("shards")
    return {shards: str(pictures.write(root / str(shards), shards)) for shards in SHARDS}


def stream(source: Any, world: int, first: int, steps: int, seed: int = 5) -> list[list[Any]]:
    """Per step, the slots of all ranks in order."""
    ranks = [islice(MicroBatches(planned(source, seed), sizes(), first * BATCH, r, world), steps) for r in range(world)]
    return [[slot for part in step for slot in part] for step in zip(*ranks, strict=True)]


EPOCHS = 6
STEPS = EPOCHS * COUNT // BATCH  # all buckets have whole batches after 6 epochs: 6 times any count divides by 6


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("world", RANKS)
def test_the_grid_on_the_planner(folders: dict[int, str], world: int, shards: int) -> None:
    source = open_source(folders[shards])
    whole = stream(source, world, 0, STEPS)
    assert whole == stream(open_source(folders[3]), 1, 0, STEPS)
    assert Counter(slot.sample for step in whole for slot in step) == dict.fromkeys(range(COUNT), EPOCHS)
    assert all(len({(s.height, s.width) for s in step}) == 1 for step in whole)
    orders = {tuple(s.sample for s in step) for step in whole}
    assert len(orders) == STEPS  # no order comes twice in six epochs
    assert stream(source, world, 0, STEPS, seed=6) != whole


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("workers", WORKERS)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.sampled_from(RANKS), other=st.sampled_from(RANKS), stop=st.integers(0, STEPS - 1), seed=st.integers(0, 9)
)
def test_a_stop_at_any_step_goes_on_exactly(
    folders: dict[int, str], shards: int, workers: int, world: int, other: int, stop: int, seed: int
) -> None:
    """Also on another number of ranks, and whatever the workers had prepared beyond the stop."""
    source, ahead = open_source(folders[shards]), 2 * workers
    before = stream(source, world, 0, stop + ahead, seed)[:stop]  # what was prepared is lost, and comes again
    assert before + stream(source, other, stop, 4, seed) == stream(open_source(folders[3]), 1, 0, stop + 4, seed)


@pytest.mark.long
def test_real_ranks_and_workers_go_on_where_others_stopped(folders: dict[int, str], tmp_path: Path) -> None:
    """Six runs, each with other numbers of ranks, workers and shards, each continuing the one before at a random step:
    together they are the six epochs of the plan."""
    stops = [0, *sorted(random.Random(1).sample(range(1, STEPS), len(CELLS) - 1)), STEPS]
    expected = stream(open_source(folders[3]), 1, 0, STEPS)
    captions: list[str] = []
    for (world, workers, shards), first, last in zip(CELLS, stops, stops[1:], strict=False):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), folders[shards]]
        more = [str(world), str(workers), str(tmp_path / f"store{first}"), str(first * BATCH), str(last - first)]
        processes = [
            subprocess.Popen([*command, str(rank), *more], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes)
        for step, parts in zip(expected[first:last], zip(*json.loads(said[0]), strict=True), strict=True):
            assert [p for part in parts for p in part[0]] == [slot.position for slot in step]
            assert [key.rsplit("/", 1)[1] for part in parts for key in part[1]] == [f"{s.sample:06d}" for s in step]
            assert {tuple(part[2]) for part in parts} == {(BATCH // world, 3, step[0].height, step[0].width)}
            captions += [caption for part in parts for caption in part[3]]
    assert len(captions) == STEPS * BATCH
    assert 0.4 < sum(caption.startswith("number") for caption in captions) / len(captions) < 0.6
