"""``quant=fp8_train`` over processes, compiled, and with blocks that are recomputed.

The scale of an input is that of a micro-batch, so the losses of two processes are those of one that takes the same
halves one after the other; those of one that takes the whole batch differ by the rounding of FP8.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchao")

from recipes import BATCH, Latents, run, wide
from test_strategies import close, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from sana.types import Batch, Condition

STEPS, HALF = 6, 3
WHOLE = 0.03  # of a loss: how far whole batches may be from halves, by the rounding of FP8 (mantissas of 2 and 3 bits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def halves(folder: Path) -> dict[str, Any]:
    """One process, in two micro-batches."""
    return run(str(folder / "halves"), "single", STEPS, "fp8", micro=BATCH // 2)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, dict[str, Any]]:
    """Two processes."""
    jobs = {
        "fsdp": {"strategy": "fsdp", "steps": STEPS, "kind": "fp8", "every": HALF, "out": str(folder / "fsdp")},
        "ddp": {"strategy": "ddp", "steps": STEPS, "kind": "fp8"},
        "offload": {"strategy": "offload", "steps": HALF, "kind": "fp8"},
        "recomputed": {"strategy": "fsdp", "steps": HALF, "kind": "fp8 recomputed"},
        "low": {"strategy": "low", "steps": HALF, "kind": "fp8", "precision": "bf16-mixed"},
        "mixed": {"strategy": "ddp", "steps": HALF, "kind": "fp8", "precision": "bf16-mixed"},
    }
    half = str(folder / "fsdp" / "checkpoints" / f"step_{HALF:08d}.ckpt")
    jobs["again"] = {"strategy": "fsdp", "steps": STEPS, "kind": "fp8", "resume": half}
    return dict(zip(jobs, on_ranks(2, folder, list(jobs.values())), strict=True))


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_learn_what_one_does(
    folder: Path, halves: dict[str, Any], two: dict[str, dict[str, Any]]
) -> None:
    assert len(halves["losses"]) == STEPS
    for name in ("fsdp", "ddp", "offload", "recomputed"):
        found = two[name]["losses"]
        close(found[0], halves["losses"][0], 1e-6)
        close(found, halves["losses"][: len(found)], 1e-4)
    for name in ("fsdp", "ddp"):
        for part in ("whole", "average"):
            assert two[name][part].keys() == halves[part].keys()
            for key, value in halves[part].items():
                torch.testing.assert_close(two[name][part][key], value, rtol=0, atol=1e-3)
        for output, expected in zip(two[name]["outputs"], halves["outputs"], strict=True):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-2)
    close(two["low"]["losses"], two["mixed"]["losses"], 2e-2)
    whole, plain = run(str(folder / "at once"), "single", STEPS, "fp8"), run(str(folder / "p"), "single", STEPS, "wide")
    for other in (whole, plain):
        assert other["losses"][0] != halves["losses"][0]
        torch.testing.assert_close(torch.tensor(halves["losses"]), torch.tensor(other["losses"]), rtol=WHOLE, atol=0)


@pytest.mark.slow
@pytest.mark.long
def test_a_resumed_run_is_the_straight_one_bit_for_bit(two: dict[str, dict[str, Any]]) -> None:
    straight, again = two["fsdp"], two["again"]
    assert again["losses"] == straight["losses"][HALF:]
    for part in ("whole", "average"):
        for key, value in straight[part].items():
            assert torch.equal(again[part][key], value), (part, key)


@pytest.mark.slow
@pytest.mark.long
def test_a_checkpoint_goes_into_a_run_without_fp8(folder: Path, two: dict[str, dict[str, Any]]) -> None:
    """The same names, shapes and types of weights, averages and states of the optimizer."""
    place = str(folder / "fsdp" / "checkpoints" / f"step_{STEPS:08d}.ckpt")
    plain = run(str(folder / "on"), "single", STEPS, "wide", resume=place)  # no update is left to be done
    assert plain["losses"] == []
    assert plain["updates"] == {"network": STEPS}
    for part in ("whole", "average"):
        assert plain[part].keys() == two["fsdp"][part].keys()
        for key, value in two["fsdp"][part].items():
            assert plain[part][key].dtype == value.dtype
            assert torch.equal(plain[part][key], value), (part, key)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        eight = any("Float8" in type(a).__name__ for a in args)
        self.count["fp8"] += func is torch.ops.aten.mm.default and eight
        return func(*args, **(kwargs or {}))


def step(keep: str | None) -> tuple[list[torch.Tensor], int, int]:
    """The gradients of a step, how many layers have FP8 products, and how many the backward pass has."""
    network: Any = wide(keep=keep).network
    data: Batch = Latents().collate([5, 900, 77])
    assert data.latent is not None
    condition = Condition(text=data.text, mask=data.text_mask)  # type: ignore[arg-type]
    loss = network(data.latent.unsqueeze(2), torch.full((3, 1), 0.3), condition).square().mean()
    with Products() as products:
        loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return gradients, len(network.quantization.converted), products.count["fp8"]


def test_recomputed_blocks_give_the_same_gradients_and_keep_their_products() -> None:
    """Each layer has one product forward, and two backward: of its input and of its weight."""
    expected, layers, plain = step(None)
    assert plain == 2 * layers > 0
    for keep, products in (("input", 3 * layers), ("products", 2 * layers)):
        gradients, _, found = step(keep)
        assert found == products
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.slow
@pytest.mark.long
def test_compiled_blocks_learn_what_plain_ones_do(folder: Path) -> None:
    """In a process of its own: the checks of shapes that tests switch on make a compiler take minutes."""
    kinds = ("fp8", "fp8 compiled")
    plain, compiled = on_ranks(1, folder, [{"strategy": "single", "steps": 2, "kind": kind} for kind in kinds])
    close(compiled["losses"], plain["losses"], 1e-3)
    for part in ("whole", "average"):
        assert compiled[part].keys() == plain[part].keys()
