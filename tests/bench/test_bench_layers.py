"""``bench.py blocks`` and ``recipe``: the sides agree, the file has its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana.bench.__main__ import main
from sana.bench.recipe import products, split


@pytest.mark.slow
def test_blocks_agree_and_the_file_has_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = ["--size", "tiny", "--layers", "2", "--px", "64", "96", "--repeats", "1", "--json", str(file)]
    assert main(["blocks", *options]) == 0
    results = json.loads(file.read_text())
    keys = ["forward_fp32", "train_fp32", "forward_bf16", "train_bf16", "sampling"]
    assert list(results)[:5] == keys
    rows = {(row["name"], row["dtype"], row["shape"].split()[3]): row for row in results["rows"]}
    assert len(rows) == 9
    for (name, dtype, _), row in rows.items():
        assert row["failed"] == {}
        assert row["error"]["ours"] < (1e-5 if dtype == "fp32" else max(1e-3, 1.2 * row["error"]["eager"]))
        assert row["ratio"]["eager"] == row["ms"]["eager"]["median"] / row["ms"]["ours"]["median"]
        key = name if name == "sampling" else f"{name}_{dtype}"
        assert results[key] <= row["ratio"]["eager"]
    assert list(tmp_path.iterdir()) == [file]
    capsys.readouterr()


@pytest.mark.parametrize("bf16", [False, True])
def test_products_take_some_time(bf16: bool) -> None:
    small, large = (products(bf16, batch=batch, text=5) for batch in (2, 32))
    assert 0 < small < large


def test_recipe_wants_a_worktree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--before", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bench.py recipe: --before {tmp_path} has no train.py; give a worktree\n"


def test_parts_of_an_update_come_from_the_records(tmp_path: Path) -> None:
    rows = [{"step": 1, "time/model": 9.0, "time/data": 9.0}, {"step": 2, "val/loss": 1.0}]
    rows += [
        {"step": 40 * i, "time/model": m, "time/text": 0.5, "time/checkpoint": 7.0}
        for i, m in enumerate((1.0, 3.0, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert split(tmp_path / "metrics.jsonl") == {"step": 2.5, "model": 2.0, "text": 0.5}
