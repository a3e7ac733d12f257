"""What a run leaves behind, however it ends."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from sana.run.error import ConfigError
from sana.run.records import MetricsLog, RunRecord, create_directory, is_first_rank, read_metrics
from sana.run.runs import find_checkpoint, load_run, load_runs, newest_checkpoint, read_overrides

ROOT = Path(__file__).resolve().parents[2]
CREATE = """
import sys
from sana.run.records import create_directory
print(create_directory(sys.argv[1], "same"))
"""


def test_runs_of_one_second_get_directories_of_their_own(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", CREATE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    from_processes = {process.communicate()[0].strip() for process in started}
    here = {str(create_directory(tmp_path, "same")) for _ in range(20)}
    assert len(from_processes | here) == 24
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+", Path(p).name) for p in from_processes | here)


def test_an_explicit_directory_is_claimed_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert create_directory("unused", "unused", path) == path
    with pytest.raises(ConfigError, match=r"in use \(not empty\)"):
        create_directory("unused", "unused", path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run.dir: cannot make"):
        create_directory("unused", "unused", tmp_path / "file" / "c")
    with pytest.raises(ConfigError, match=r"run.folder"):
        create_directory(tmp_path / "file", "name")


@pytest.mark.parametrize(
    ("variables", "first"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1", "LOCAL_RANK": "0"}, False), ({"LOCAL_RANK": "1"}, False),
     ({"LOCAL_RANK": "0", "SLURM_PROCID": "3"}, True), ({"SLURM_PROCID": "3"}, False)],
)  # fmt: skip
def test_the_first_rank(variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() is first


def test_records_of_a_start(tmp_path: Path) -> None:
    overrides = ["seed=1", 'prompt="a: b"', "list=[1,2]", "été={a: 1}"]
    record = RunRecord(tmp_path, writes=True).start("seed: 1\n", overrides)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == {"seed": 1}
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text(encoding="utf-8")) == overrides
    assert read_overrides(tmp_path) == overrides
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["pid"]) == ("running", os.getpid())
    environment = json.loads((tmp_path / "environment.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert environment["git"]["commit"] == commit.stdout.strip()
        assert (tmp_path / "diff.patch").exists() == environment["git"]["dirty"]
    import torch

    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["hardware"]["cores"] >= 1
    record.describe(data={"fingerprint": "abc"})
    assert json.loads((tmp_path / "environment.json").read_text())["data"] == {"fingerprint": "abc"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "no temporary file is left"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunRecord(tmp_path, writes=False).start("seed: 1\n", []) as record:
        record.update(step=1)
        record.describe(data=1)
    assert list(tmp_path.iterdir()) == []


def run_to(tmp_path: Path, error: BaseException | None) -> dict:
    with nullcontext() if error is None else pytest.raises(type(error)), RunRecord(tmp_path, writes=True).start("", []):
        if error is not None:
            raise error
    return json.loads((tmp_path / "status.json").read_text())


def test_ends(tmp_path: Path) -> None:
    for name, error, status, reason in (
        ("a", None, "finished", None),
        ("b", ValueError("first line\nsecond"), "failed", "ValueError: first line"),
        ("c", KeyboardInterrupt(), "interrupted", "ctrl-C"),
        ("d", RuntimeError(), "failed", "RuntimeError"),
        ("e", SystemExit(1), "failed", "SystemExit: 1"),
    ):
        (tmp_path / name).mkdir()
        found = run_to(tmp_path / name, error)
        assert (found["status"], found["reason"]) == (status, reason)
        assert found["seconds"] >= 0
        assert 0.01 < found["peak_rss_gib"] < 100
    assert "Traceback" in json.loads((tmp_path / "b" / "status.json").read_text())["details"]


def test_lightning_turns_ctrl_c_into_an_exit_and_it_is_still_an_interrupt(tmp_path: Path) -> None:
    def fit() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit), RunRecord(tmp_path, writes=True).start("", []):
        fit()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "interrupted"


def test_an_end_that_was_written_is_kept(tmp_path: Path) -> None:
    with RunRecord(tmp_path, writes=True).start("", []) as record:
        record.end("preempted", "SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"


KILLED = """
import sys, time
from sana.run.records import MetricsLog, RunRecord
record = RunRecord(sys.argv[1], writes=True).start("seed: 1\\n", ["seed=1"])
log = MetricsLog(sys.argv[1] + "/metrics.jsonl")
for step in range(1, 4):
    log.write(step, {"train/loss": 1 / step})
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_run_has_its_config_and_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x" / "1"
    path.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert load_run(path)["status"] == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    row = load_run(path)
    assert row["status"] == "killed"
    assert (row["step"], row["overrides"]) == (3, ["seed=1"])
    assert row["metrics"]["train/loss"] == pytest.approx(1 / 3)
    assert (row["lowest"]["train/loss"], row["highest"]["train/loss"]) == (pytest.approx(1 / 3), 1.0)
    assert (path / "config.yaml").read_text() == "seed: 1\n"


