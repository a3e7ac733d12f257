"""A folder for the hub: what it holds, whose terms it names, and that nothing is uploaded unasked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from weights import full, save, script

from sana.checkpoint.record import read_record
from sana.run.begin import DIRECTORY, begin
from sana.run.build import build
from sana.run.runs import find_weights
from sana.run.saved import prepare, training
from sana.run.sidecar import save_image

FACTS = {
    "prompt": "a red circle",
    "seed": 0,
    "steps": 20,
    "guidance": 2.0,
    "sampler": {},
    "checkpoint": "0",
    "commit": None,
}


def push(*arguments: object, code: int = 0) -> None:
    assert script("push_to_hub").main([str(a) for a in arguments]) == code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", DIRECTORY):
        monkeypatch.delenv(name, raising=False)
    small = ["network.width=32", "network.depth=2", "block.cross.heads=1"]
    config, record, _ = begin(prepare("train", [f"run.dir={tmp_path / 'run'}", *small]))
    with record:
        state = build(config.model, "model").network.state_dict()
        (tmp_path / "run/checkpoints").mkdir()
        content = {"state_dict": {f"network.{n}": t for n, t in state.items()}, "updates": {"network": 7}, "ema": {}}
        torch.save(content, tmp_path / "run/checkpoints/step_00000007.ckpt")
        (tmp_path / "run/samples").mkdir()
        for step in (1, 7):
            save_image(tmp_path / f"run/samples/step_{step:08d}.png", np.zeros((8, 8, 3), np.uint8), FACTS)
    return tmp_path / "run"


def test_the_folder_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "dots"
    push(run, target, code=2)
    assert "--licence: the weights are yours" in capsys.readouterr().err
    assert not target.exists()
    push(run, target, "--licence", "cc-by-4.0", "--dtype", "bf16")
    files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert files == {
        "README.md", "config.json", "model.safetensors", "licences/code.txt", "licences/README.txt",
        "samples/step_00000007.png",
    }  # fmt: skip
    record = read_record(target / "model.safetensors")
    assert record is not None
    assert json.loads((target / "config.json").read_text()) == record.recipe
    card = (target / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: cc-by-4.0" in front
    assert "pipeline_tag: text-to-image" in front
    assert "live after 7 updates" in card
    for part in ("code", "weights", "text encoder", "outputs"):
        assert f"| {part} | [" in card
    assert "samples/step_00000007.png" in card
    assert "a red circle" in card
    assert str(tmp_path) not in card
    assert "Apache License" in (target / "licences/code.txt").read_text()
    assert training(find_weights(str(target))).config.size == 64, "and the folder is a model that can be drawn with"


def test_published_weights_keep_their_terms_and_gemma_its_own(tmp_path: Path) -> None:
    source = save(tmp_path / "Sana_600M_512px.pth", full(1152, 1, base=16))
    push(source, tmp_path / "out", "--dtype", "bf16")
    card = (tmp_path / "out/README.md").read_text()
    assert "license: other" in card.split("---")[1]
    assert "NSCL v2-custom" in card
    assert "https://ai.google.dev/gemma/terms" in card
    assert not list((tmp_path / "out").glob("text_encoder*")), "Gemma is not handed on"


def test_names_for_upload_are_checked_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run, tmp_path / "out", "--licence", "mit", "--upload", "name", code=2)
    assert "write organisation/name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    push(run, tmp_path / "out", "--licence", "mit", "--samples", tmp_path / "run/checkpoints", code=2)
    assert "no .png in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
