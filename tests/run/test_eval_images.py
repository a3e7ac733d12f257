"""``python eval.py images=...`` on folders made elsewhere: what it writes, and what it says of what is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.run.groups import CONF
from sana.run.launch import launch
from sana.run.saved import prepare


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run eval.py in this process; its exit code and what it said on stderr."""
    spec = importlib.util.spec_from_file_location("eval_entry", CONF.parent / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> tuple[int, str]:
        code = launch("eval", module.evaluate_run, arguments)
        return code, capsys.readouterr().err

    return run


def pictures(folder: Path, n: int, seed: int, suffix: str = ".png") -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        small = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((33 + i, 40)).save(folder / f"{i:05d}{suffix}")
    return folder


@pytest.mark.long
def test_fid_of_two_folders(call, tmp_path):
    images, real = pictures(tmp_path / "images", 3, 0), pictures(tmp_path / "real", 4, 1, ".jpg")
    output = tmp_path / "out" / "fid.json"
    places = [f"images={images}", f"reference={real}", f"output={output}", "features=random:0", "metric=[fid]"]
    code, said = call(*places)
    assert code == 2
    assert "3 images for 2048 features" in said
    assert not output.exists()
    before = sorted(images.iterdir())
    assert call(*places, "allow_small_n=true") == (0, "")
    results = json.loads(output.read_text())
    assert set(results) >= {"metric", "value", "interval", "n", "settings"}
    assert (results["metric"], results["n"]) == ("fid", 3)
    assert results["value"] == results["fid"] > 0
    assert "random:0" in results["settings"]["weights"]
    assert results["settings"]["resize"] == "clean"
    assert results["settings"]["reference_n"] == 4
    assert output.with_suffix(".html").exists()
    assert sorted(images.iterdir()) == before, "nothing is written into the folder of somebody else"
    assert call(*places, "allow_small_n=true", "metric.fid.mode=pytorch-fid", "metric.fid.size=32")[0] == 2
    mode = ["metric.fid.features.mode=pytorch-fid", "metric.fid.features.size=32"]
    assert call(*places, "allow_small_n=true", *mode) == (0, "")
    other = json.loads(output.read_text())
    assert other["value"] != results["value"]
    assert "32 px" in other["settings"]["resize"]


def test_what_is_missing_is_named(call, tmp_path):
    images, real = pictures(tmp_path / "images", 2, 0), pictures(tmp_path / "real", 2, 1)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}\n' * 2)
    for arguments, said in (
        (["metric=[fid]", f"reference={real}"], ("pt_inception-2015-12-05-6726825d.pth", "github.com", "features=")),
        (["metric=[fid]", f"reference={real}", "features=nowhere.pth"], ("features=nowhere.pth: no such file",)),
        (["metric=[fid]", "features=random:0"], ("reference: fid needs real images",)),
        (["metric=[geneval]", f"metadata={lines}"], ("mask2former-swin-small-coco-instance", "detector.weights=PATH")),
        (["metric=[geneval]", "metric.geneval.detector.weights=nowhere"], ("nowhere: no such file",)),
        (["metric=[geneval]", "per_task=3"], ("per_task=3: has no effect with images=",)),
        (
            ["metric=[clip_score]", f"metadata={lines}", "metric.clip_score.reward.weights=x.pt"],
            ("x.pt: no such file",),
        ),
        (["metric=[psnr]", f"reference={real}", "features=random:0"], ("features: random:0 is used by none of psnr",)),
    ):
        code, text = call(f"images={images}", *arguments)
        assert code == 2
        assert len(text.strip().splitlines()) == 1, text
        assert all(part in text for part in said), text
    code, text = call("metric=[fid]")
    assert code == 2
    assert "images=FOLDER" in text
    assert not (images / "results.json").exists()


def test_every_metric_composes():
    for path in sorted((CONF / "metric").glob("*.yaml")):
        prepare("eval", ["images=somewhere", f"metric=[{path.stem}]"])
