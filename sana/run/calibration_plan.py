"""The memory of a calibration, as `sana.quant.svdquant` needs one before it quantises.

The network draws some prompts in full precision with every other part on the device, whatever ``offload`` says. It is
run on fake tensors for one step, which tells what it allocates and how many tokens of each layer a call leaves behind;
the layers are then fitted one after the other, on fake tensors as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.ops.allocations import Allocations
from sana.quant.calibrate import PER_CALL, Activations, collect
from sana.quant.report import report_of
from sana.quant.svdquant import SVDQuant, SVDQuantLinear, fit

FP32 = 4  # bytes


def calibration_peak(
    quant: SVDQuant,
    network: Any,
    quantised: nn.Module,
    start: Callable[[Any], Any],
    step: Callable[[Any, Any], object],
    *,
    batches: int,
    calls: int,
    latents: int,
    autocast: bool,
) -> int:
    """Bytes that a calibration allocates at its worst moment: while the network draws, or while a layer is fitted.

    Args:
        quant: its settings.
        network: in full precision, of fake tensors.
        quantised: the same on the meta device after `quant`.
        start: (network) -> what all calls of a batch share: the captions' keys and values, and the times.
        step: (network, that) -> anything: one call of the network.
        batches: of prompts that are drawn; the last counts as a whole one.
        calls: of the network for one batch.
        latents: bytes of what the network is given in a call; as much comes out, and both are remembered.
        autocast: whether it draws under autocast to bfloat16.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shared: list[Any] = []
    with torch.no_grad(), fake, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        once = collect(network, lambda given: shared.append(start(given)), PER_CALL)
        shared.clear()
        with Allocations() as drawing:
            seen = collect(network, lambda given: step(given, start(given)), PER_CALL)
    times = {name: batches * (1 if name in once else calls) for name in seen}
    met = {name: (len(found.rows) * times[name], found.rows.shape[1]) for name, found in seen.items()}
    one = sum(_bytes(len(found.rows), found.rows.shape[1]) for found in seen.values())
    kept = sum(_bytes(rows, width) for rows, width in met.values())
    points = batches * calls * latents
    worst = drawing.peak - one + kept + 2 * points  # what is kept after the last call, with what that one allocates
    return max(worst, points + _joining(met, quant.rows), points + _fitting(quant, network, quantised, met, fake))


def _joining(met: dict[str, tuple[int, int]], limit: int) -> int:
    """Bytes at the worst moment of joining what the calls have left, layer by layer, and choosing `limit` tokens."""
    held, worst = sum(_bytes(*size) for size in met.values()), 0
    for rows, width in met.values():
        joined, chosen = FP32 * width * rows, FP32 * width * min(rows, limit)
        worst = max(worst, held + joined + (chosen if rows > limit else 0))
        held += chosen - joined  # of the tokens that were held one by one
    return worst


def _fitting(
    quant: SVDQuant, network: Any, quantised: nn.Module, met: dict[str, tuple[int, int]], fake: FakeTensorMode
) -> int:
    """Bytes at the worst moment of fitting: the tokens of the layers that are still to come, the layers that are made,
    and the work on one."""
    trimmed = {name: (min(rows, quant.rows), width) for name, (rows, width) in met.items()}
    left, made, worst = sum(_bytes(*size) for size in trimmed.values()), 0, 0
    known: dict[tuple[Any, ...], tuple[int, int]] = {}
    for name in report_of(quantised).converted:
        if name not in trimmed:
            continue
        weight = network.get_submodule(name).weight
        key = (tuple(weight.shape), weight.dtype, trimmed[name][0])
        if key not in known:
            known[key] = _one_layer(quant, *key, fake)
        buffers, work = known[key]
        worst = max(worst, left + made + buffers + work)
        left, made = left - _bytes(*trimmed[name]), made + buffers
    return worst


def _one_layer(
    quant: SVDQuant, shape: tuple[int, ...], dtype: torch.dtype, rows: int, fake: FakeTensorMode
) -> tuple[int, int]:
    """Bytes of a quantised layer, and of what fitting it allocates besides, with its weight in float32 where it is not
    there already."""
    out, width = shape[:2]
    with fake:
        layer = SVDQuantLinear.empty(width, out, False, "cpu", rank=quant.rank, precision=quant.precision)
        weight, given = torch.empty(out, width, dtype=dtype), Activations(torch.empty(rows, width), torch.empty(width))
        with Allocations() as work:
            fit(layer, weight.float(), given, quant.rounds)
    return sum(b.numel() * b.element_size() for b in layer.buffers()), work.peak


def _bytes(rows: int, width: int) -> int:
    """Of a layer's tokens and its largest numbers, as `Activations` has them."""
    return FP32 * width * (rows + 1)