def test_metrics_survive_a_torn_line_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"loss": float("nan"), "norm": math.inf, "low": -math.inf, "name": "x"})
    log.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(path)
    log.write(3, {"loss": 0.25})
    log.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 3]
    assert math.isnan(rows[0]["loss"])
    assert (rows[0]["norm"], rows[0]["low"], rows[0]["name"]) == (math.inf, -math.inf, "x")
    assert rows[1]["loss"] == 0.25
    assert abs(rows[1]["time"] - time.time()) < 60
    for line in path.read_text().splitlines()[::2]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_metrics_take_tensors(tmp_path: Path) -> None:
    import torch

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": torch.tensor(0.5), "per_bin": torch.tensor([1.0, 2.0])})
    assert read_metrics(log.path)[0]["per_bin"] == [1.0, 2.0]
    assert read_metrics(log.path)[0]["loss"] == 0.5


def test_all_runs_in_one_call(tmp_path: Path) -> None:
    for name, error in (("tiny/1", None), ("tiny/2", ValueError("no")), ("tiny/sweep/0", None), ("tiny/sweep/1", None)):
        (tmp_path / name).mkdir(parents=True)
        run_to(tmp_path / name, error)
    (tmp_path / "tiny" / "broken").mkdir()
    (tmp_path / "tiny" / "broken" / "status.json").write_text("{")
    (tmp_path / "tiny" / "1" / "checkpoints").mkdir()
    for step in (2, 10):
        (tmp_path / "tiny" / "1" / "checkpoints" / f"step_{step:08d}.ckpt").write_text("")
        os.utime(tmp_path / "tiny" / "1" / "checkpoints" / f"step_{step:08d}.ckpt", (step, step))
    rows = {Path(row["path"]).relative_to(tmp_path).as_posix(): row for row in load_runs(tmp_path)}
    assert set(rows) == {"tiny/1", "tiny/2", "tiny/sweep/0", "tiny/sweep/1", "tiny/broken"}
    assert rows["tiny/2"]["reason"] == "ValueError: no"
    assert rows["tiny/broken"]["status"] == "unknown"
    assert Path(rows["tiny/1"]["checkpoint"]).name == "step_00000010.ckpt"
    with pytest.raises(ConfigError, match="no such folder"):
        load_runs(tmp_path / "nothing")


def test_checkpoints_by_run_or_by_path(tmp_path: Path) -> None:
    run_to(tmp_path, None)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000003.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("")
    assert newest_checkpoint(tmp_path) == checkpoint
    assert find_checkpoint(tmp_path) == (checkpoint, tmp_path)
    assert find_checkpoint(checkpoint) == (checkpoint, tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        find_checkpoint(tmp_path / "other")
    (tmp_path.parent / "stray.ckpt").write_text("")
    with pytest.raises(ConfigError, match="outside a run"):
        find_checkpoint(tmp_path.parent / "stray.ckpt")


def test_the_table_of_runs(tmp_path: Path) -> None:
    (tmp_path / "tiny" / "1").mkdir(parents=True)
    run_to(tmp_path / "tiny" / "1", ValueError("[bold]no[/bold]"))
    call = [sys.executable, "-m", "sana.run", "list"]
    done = subprocess.run([*call, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stdout
    missing = subprocess.run([*call, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "no such folder" in missing.stderr
