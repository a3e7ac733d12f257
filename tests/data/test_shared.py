"""Buffers that are lent, sent from other processes, and come back; nothing is overwritten while somebody has it."""

from __future__ import annotations

import multiprocessing
import pickle
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from memory_source import Pictures

from sana.data.caption import Proportion
from sana.data.loader import MicroBatches, Samples, loader
from sana.data.planner import plan
from sana.data.shared import Buffers, Sent

CHOICE = Proportion({"short": 1.0, "long": 1.0})


def test_a_buffer_is_free_when_nobody_has_it() -> None:
    buffers = Buffers(2, 48)
    numbers = [buffers.take(), buffers.take()]
    assert sorted(numbers) == [0, 1]  # type: ignore[type-var]
    assert buffers.take() is None
    whole = buffers.lend(1)
    view = whole[4:12].view(torch.float32).view(1, 2)
    array = view.numpy()
    del whole
    assert buffers.take() is None
    del view
    assert buffers.take() is None
    del array
    assert buffers.take() == 1
    buffers.give_back(0)
    assert buffers.take() == 0


def test_memory_outlives_its_buffers() -> None:
    buffers = Buffers(1, 16)
    number = buffers.take()
    assert number is not None
    values = buffers.lend(number).fill_(7)
    del buffers
    assert values.tolist() == [7] * 16


def fill(buffers: Buffers, number: int, queue: Any, seen: Any) -> None:
    inside = buffers.room(number)[:24].view(torch.int32).view(2, 3).copy_(torch.arange(6).view(2, 3))
    queue.put(Sent(buffers, number, SimpleNamespace(x=inside.t(), name="inside"), "x"))
    queue.put(Sent(buffers, number, SimpleNamespace(x=torch.ones(2), name="outside"), "x"))
    seen.wait(60)  # torch's own way of sending needs the sender


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_writes_where_this_one_reads(method: str) -> None:
    context = multiprocessing.get_context(method)
    buffers, queue = Buffers(3, 32), context.SimpleQueue()
    number = buffers.take()
    assert number is not None
    seen = context.Event()
    child = context.Process(target=fill, args=(buffers, number, queue, seen))
    child.start()
    got = queue.get()
    assert got.x.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert got.name == "inside"
    assert buffers.room(number)[:4].view(torch.int32).item() == 0
    buffers.room(number)[:4].view(torch.int32).fill_(9)
    assert got.x[0, 0] == 9
    other = queue.get()
    seen.set()
    child.join(60)
    assert other.x.tolist() == [1, 1]
    free = len(buffers._free)
    del got
    assert len(buffers._free) == free + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_do_not_change(workers: int) -> None:
    """More of them than there are buffers."""
    pictures = Pictures(40, [(16, 24)])
    samples = Samples([pictures], CHOICE, 0)
    planner = plan([np.arange(40)], None, 4, 0)

    def batches() -> Any:
        return loader(samples, MicroBatches(planner, [(16, 24)]), workers)

    kept = list(islice(batches(), 30))
    for batch, again in zip(kept, islice(batches(), 30), strict=True):
        assert batch.image is not None
        assert torch.equal(batch.image, again.image)
        for pixels, key in zip(batch.image, batch.key, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), pictures.pixels[int(key[-6:])])


def test_small_tensors_of_a_batch_go_by_value() -> None:
    batches = MicroBatches(plan([np.arange(9)], None, 3, 0), [(8, 8)])
    made = next(iter(loader(Samples([Pictures(9)], CHOICE, 0), batches)))
    same = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert torch.equal(same.index, made.index)
    assert torch.equal(same.weight, made.weight)
    assert same.caption == made.caption
