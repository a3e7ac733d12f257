"""The benchmark of the Frechet distance runs, finds the peers in agreement, and writes its numbers."""

from __future__ import annotations

import json

from sana.bench.__main__ import main


def test_small(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main(["frechet", "--dim", "31", "--images", "1500", "--threads", "1", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert set(facts["sides"]) == {"ours", "torchmetrics", "clean-fid"}
    assert all(side["relative_difference"] < 1e-6 for side in facts["sides"].values())
    assert "1,500 vectors" in capsys.readouterr().out
