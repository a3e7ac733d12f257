"""A run as one file, and that file by its bare name: built again to the bit; recipes in headers are not trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from weights import script

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.record import Record, read_record
from sana.checkpoint.source import open_source
from sana.checkpoint.tensors import read_safetensors
from sana.checkpoint.write import write_consolidated
from sana.model.load import load_weights
from sana.run import runs
from sana.run.begin import DIRECTORY, begin
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.export import export_run
from sana.run.recipe import PROJECT, training_of
from sana.run.restore import restore
from sana.run.saved import load_saved, prepare

convert_checkpoint = script("convert_checkpoint")
SMALL = ["network.width=32", "network.depth=2", "block.cross.heads=1", "timestep.shift=2.5"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run with a checkpoint whose live and averaged weights differ."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", DIRECTORY):
        monkeypatch.delenv(name, raising=False)
    folder, data = tmp_path / "run", tmp_path / "scenes"
    config, record, _ = begin(prepare("train", [f"run.dir={folder}", f"data.folder={data}", *SMALL]))
    with record:
        network = build(config.model, "model").network
        live = {f"network.{name}": value.detach() for name, value in network.state_dict().items()}
        average = {name: 2 * value.detach() for name, value in network.named_parameters()}
        (folder / "checkpoints").mkdir()
        torch.save(
            {
                "state_dict": live,
                "updates": {"network": 7},
                "samples_seen": 70,
                "ema": {"network": {"updates": 7, "shadow": average}},
            },
            folder / "checkpoints" / "step_00000007.ckpt",
        )
    return folder


def state_of(ckpt: str | Path, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The network's weights as sample.py gets them."""
    restored = restore(prepare("sample", [f"ckpt={ckpt}", "prompt=a red circle", "device=cpu"]))
    assert load_weights(restored.module, restored.checkpoint, weights) == 7
    return restored.module.network.state_dict()


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_an_exported_run_has_the_bits_of_the_run(run: Path, tmp_path: Path, weights: str) -> None:
    record = export_run(run, tmp_path / "out.safetensors", weights)
    assert (record.weights, record.updates, record.facts["flow_shift"]) == (weights, 7, 2.5)
    want, got = state_of(run, weights), state_of(tmp_path / "out.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    if weights == "ema":
        with pytest.raises(CheckpointError, match="averaged weights only"):
            state_of(tmp_path / "out.safetensors", "live")


def test_bfloat16_rounds_to_nearest(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    want, got = state_of(run), state_of(tmp_path / "out.safetensors")
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value.bfloat16().float()), name
    exact = sum(value.numel() * 4 for value in want.values())
    assert (tmp_path / "out.safetensors").stat().st_size < 0.5 * exact + 2**16


def test_a_shipped_model_is_found_by_its_bare_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "experiments")
    export_run(run, tmp_path / "experiments" / "dots" / "model.safetensors")
    assert runs.shipped_models() == ["dots"]
    composed = prepare("sample", ["ckpt=dots", "prompt=x"])
    assert (composed.config.size, composed.config.timestep.shift) == (64, 2.5)
    assert composed.resolved["sampler"]["grid"]["shift"] == 2.5
    restored = restore(composed)
    assert restored.run == Path("runs/loaded/dots")
    assert restored.checkpoint == tmp_path / "experiments/dots/model.safetensors"
    with pytest.raises(ConfigError, match="dot does not exist; did you mean dots"):
        prepare("sample", ["ckpt=dot", "prompt=x"])
    prepare("eval", ["ckpt=dots"])


def test_it_is_found_from_another_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(run, tmp_path / "out.safetensors")
    monkeypatch.chdir(tmp_path)
    assert state_of("out.safetensors").keys()


def test_the_recipe_holds_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    saved = load_saved(run).config
    assert Path(saved.data.folder).is_absolute()
    recipe = export_run(run, tmp_path / "out.safetensors").recipe
    assert recipe is not None
    assert recipe["data"]["folder"] == "cache/scenes"
    assert recipe["model"]["autoencoder"]["path"] == "experiments/dc_ae_tiny/dc_ae_tiny.safetensors"
    text = json.dumps(recipe)
    assert str(PROJECT) not in text
    assert str(tmp_path) not in text
    assert recipe["model"]["network"]["width"] == 32


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("_target_", "os.system", "no file in conf/ names"),
        ("_target_", "sana.run.records.write_atomically", "no file in conf/ names"),
        ("seed", "${oc.env:HOME}", "refers to"),
        ("clip_norm", "much", "clip_norm: 'much' is text"),
        ("speed", 3, "unknown key"),
    ],
)
def test_a_recipe_in_a_header_is_not_trusted(run: Path, tmp_path: Path, key: str, value: object, says: str) -> None:
    record = export_run(run, tmp_path / "out.safetensors")
    assert record.recipe is not None
    record.recipe["model"][key] = value
    with pytest.raises(ConfigError, match=says):
        training_of(record, tmp_path / "out.safetensors")


def test_a_checkpoint_away_from_its_run_says_what_to_do(run: Path, tmp_path: Path) -> None:
    stray = tmp_path / "stray.ckpt"
    stray.write_bytes((run / "checkpoints/step_00000007.ckpt").read_bytes())
    with pytest.raises(ConfigError, match="lies outside a run"):
        prepare("sample", [f"ckpt={stray}", "prompt=x"])
    with pytest.raises(CheckpointError, match="export the run with"):
        open_source(stray)
    stray.rename(tmp_path / "stray.pth")
    with pytest.raises(CheckpointError, match=r"rename it to \.ckpt within its run"):
        open_source(tmp_path / "stray.pth")


def test_a_file_of_other_tensors_says_so(tmp_path: Path) -> None:
    write_consolidated(tmp_path / "a.safetensors", {"x": torch.ones(2)}, Record())
    with pytest.raises(ConfigError, match=r"a\.safetensors: holds no weights that are known here \(1 keys, first x"):
        prepare("sample", [f"ckpt={tmp_path / 'a.safetensors'}", "prompt=x"])


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.safetensors"
    command = [str(run), str(target), "--to", "sana", "--dtype", "bf16"]
    assert convert_checkpoint.main(command) == 0
    assert "ema weights after 7 updates" in capsys.readouterr().out
    record = read_record(target)
    assert record is not None
    assert record.updates == 7
    assert {tensor.dtype for tensor in read_safetensors(target)[0].like.values()} == {torch.bfloat16}
    before = target.read_bytes()
    assert convert_checkpoint.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "run"]
