"""Runs as a table: against plain loops over the rows, and on runs in every state."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import sana.run.summary as summary_module
from sana.run import load_curves, load_metrics, load_runs, over_seeds
from sana.run.__main__ import main
from sana.run.columns import split_override
from sana.run.records import MetricsLog, RunRecord, read_metrics
from sana.run.summary import KEPT_FROM, NAME, Summary, summarise

ROOT = Path(__file__).resolve().parents[2]


def text_of(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def many_rows(seed: int, count: int = 1500) -> list[dict]:
    """Rows as training writes them: some numbers at every step, some now and then, some constant."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "time": 1.7e9 + step, "train/loss": float(rng.normal()), "train/lr": 1e-3 * step}
        rows.append(row | ({"val/loss": float(rng.normal())} if step % 7 == 0 else {}) | {"data/bad": 0})
    return rows


def plain(path: Path) -> Summary:
    """The summary as a loop over the rows has it."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    keys = {key for row in rows for key in row} - {"step", "time"}
    values = {key: [float(row[key]) for row in rows if key in row] for key in keys}
    numbers = {key: [v for v in found if not math.isnan(v)] for key, found in values.items()}
    return Summary(
        len(rows), rows[-1]["step"], rows[0]["time"], rows[-1]["time"],
        {key: found[-1] for key, found in values.items()},
        {key: min(found) for key, found in numbers.items() if found},
        {key: max(found) for key, found in numbers.items() if found},
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_summary_of_a_long_file_that_grows(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / "metrics.jsonl", many_rows(seed)
    path.write_text(text_of(rows[:1100]))
    assert path.stat().st_size > KEPT_FROM
    assert summarise(path) == plain(path)
    assert (tmp_path / NAME).is_file()

    read = []
    real = summary_module.summarise_bytes
    monkeypatch.setattr(summary_module, "summarise_bytes", lambda data: read.append(len(data)) or real(data))
    assert summarise(path) == plain(path)
    assert read == [], "an unchanged file is not read again"
    with open(path, "a") as file:
        file.write(text_of(rows[1100:]) + '{"step": 1501, "train/lo')  # a row that is being written
    assert summarise(path) == plain(path)
    assert read == [len(text_of(rows[1100:]))], "only what is new is read"
    with open(path, "a") as file:
        file.write('ss": -99.0, "time": 1.0}\n')
    assert summarise(path).lowest["train/loss"] == -99.0

    path.write_text(text_of(many_rows(seed + 10)))  # another run's rows, longer than before or not
    assert summarise(path) == plain(path)
    path.write_text(text_of(rows[:900]))  # cut back to a checkpoint
    assert summarise(path) == plain(path)


@pytest.mark.parametrize("count", [5, 1500])
def test_numbers_that_json_lacks_and_torn_rows(tmp_path: Path, count: int) -> None:
    path, rows = tmp_path / "metrics.jsonl", many_rows(3, count)
    rows[-1]["train/loss"] = "nan"
    rows[0]["train/lr"] = "inf"
    lines = text_of(rows).splitlines()
    path.write_text("\n".join([*lines[:2], '{"step": 2, "tr', *lines[2:], '{"st']))
    found = summarise(path)
    assert found.rows == count
    assert math.isnan(found.last["train/loss"])
    finite = [row["train/loss"] for row in rows[:-1]]
    assert (found.lowest["train/loss"], found.highest["train/loss"]) == (min(finite), max(finite))
    assert found.highest["train/lr"] == math.inf
    frame = load_metrics(tmp_path)
    assert frame["train/loss"].tolist()[:-1] == finite
    assert math.isnan(frame["train/loss"].iloc[-1])


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(many_rows(0)))

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert summarise(path) == plain(path)
    assert not (tmp_path / NAME).exists()


def test_curves_of_a_run(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, values in (
        (1, {"a": 3.0}),
        (2, {"a": 2.0}),
        (2, {"b": 7.0}),
        (3, {"a": 9.0}),
        (2, {"a": 2.5}),
        (3, {"a": 1.0}),
    ):
        log.write(step, values)  # the last two: resumed from step 1
    log.close()
    frame = load_metrics(tmp_path)
    assert frame.index.tolist() == [1, 2, 3]
    assert frame["a"].tolist() == [3.0, 2.5, 1.0]
    assert frame["b"].dropna().to_dict() == {2: 7.0}

    path, rows = tmp_path / "long" / "metrics.jsonl", many_rows(4)
    path.parent.mkdir()
    path.write_text(text_of(rows))
    frame = load_metrics(path.parent)
    for key in ("train/loss", "val/loss"):
        assert frame[key].dropna().to_dict() == {row["step"]: row[key] for row in read_metrics(path) if key in row}
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_metrics(tmp_path / "nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds at two rates; a run that failed; one half-written; one that left an empty file."""
    folder = tmp_path_factory.mktemp("runs")
    for lr in ("1e-3", "0.01"):
        for seed in range(3):
            path = folder / "grid" / f"{lr}_{seed}"
            path.mkdir(parents=True)
            with RunRecord(path, writes=True).start(
                f"seed: {seed}\noptimizer:\n  lr: {lr}\n", [f"seed={seed}", f"optimizer.lr={lr}", f"run.dir={path}"]
            ):
                log = MetricsLog(path / "metrics.jsonl")
                for step in (1, 2, 3):
                    log.write(
                        step, {"val/loss": float(lr) * (1 + seed) + abs(step - 2), "memory/peak_gpu_gib": step / 2}
                    )
    (path / "checkpoints" / "step_00000010.ckpt").mkdir(parents=True)  # a folder, as sharded runs have
    (path / "checkpoints" / "step_00000011.ckpt.tmp").mkdir()
    (path / "checkpoints" / "step_00000009.ckpt").write_text("x")
    (path / "results.json").write_text(json.dumps({"overall": 0.5, "tasks": {"counting": 0.25}, "seconds": 3.0}))
    failed = folder / "failed"
    failed.mkdir()
    with pytest.raises(ValueError), RunRecord(failed, writes=True).start("seed: 9\n", ["seed=9", "~callback.samples"]):
        raise ValueError("no luck")
    half = folder / "half"
    half.mkdir()
    (half / "status.json").write_text('{"status": "running", "host": "elsewhere"}')
    (half / "overrides.yaml").write_text('- "seed=4"\n- "opti')
    (half / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "val/loss": 8.0}\n{"step": 2, "val/l')
    (folder / "empty").mkdir()
    (folder / "empty" / "status.json").touch()
    return folder


def test_all_runs_as_a_table(folder: Path) -> None:
    frame = load_runs(folder).set_index("run")
    assert len(frame) == 9
    assert frame["status"].value_counts().to_dict() == {"finished": 6, "failed": 1, "running": 1, "unknown": 1}
    assert frame.loc["failed", "reason"] == "ValueError: no luck"
    assert frame.loc["failed", "callback.samples"] == "removed"
    one = frame.loc["grid/0.01_2"]
    assert (one["seed"], one["optimizer.lr"], one["step"]) == (2, 0.01, 3)
    assert one["val/loss"] == pytest.approx(1.03)
    assert (one["val/loss:min"], one["val/loss:max"]) == (pytest.approx(0.03), pytest.approx(1.03))
    assert (one["eval/overall"], one["eval/counting"], one["peak_gpu_gib"]) == (0.5, 0.25, 1.5)
    assert "eval/seconds" not in frame
    assert [Path(path).name for path in one["checkpoints"]] == ["step_00000009.ckpt", "step_00000010.ckpt"]
    assert one["seconds"] >= 0
    assert 0.01 < one["peak_rss_gib"] < 100
    assert frame.loc["half", "val/loss"] == 8.0
    assert np.isnan(frame.loc["empty", "step"])
    assert frame["started"].notna().sum() == 7


def test_means_over_seeds(folder: Path) -> None:
    runs = load_runs(folder)
    table = over_seeds(runs, ["val/loss"])
    for lr in (1e-3, 1e-2):
        values = np.array([lr * (1 + seed) + 1 for seed in range(3)])
        row = table.loc[lr, "val/loss"]
        assert row["mean"] == pytest.approx(values.mean())
        assert row["std"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / 2))
        assert row["n"] == 3
    assert len(table) == 2, "failed and unfinished runs do not count"
    everything = over_seeds(runs, ["val/loss"], by=[], status=("finished", "running"))
    assert everything["val/loss", "n"].tolist() == [7]
    with pytest.raises(ValueError, match="no run has 'loss'"):
        over_seeds(runs, ["loss"])
    curves = load_curves(runs[runs["optimizer.lr"] == 0.01], "val/loss")
    assert curves.shape == (3, 3)
    assert curves["grid/0.01_1"].tolist() == pytest.approx([1.02, 0.02, 1.02])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("seed=1", ("seed", 1)), ("+a.b=1e-3", ("a.b", 1e-3)), ("++a=true", ("a", True)), ("a=null", ("a", None)),
     ("a='x y'", ("a", "x y")), ("optimizer=came", ("optimizer", "came")), ("l=[1,2]", ("l", "[1,2]")),
     ("~c.d", ("c.d", "removed")), ("p=a=b", ("p", "a=b")), ("encoder/text=x", ("encoder/text", "x"))],
)  # fmt: skip
def test_settings_of_a_command_line(text: str, expected: tuple) -> None:
    assert split_override(text) == expected


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(folder)]) == 0
    assert "failed: ValueError: no luck" in capsys.readouterr().out
    run = folder / "grid" / "0.01_2"
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.lr  0.01" in shown
    assert "step_00000010.ckpt" in shown
    assert main(["compare", str(run), str(folder / "grid" / "1e-3_2")]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["optimizer.lr"] == ["0.01", "1e-3"]
    assert "seed" not in lines
    assert main(["best", "val/loss", str(folder), "-n", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["grid/1e-3_0", "grid/1e-3_1"]
    assert main(["best", "eval/overall", str(folder), "--max"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["grid/0.01_2"]
    for wrong in (
        ["list", str(folder / "no")],
        ["show", str(folder)],
        ["compare", str(run)],
        ["best", "x", str(folder)],
    ):
        assert main(wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_commands_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from sana.run.__main__ import main; assert main(['list', sys.argv[1]]) == 0; "
        "print([name for name in ('torch', 'pandas', 'lightning', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
