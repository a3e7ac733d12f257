"""Groups of parameters with rates of their own, on a recipe small enough to be recomputed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_recipe import Toy, fit, parameters
from torch import nn

from sana.callback.records import Records
from sana.callback.summary import Summary
from sana.run.records import read_metrics


def toy(rate: float = 3.0) -> Toy:
    recipe = Toy()
    recipe.rates = {"main": {"bias": rate}}
    return recipe


def test_each_group_follows_its_own_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy()
    fit(recipe, tmp_path, 6, callbacks=[Records(1), Summary()])
    torch.manual_seed(0)
    w, c = (float(p.detach().double()) for p in nn.Linear(1, 1).parameters())
    mw = mc = 0.0
    for step in range(6):
        x = torch.sin(torch.arange(4 * step, 4 * step + 4).double())
        error = w * x + c - 3 * x
        mw, mc = 0.9 * mw + float((2 * error * x).mean()), 0.9 * mc + float((2 * error).mean())
        lr = 0.1 * min(1.0, (step + 1) / 4)
        w, c = w - lr * mw, c - 3 * lr * mc
    assert recipe.main.weight.item() == pytest.approx(w, rel=1e-5)
    assert recipe.main.bias.item() == pytest.approx(c, rel=1e-5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["train/lr"] for row in rows] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert [row["train/lr_x3"] for row in rows] == pytest.approx([3 * row["train/lr"] for row in rows])
    assert "main: SGD, lr 0.1; 1 tensors at 0.3" in capsys.readouterr().out


def test_a_factor_of_one_is_no_group(tmp_path: Path) -> None:
    plain, one = Toy(), toy(1.0)
    fit(plain, tmp_path / "a", 5)
    fit(one, tmp_path / "b", 5)
    assert len(one.optimizers()[0].param_groups) == 1  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(one), strict=True))


def test_resume_is_bitwise_and_another_factor_may_follow(tmp_path: Path) -> None:
    straight, first, second, other = toy(), toy(), toy(), Toy()
    fit(straight, tmp_path / "a", 10)
    fit(first, tmp_path / "b", 5)
    checkpoint = tmp_path / "b" / "checkpoints" / "step_00000005.ckpt"
    for recipe in (second, other):
        with torch.no_grad():
            for p in recipe.parameters():
                p.fill_(7.0)
        fit(recipe, tmp_path / "c", 10, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(second), strict=True))
    assert not torch.equal(straight.main.bias, other.main.bias)  # rates are settings: they are not in a checkpoint
