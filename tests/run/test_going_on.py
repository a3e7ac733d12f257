"""`resume=auto`: which run it goes on in, what stays one over its parts, and how ranks of other launchers join."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sana.checkpoint.run_folder import Manifest, place_of, write_manifest
from sana.run.begin import DIRECTORY, begin
from sana.run.choose import GIB, choose
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.join import hear, tell
from sana.run.lineage import continued_run
from sana.run.plan import Plan
from sana.run.records import MetricsLog, is_locked, lock_directory, read_metrics
from sana.run.saved import prepare
from sana.run.stop import Stopped

LAUNCHERS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", DIRECTORY)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def start(folder: Path, *overrides: str, step: int | None = None, end: str | None = None) -> Path:
    """A run that was killed, or ended, after a checkpoint."""
    config, record, _ = begin(prepare("train", [f"run.folder={folder}", *overrides]))
    path = Path(config.run.dir)
    if step is not None:
        place = place_of(path / "checkpoints", step)
        place.mkdir(parents=True)
        write_manifest(place, Manifest(step, {}))
    if end is not None:
        record.end(end)  # type: ignore[arg-type]
    assert record.lock is not None
    record.lock.close()
    return path


def found(folder: Path, *overrides: str) -> Path | None:
    return continued_run(compose("train", [f"run.folder={folder}", *overrides, "resume=auto"]))


def test_the_run_with_these_settings_and_the_most_updates(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    start(tmp_path, step=90, end="finished")
    assert found(tmp_path) is None
    start(tmp_path, "seed=2", step=80)
    start(tmp_path)  # killed before its first checkpoint
    older = start(tmp_path, step=30)
    start(tmp_path, "trainer.max_steps=10", step=20, end="preempted")  # how long does not matter
    assert found(tmp_path) == older
    assert found(tmp_path, "trainer.max_steps=77", "strategy=ddp", "trainer.devices=2") == older
    assert found(tmp_path, "optimizer.lr=1e-3") is None
    code = (
        "import sys, time; from pathlib import Path; from sana.run.records import lock_directory\n"
        f"file = lock_directory(Path({str(older)!r})); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert is_locked(older)
        with pytest.raises(ConfigError, match="a run is under way in"):
            lock_directory(older)
        assert found(tmp_path) != older  # it is under way
        with pytest.raises(ConfigError, match="a run is under way in"):
            begin(prepare("train", [f"run.dir={older}", "resume=auto"]))
        other.kill()
    assert found(tmp_path) == older


def test_going_on_keeps_directory_id_and_start(tmp_path: Path) -> None:
    place = f"run.dir={tmp_path / 'mine'}"
    first = start(tmp_path, place, "resume=auto", "logger=wandb", step=4)
    before = json.loads((first / "status.json").read_text())
    config, record, resume = begin(prepare("train", [place, "resume=auto", "logger=wandb"]))
    assert resume == Path(config.run.dir) == first
    after = json.loads((first / "status.json").read_text())
    assert (after["id"], after["started"]) == (before["id"], before["started"])
    assert (before["resumed"], len(after["resumed"])) == ([], 1)
    assert (config.logger.wandb.id, config.logger.wandb.resume) == (before["id"], "allow")
    with pytest.raises(Stopped), record:
        raise Stopped("SIGTERM")
    assert json.loads((first / "status.json").read_text())["status"] == "preempted"
    with pytest.raises(ConfigError, match="in use"):
        prepare("train", [place])  # without resume=auto nothing is touched
    with pytest.raises(ConfigError, match="give one of the two"):
        prepare("train", [f"run.dir={tmp_path / 'new'}", f"resume={first}", f"init={first}"])


def test_metrics_are_one_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    MetricsLog.cut(path, 5)
    log = MetricsLog(path)
    log.write(6, {"loss": 0.0})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_ranks_of_slurm_learn_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torchrun, srun or"):
        hear(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    tell(tmp_path / "run", tmp_path)
    assert hear(tmp_path) == tmp_path / "run"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a requeued job is another start
    monkeypatch.setattr("sana.run.join.PATIENCE", 0.1)
    with pytest.raises(ConfigError, match="did not write"):
        hear(tmp_path)


def plan(devices: int, kept: int, rest: int) -> Plan:
    """`kept` GiB of states, `rest` GiB of what every device has."""
    quarter = kept * GIB // 4
    return Plan({}, devices, False, quarter, quarter, quarter, quarter, 0, rest * GIB, 8, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("devices", "nodes", "kept", "rest", "chosen"),
    [(1, 1, 40, 20, "single"), (1, 1, 80, 20, "offload"), (8, 1, 40, 20, "ddp"), (8, 1, 80, 20, "fsdp"),
     (16, 2, 80, 20, "hsdp"), (16, 2, 640, 20, "fsdp"), (8, 1, 640, 20, "offload")],
)  # fmt: skip
def test_the_simplest_strategy_that_fits(devices: int, nodes: int, kept: int, rest: int, chosen: str) -> None:
    """80 GiB of which 0.8 may be used are 64: 40 + 20, 80 / 8 + 20 and 640 / 16 + 20 fit, 640 / 8 + 20 does not."""
    name, why = choose(plan(devices, kept, rest), nodes, 80 * GIB, 0.8)
    assert name == chosen
    assert "of 64.00 GiB" in why
