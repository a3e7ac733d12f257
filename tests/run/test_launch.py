"""The command line, the start of a run, repeating one, sweeps, and secrets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from sana.run.begin import DIRECTORY, begin
from sana.run.build import build, build_all
from sana.run.compose import Composed, compose, masked_environment
from sana.run.error import ConfigError
from sana.run.launch import launch
from sana.run.saved import load_saved, prepare, to_yaml
from sana.run.search import combinations
from sana.run.tree import print_tree


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", DIRECTORY):
        monkeypatch.delenv(name, raising=False)


def start(folder: Path, *overrides: str) -> Path:
    """Start and finish an empty training run; its directory."""
    config, record, _ = begin(prepare("train", [f"run.folder={folder}", *overrides]))
    with record:
        pass
    return Path(config.run.dir)


def test_a_task_gets_the_checked_configuration() -> None:
    seen: list[Composed] = []
    assert launch("train", seen.append, ["seed=7"]) == 0
    assert seen[0].config.seed == 7
    assert launch("train", lambda composed: 5, []) == 5


def test_defects_are_not_swallowed() -> None:
    def task(composed: Composed) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        launch("train", task, [])


def test_ctrl_c_has_its_exit_code() -> None:
    def task(composed: Composed) -> None:
        raise KeyboardInterrupt

    assert launch("train", task, []) == 130


def test_the_start_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = start(tmp_path, "seed=3", "optimizer.lr=2e-3")
    assert path.parent == tmp_path / "tiny"
    assert str(path) in capsys.readouterr().out
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert (config["seed"], config["model"]["seed"], config["optimizer"]["lr"]) == (3, 3, 0.002)
    assert config["model"]["network"] == config["network"], "interpolations are resolved"
    assert config["run"]["dir"] == str(path)
    assert yaml.safe_load((path / "overrides.yaml").read_text())[1:] == ["seed=3", "optimizer.lr=2e-3"]
    assert json.loads((path / "status.json").read_text())["status"] == "finished"
    with pytest.raises(ConfigError, match="in use"):
        prepare("train", [f"run.dir={path}"])


def test_ranks_that_lightning_starts_join_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = start(tmp_path)
    assert Path(os.environ[DIRECTORY]) == path
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = {p: p.read_bytes() for p in path.iterdir()}
    config, record, _ = begin(prepare("train", [f"run.folder={tmp_path}", "seed=9"]))
    with record:
        record.update(step=1)
    assert Path(config.run.dir) == path
    assert {p: p.read_bytes() for p in path.iterdir()} == before
    begin(prepare("train", [f"run.dir={path}"]))
    monkeypatch.delenv(DIRECTORY)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert begin(prepare("train", [f"run.dir={path}"])).config.run.dir == str(path)
    with pytest.raises(ConfigError, match="unless torchrun, srun"):
        begin(prepare("train", [f"run.folder={tmp_path}"]))


def test_repeating_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = start(tmp_path, "seed=3", "optimizer=came", f"run.dir={tmp_path / 'first'}")
    assert path == tmp_path / "first"
    again = prepare("train", rerun=path)
    now, before = again.resolved, yaml.safe_load((path / "config.yaml").read_text())
    assert now.pop("run")["dir"] is None
    before.pop("run")
    assert now == before
    assert prepare("train", ["seed=4"], rerun=path).config.seed == 4
    with pytest.raises(ConfigError, match="not the directory of a run"):
        prepare("train", rerun=tmp_path)
    text = (path / "config.yaml").read_text()
    older = yaml.safe_load(text)
    clip = older["model"]["clip_norm"]
    older["model"]["clip_norm"] = 0.123
    (path / "config.yaml").write_text(yaml.safe_dump(older))
    with pytest.raises(ConfigError, match=f"model.clip_norm was 0.123 and would be {clip}"):
        prepare("train", rerun=path)
    assert prepare("train", ["model.clip_norm=0.3"], rerun=path).config.model.clip_norm == 0.3
    seen: list[Composed] = []
    (path / "config.yaml").write_text(text)
    assert launch("train", seen.append, ["--rerun", str(path)]) == 0
    assert seen[0].config.seed == 3


def test_a_saved_configuration_is_checked_like_any_other(tmp_path: Path) -> None:
    path = start(tmp_path)
    assert load_saved(path).config.network.width == compose("train").config.network.width
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("sana.network.sana.Sana", "os.system"))
    with pytest.raises(ConfigError, match=r"os.system is not among"):
        load_saved(path)
    (path / "config.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a configuration"):
        load_saved(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_saved(tmp_path)


def test_sampling_takes_what_it_leaves_open_from_the_run(tmp_path: Path) -> None:
    path = start(tmp_path, "timestep.shift=2.5", "sampler.steps=11", "size=128")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step_00000001.ckpt").write_text("")
    values = prepare("sample", [f"ckpt={path}", "prompt=x", "sampler.guidance=2"]).resolved
    sampler = values["sampler"]
    assert (sampler["steps"], sampler["guidance"], sampler["grid"]["shift"]) == (11, 2, 2.5)
    assert sampler["solver"]["_target_"] == "sana.sampler.flow_dpm.flow_dpm"
    assert (values["size"], values["timestep"]["shift"]) == (128, 2.5)
    other = prepare("sample", [f"ckpt={path}", "prompt=x", "sampler=euler", "timestep.shift=6", "size=64"]).resolved
    assert other["sampler"]["solver"]["_target_"] == "sana.sampler.euler.euler"
    assert (other["sampler"]["steps"], other["sampler"]["grid"]["shift"], other["size"]) == (28, 6, 64)
    own = prepare("eval", [f"ckpt={path}", "sampler.grid.shift=4"]).resolved
    assert own["sampler"]["grid"]["shift"] == 4
    assert set(own["metric"]) == {"geneval_scenes", "fid_scenes"}
    quantised = prepare("eval", [f"ckpt={path}", "quant=int8_weight", "metric=[geneval_scenes]"]).resolved
    assert quantised["quant"]["_target_"] == "sana.quant.int8_weight.int8_weight"
    assert set(quantised["metric"]) == {"geneval_scenes"}
    with pytest.raises(ConfigError, match=r"sampler.stpes.*sampler.steps"):
        prepare("sample", [f"ckpt={path}", "prompt=x", "sampler.stpes=3"])


PROSE = [
    "a cat, asleep; a dog's (red) bed: 50% off = 3?",
    "a sign that says \"open, always\" and 'closed'",
    '"hello" and "world"',
    "a back\\slash, and one at the end\\",
    'a \\"quoted\\" backslash',
    "42",
    "null",
    "小狗, 🙂",
    "{a: b}",
]


def test_a_prompt_is_taken_as_it_stands(tmp_path: Path) -> None:
    path, seen = start(tmp_path), []
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "step_1.ckpt").touch()
    for text in PROSE:
        assert launch("sample", seen.append, [f"ckpt={path}", f"prompt={text}", f"negative={text}"]) == 0
        assert (seen[-1].resolved["prompt"], seen[-1].resolved["negative"]) == (text, text)
    # What is quoted, or a list, is read as a setting.
    assert launch("sample", seen.append, [f"ckpt={path}", "prompt=[a b,'c, d']", 'negative="x, y"', "seed=[1,2]"]) == 0
    values = seen[-1].resolved
    assert (values["prompt"], values["negative"], values["seed"]) == (["a b", "c, d"], "x, y", [1, 2])


def test_secrets_stay_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    notes = "logger.wandb.notes='x-${logger.wandb.entity}'"
    entity, group = "logger.wandb.entity=${oc.env:HF_TOKEN}", "logger.wandb.group=${oc.env:NO_SUCH,none}"
    overrides = ["logger=wandb", f"run.dir={tmp_path / 'run'}", entity, notes, group]
    composed = prepare("train", overrides)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    print_tree(composed, console)
    begin(composed)
    texts = [p.read_text() for p in (tmp_path / "run").iterdir()] + [console.export_text(), to_yaml(composed)]
    assert not [text for text in texts if "hunter2" in text]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["logger"]["wandb"]
    assert saved["entity"] == "${oc.env:HF_TOKEN}"
    assert saved["notes"] == "x-${oc.env:HF_TOKEN}"
    assert saved["group"] == "${oc.env:NO_SUCH,none}"
    # ... and are read when the run needs them, also from the saved file
    assert composed.config.logger.wandb.notes == "x-hunter2"
    assert OmegaConf.create(saved).notes == "x-hunter2"
    with masked_environment():
        assert composed.config.logger.wandb.entity == "${oc.env:HF_TOKEN}"
    assert composed.config.logger.wandb.entity == "hunter2"


def test_building() -> None:
    config = compose("train").config
    shift = build(config.timestep, "timestep")
    assert shift.shift == config.timestep.shift
    assert build(None, "nothing") is None
    nodes = OmegaConf.create({"a": config.timestep, "b": None})
    assert list(build_all(nodes, "nodes")) == ["a"]
    came = build(compose("train", ["optimizer=came"]).config.optimizer, "optimizer")
    assert type(came.keywords["betas"]) is list, "constructors get plain lists"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "sana.flow.timestep.LogitNormal", "std": -1.0}, "timestep: std of a logit-normal"),
        ({"_target_": "sana.encoder.autoencoder.dc_ae.load", "path": "/none.safetensors"}, "timestep: .*none.safetens"),
    ],
)
def test_what_a_constructor_refuses_is_one_line(node: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(OmegaConf.create(node), "timestep")
    assert "\n" not in str(raised.value)


def test_combinations_of_a_grid() -> None:
    jobs = combinations(["seed=1,2", "optimizer=came,tiny", "trainer.max_steps=20"])
    assert len(jobs) == 4
    assert ["seed=2", "optimizer=came", "trainer.max_steps=20"] in jobs
    with pytest.raises(ConfigError, match="not an interval"):
        combinations(["optimizer.lr=interval(0,1)"])


def test_dry_run_and_cfg_do_not_reach_the_task(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from sana.run import plan

    def never(composed: Composed) -> None:
        raise AssertionError("the task ran")

    monkeypatch.setattr(plan, "print_plan", lambda composed: print("a plan"))
    assert launch("train", never, ["dry_run=true", "data=shards", "data.folder=/none"]) == 0
    assert "a plan" in capsys.readouterr().out
    assert launch("train", never, ["--cfg"]) == 0
    assert "sana.network.sana.Sana" in capsys.readouterr().out


def test_the_batch_rule_is_shown_with_its_numbers() -> None:
    """Published: 1e-4 at a batch of 256; at 64 a half of it by the square root, a quarter in proportion."""
    for rule, rate in (("sqrt", "5e-05"), ("linear", "2.5e-05"), ("null", "0.0001")):
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        composed = prepare("train", ["optimizer=came", "data.batch_size=64", f"optimizer.lr.rule={rule}"])
        print_tree(composed, console)
        rule = "None" if rule == "null" else rule
        assert f"{rate}: 0.0001 at batch 256, rule {rule} at batch 64" in console.export_text()
        optimizer = build(composed.config.optimizer, "optimizer")
        assert optimizer.keywords["lr"] == pytest.approx(float(rate))
