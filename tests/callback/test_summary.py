"""What a run says of itself at its start, and that ranks with different settings do not train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sana.callback.summary import DifferentRanksError, Summary
from sana.model.frozen import Frozen


def parts(lr: float, seed: int = 0) -> tuple[Any, Any]:
    """A stand-in for trainer and recipe with one network of four blocks."""
    network = nn.Module()
    network.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    network.checkpoint_every, network.checkpoint_keep = 3, "products"  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    optimizer.param_groups[0]["initial_lr"] = lr
    recipe = SimpleNamespace(
        trainables=lambda: {"network": network}, seed=seed, frozen=Frozen("cpu", text=nn.Linear(1, 1))
    )
    return SimpleNamespace(optimizers=[optimizer], is_global_zero=True), recipe


def test_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, recipe = parts(0.25)
    for block in list(recipe.trainables()["network"].blocks)[:2]:
        block.compile()
    Summary().on_train_start(trainer, recipe)
    assert capsys.readouterr().out.splitlines() == [
        "network: AdamW, lr 0.25",
        "network: 2 of 4 blocks are compiled",
        "network: 2 of 4 blocks are recomputed, keeping products",
        "frozen parts (text): cpu",
    ]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    Summary().on_train_start(*parts(0.25))
    for lr, seed, message in ((0.25 + rank, 0, "rank 1 has network.lr 1.25, rank 0 has 0.25"),
                              (0.25, rank, "rank 1 has seed 1, rank 0 has 0")):  # fmt: skip
        with pytest.raises(DifferentRanksError, match=message):
            Summary().on_train_start(*parts(lr, seed))
    (Path(folder) / str(rank)).touch()
    dist.destroy_process_group()


def test_ranks_that_differ_are_stopped_all(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
