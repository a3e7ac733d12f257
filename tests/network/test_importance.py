"""Block importance against its definition in float64, and what is kept by it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_growth import network

from sana.network.growth import Constant, grow_depth
from sana.network.importance import BlockImportance, most_important
from sana.network.sana import Sana
from sana.types import Condition


def passes(net: Sana, seeds: list[int]) -> None:
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        b, h = 1 + seed % 3, 4 + seed  # batches and sizes differ, so that tokens, not passes, have equal weight
        x, text = torch.randn(b, 4, 1, h, 5, generator=g), torch.randn(b, 6, 24, generator=g)
        with torch.no_grad():
            net(x, torch.rand(b, 1, generator=g), Condition(text, None))


def expected(net: Sana, seeds: list[int]) -> np.ndarray:
    """By its definition: inputs and outputs of each block kept, cosines in float64."""
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in net.blocks]
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(
            lambda _, given, found, i=i: seen[i].append((given[0].double().numpy(), found[0].double().numpy()))
        )
    passes(net, seeds)
    values = []
    for pairs in seen:
        cosines = [
            ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).ravel() for x, y in pairs
        ]
        values.append(1 - np.concatenate(cosines).mean())
    return np.array(values)


def test_as_defined() -> None:
    net = network(5)
    importance = BlockImportance(net)
    with importance:
        passes(net, [0, 1])
    passes(net, [7])  # not watched
    with importance:
        passes(net, [2])
    np.testing.assert_allclose(importance.values(), expected(network(5), [0, 1, 2]), rtol=0, atol=2e-7)
    np.testing.assert_allclose(importance.values(), importance.values())


def test_identity_blocks_have_none() -> None:
    net = network(6)
    net.load_state_dict(grow_depth(network(4).state_dict(), 4, 6, Constant()))
    with BlockImportance(net) as importance:
        passes(net, [0])
    values = importance.values()
    assert max(abs(value) for value in values[4:]) < 1e-6 < min(values[:4])
    assert most_important(values, 4) == [0, 1, 2, 3]


def rank(number: int, home: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=number, world_size=2)
    net = network(3)
    with BlockImportance(net) as importance:
        passes(net, [[0, 1], [2]][number])
    Path(home, f"{number}.json").write_text(json.dumps(importance.values()))
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(rank, (str(tmp_path),), 2)  # type: ignore[attr-defined]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == second
    np.testing.assert_allclose(first, expected(network(3), [0, 1, 2]), rtol=0, atol=2e-7)


def test_asked_too_early() -> None:
    with pytest.raises(ValueError, match="block 0 has seen no tokens"):
        BlockImportance(network(2)).values()


@pytest.mark.parametrize(
    ("values", "depth", "kept"),
    [([0.5, 0.1, 0.3, 0.4], 2, [0, 3]), ([0.2, 0.2, 0.2], 2, [0, 1]), ([1.0], 1, [0]), ([0.1, 0.3], 2, [0, 1])],
)
def test_what_stays(values: list[float], depth: int, kept: list[int]) -> None:
    assert most_important(values, depth) == kept


def test_no_block_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="3 blocks are to stay of 2"):
        most_important([0.1, 0.2], 3)


MOST = 1.15
"""What passes that are watched may take of plain ones."""


def cost() -> None:
    """Best processor times of passes through 60 narrow blocks, where watching costs most, in turns: plain, watched.

    On a busy machine the best of a few is not the best there is: up to ten times as many, until they fit `MOST`.
    """
    torch.set_num_threads(1)
    net, x, text = network(60, width=128, heads=4), torch.randn(2, 4, 1, 16, 16), torch.randn(2, 20, 24)
    importance, times = BlockImportance(net), {True: [], False: []}
    with torch.no_grad():
        for turn in range(240):
            start = time.process_time()
            if turn % 2:
                with importance:
                    net(x, torch.full((2, 1), 0.5), Condition(text, None))
            else:
                net(x, torch.full((2, 1), 0.5), Condition(text, None))
            times[bool(turn % 2)].append(time.process_time() - start)
            if turn % 24 == 23 and min(times[True]) < MOST * min(times[False]):
                break
    print(min(times[False]), min(times[True]))


@pytest.mark.slow
def test_watching_costs_little() -> None:
    """In a process of its own, because the tests' type checks cost more than watching."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_importance as t; t.cost()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, watched = map(float, done.stdout.split())
    assert watched < MOST * plain
