"""Block importance while training: of the blocks as they are, and training goes on as if nothing had been asked."""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from test_image import batch, make

from sana.callback.importance import Importance
from sana.callback.records import Records
from sana.model.image import ImageModule
from sana.network.growth import Constant, grow_depth
from sana.network.importance import BlockImportance
from sana.run.records import read_metrics
from sana.run.report_curves import curves
from sana.types import Batch


class Pictures(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([batch(6 * i) for i in range(6)], batch_size=None)  # type: ignore[arg-type]

    def validation_batch(self) -> Batch:
        return batch(1000)


def grown() -> ImageModule:
    """Two blocks and two new ones behind them."""
    recipe, two = make(ema_decay=0.9, optimizer=partial(torch.optim.AdamW, lr=3e-2)), make()
    recipe.network = type(two.network)(4, 16, 4, 64, [lambda width, **_: _block(two, width)], text_norm=1.0)
    recipe.network.load_state_dict(grow_depth(two.network.state_dict(), 2, 4, Constant()))
    return recipe


def _block(recipe: ImageModule, width: int) -> Any:
    import copy

    return copy.deepcopy(recipe.network.blocks[0])  # type: ignore[index]


def fit(folder: Path, recipe: ImageModule, *callbacks: Any) -> tuple[list[torch.Tensor], Any]:
    """Final weights and averages, and the states of all generators."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    trainer = Trainer(
        max_steps=5, accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Records(1), *callbacks],
    )  # fmt: skip
    folder.mkdir()
    trainer.fit(recipe, datamodule=Pictures())
    states = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert recipe.network.training
    return [*recipe.state_dict().values(), *recipe.ema["network"].shadow.values()], states


def test_training_does_not_notice(tmp_path: Path) -> None:
    plain, states = fit(tmp_path / "plain", grown())
    recipe = grown()
    seen, after = fit(tmp_path / "seen", recipe, Importance(every=2, samples=3, times=2))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert states == after
    rows = {
        row["step"]: row for row in read_metrics(tmp_path / "seen" / "metrics.jsonl") if "importance/block_00" in row
    }
    assert list(rows) == [0, 2, 4, 5]
    assert all(abs(rows[0][f"importance/block_0{i}"]) < 1e-6 for i in (2, 3))
    assert all(rows[5][f"importance/block_0{i}"] > 1e-6 for i in (2, 3))
    # The end again, by its definition: 3 samples at t = 1/4 and 3/4.
    recipe.network.eval()
    few = batch(1000)
    few = Batch(few.image[:3], None, few.caption[:3], few.index[:3], few.key[:3])  # type: ignore[index]
    x0, pairs = recipe.latents(few), []
    hook = recipe.network.blocks[2].register_forward_hook(  # type: ignore[index]
        lambda _, given, found: pairs.append((given[0].double(), found[0].double()))
    )
    with torch.no_grad():
        for t in (0.25, 0.75):
            recipe.flow_loss(recipe.network, x0, recipe.encode_text(few.caption), few.index, torch.full((3,), t))
    hook.remove()
    cosines = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
    assert rows[5]["importance/block_02"] == pytest.approx(1 - cosines.mean().item(), rel=1e-3, abs=1e-7)
    page = curves({f"importance/block_{i:02d}": ([0.0, 5.0], [0.1, 0.2]) for i in range(60)})
    assert page.count("<figure") == 1
    assert "block 0" in page
    assert "block 59" in page


class Shift(nn.Module):
    """The least that is a block."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.amount, None


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Shift(0.5), Shift(2.0)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


def test_compiled_blocks_are_seen() -> None:
    network, x = Shifts(), torch.randn(2, 3, 5)
    before = network(x)
    with BlockImportance(network) as plain:  # type: ignore[arg-type]
        network(x)
    for block in network.blocks:
        block.compile(backend="eager")
    network(x)  # compiled while nobody watched
    with BlockImportance(network) as watched:  # type: ignore[arg-type]
        assert torch.equal(before, network(x))
    assert watched.values() == plain.values()
    y = x.double() + 0.5
    wanted = [1 - torch.cosine_similarity(a.double(), b, dim=-1).mean().item() for a, b in ((x, y), (y, y + 2))]
    assert plain.values() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(before, network(x))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"samples": 0}, {"times": 0}])
def test_bad_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"callback\.importance: .* at least 1"):
        Importance(**wrong)
