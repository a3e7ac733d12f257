"""What a sweep runs, what it remembers, and what it does with devices and signals; runs are stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sana.run import job as job_module
from sana.run import search
from sana.run.error import ConfigError
from sana.run.job import Job, environment, read_jobs, write_job
from sana.run.launch import launch
from sana.run.launchers import Slots, share_devices
from sana.run.records import MetricsLog
from sana.run.runs import load_runs
from sana.run.watch import best_of, values_of

Fake = Callable[[Path, Job], Job]
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"entry": "train", "metric": "val/loss", "direction": "minimize", "value": "last", "needs_value": False,
            "prune": False, "cwd": "."}  # fmt: skip


def fake_run(folder: Path, job: Job, losses: list[float], status: str = "finished", code: int = 0) -> Job:
    """What a run leaves behind, without the run."""
    path = folder / str(job.number)
    path.mkdir()
    (path / "status.json").write_text(json.dumps({"status": status, "reason": None if code == 0 else "ValueError: x"}))
    log = MetricsLog(path / "metrics.jsonl")
    for step, loss in enumerate(losses, 1):
        log.write(step, {"val/loss": loss})
    log.close()
    settings = json.loads((folder / "sweep.json").read_text())
    done = job_module.judge(folder, settings, Job(**{**job.__dict__, "code": code}))
    return write_job(folder, done)


def lr_of(job: Job) -> float:
    return float(job.params["optimizer.lr"])


def sweep(monkeypatch: pytest.MonkeyPatch, fake: Fake, *line: str) -> int:
    monkeypatch.setattr(Slots, "_one", lambda self, folder, job: fake(folder, job))
    return launch("train", lambda composed: None, ["-m", *line])


def test_the_same_grid_again_runs_only_what_is_missing_or_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    broken = {"2"}

    def fake(folder: Path, job: Job) -> Job:
        started.append(job.params["seed"])
        if job.params["seed"] in broken:
            return fake_run(folder, job, [], "failed", 1)
        return fake_run(folder, job, [3.0, float(job.params["seed"])])

    line = [f"run.folder={tmp_path}", "seed=3,2,1"]
    assert sweep(monkeypatch, fake, *line) == 1
    assert started == ["3", "2", "1"], "the others run all the same"
    assert "run 1 failed (seed=2): ValueError: x (exit code 1)" in capsys.readouterr().out
    started.clear()
    broken.clear()
    assert sweep(monkeypatch, fake, *line) == 0
    assert started == ["2"]
    said = capsys.readouterr().out
    assert "1 runs in" in said
    assert "2 are done" in said
    assert "best: run 2, val/loss 1 (seed=1)" in said
    (folder,) = [path for path in (tmp_path / "tiny").iterdir() if path.is_dir()]
    assert (folder / "1_attempt1" / "status.json").is_file(), "what failed is kept"
    assert [job.status for job in read_jobs(folder)] == ["finished"] * 3
    assert sweep(monkeypatch, fake, *line) == 0
    assert started == ["2"], "nothing is left to do"
    assert sweep(monkeypatch, fake, *line, "sweep.fresh=true") == 0
    assert started == ["2", "3", "2", "1"]
    # Other settings are another sweep, also under the same name.
    assert sweep(monkeypatch, fake, *line, "model.clip_norm=0.5") == 0
    assert len([path for path in (tmp_path / "tiny").iterdir() if path.is_dir()]) == 3


def test_a_directory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fake(folder: Path, job: Job) -> Job:
        seen.append(job.number)
        assert folder == tmp_path / "mine"
        assert not [o for o in job.overrides if o.startswith("run.dir")], "each run gets its own"
        return fake_run(folder, job, [1.0])

    for _ in range(2):
        assert sweep(monkeypatch, fake, f"run.dir={tmp_path / 'mine'}", "seed=1,2") == 0
    assert seen == [0, 1]
    assert sweep(monkeypatch, fake, f"run.dir={tmp_path / 'mine'}", "seed=1,2,3") == 2


def test_optuna_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is (log10 lr + 2)^2: best at 1e-2, half way in a space of its logarithm."""
    import math

    rates: list[float] = []

    def fake(folder: Path, job: Job) -> Job:
        rates.append(lr_of(job))
        assert 1e-4 <= rates[-1] <= 1
        assert int(job.params["network.depth"]) in (1, 3, 5)
        assert job.params["optimizer"] in ("adamw", "came")
        worse = 0.5 * (job.params["optimizer"] == "came") + 0.1 * int(job.params["network.depth"])
        return fake_run(folder, job, [(math.log10(rates[-1]) + 2) ** 2 + worse])

    space = ["optimizer.lr=tag(log,interval(1e-4,1.0))", "network.depth=range(1,6,2)", "optimizer=adamw,came"]
    line = [f"run.dir={tmp_path / 's'}", "sweep=optuna", "sweep.trials=24", "sweep.startup=8", "sweep.prune=false"]
    line += space
    assert sweep(monkeypatch, fake, *line) == 0
    assert len(rates) == 24
    best = min((job for job in read_jobs(tmp_path / "s")), key=lambda job: job.value or math.inf)
    assert abs(math.log10(lr_of(best)) + 2) < 0.5
    assert best.params["optimizer"] == "adamw"
    # Random search spreads evenly over 4 decades; the estimator looks where it was good.
    late = [abs(math.log10(rate) + 2) for rate in rates[14:24]]
    assert sum(late) / len(late) < 0.75 * 1.0
    assert sweep(monkeypatch, fake, *[text.replace("trials=24", "trials=26") for text in line]) == 0
    assert len(rates) == 26, "more trials go on with the study"


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_killed_search_goes_on_where_it_was(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []

    def dies_at_the_third(folder: Path, job: Job) -> Job:
        calls.append((job.number, lr_of(job)))
        if len(calls) == 3:
            write_job(folder, Job(**{**job.__dict__, "status": "running", "pid": 2**22 + 1, "host": "elsewhere"}))
            raise SystemExit(9)
        return fake_run(folder, job, [1.0])

    def works(folder: Path, job: Job) -> Job:
        calls.append((job.number, lr_of(job)))
        return fake_run(folder, job, [2.0])

    line = [f"run.dir={tmp_path / 's'}", "sweep=optuna", "sweep.trials=5", f"sweep.storage={storage}",
            "optimizer.lr=interval(0.1,0.2)"]  # fmt: skip
    with pytest.raises(SystemExit):
        sweep(monkeypatch, dies_at_the_third, *line)
    assert sweep(monkeypatch, works, *line) == 0
    numbers = [number for number, _ in calls]
    assert numbers == [0, 1, 2, 3, 4, 5], "no trial runs twice"
    assert calls[3][1] == calls[2][1], "the one that was killed is tried again with its settings"
    assert len({rate for _, rate in calls}) == 5
    statuses = [job.status for job in read_jobs(tmp_path / "s")]
    assert statuses == ["finished", "finished", "killed", "finished", "finished", "finished"]
    study = search.open_study(tmp_path / "s", search.Optuna(storage=storage).record())  # type: ignore[arg-type]
    assert [trial.state.name for trial in study.trials].count("COMPLETE") == 5


def test_a_run_without_the_number_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"run.dir={tmp_path / 's'}", "sweep=optuna", "sweep.trials=2", "optimizer.lr=interval(0.1,0.2)"]
    assert sweep(monkeypatch, lambda folder, job: fake_run(folder, job, [float("nan")]), *line) == 1
    assert "has no finite val/loss; it has val/loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["sweep=optuna", "seed=1"], "no setting has several values"),
        (["sweep=optuna", "optimizer.lr=tag(log,interval(0,1))"], "optimizer.lr=tag(log,interval(0,1)): "),
        (["sweep=optuna", "sweep.trails=3", "seed=1,2"], "sweep.trails: unknown key; did you mean sweep.trials?"),
        (["sweep=optuna", "sweep.metric=null", "seed=1,2"], "sweep.metric"),
        (["sweep=optuna", "optimzer.lr=interval(1,2)"], "optimzer.lr"),
        (["sweep=optuna", "optimizer=came,nope"], "optimizer=nope"),
        (["sweep.parallel=0", "seed=1,2"], "at least one run at a time"),
        (["sweep=bayes", "seed=1,2"], "sweep=bayes: no such option"),
        (["seed=interval(1,2)"], "or sweep=optuna"),
        (["hydra/launcher=slurm", "seed=1,2"], "no such launcher (basic, ray, submitit_local, submitit_slurm)"),
        (["hydra/sweeper=basic", "seed=1,2"], "only the launcher"),
        (["hydra.launcher._target_=os.system", "seed=1,2"], "os.system is not one of"),
    ],
)
def test_a_mistake_starts_nothing(
    line: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slots, "_one", lambda *_: pytest.fail("started"))
    assert launch("train", lambda composed: None, ["-m", f"run.folder={tmp_path}", *line]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "\n" not in said.strip()
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_sweep_need_m(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("train", lambda composed: None, ["sweep=optuna"]) == 2
    assert "need -m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "parallel", "devices", "expected"),
    [
        ("0,1,2,3", 2, None, ["0,1", "2,3"]),
        ("4,5,7", 3, 1, ["4", "5", "7"]),
        ("GPU-a,GPU-b", 2, 1, ["GPU-a", "GPU-b"]),
        ("0,1", 1, None, [None]),
        ("0,1", 1, 1, ["0"]),
        ("", 2, None, [None, None]),
    ],
)
def test_devices_are_shared(
    visible: str, parallel: int, devices: int | None, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert share_devices(parallel, devices) == expected


@pytest.mark.parametrize(("visible", "parallel", "devices"), [("0", 2, None), ("0,1,2", 2, 2)])
def test_too_few_devices(visible: str, parallel: int, devices: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match="need more than the"):
        share_devices(parallel, devices)


def test_runs_in_parallel_have_devices_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    now, most = [], []

    def fake(folder: Path, job: Job) -> Job:
        now.append(job.devices)
        most.append(sorted(map(str, now)))
        time.sleep(0.3)
        now.remove(job.devices)
        return fake_run(folder, job, [1.0])

    assert sweep(monkeypatch, fake, f"run.folder={tmp_path}", "seed=1,2,3,4", "sweep.parallel=2") == 0
    assert max(most, key=len) == ["2", "3"]
    assert all(len(set(held)) == len(held) for held in most), "no device is held twice"


def test_a_run_sees_neither_ranks_nor_tasks_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SANA_RUN_DIR", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    found = environment(Job(0, [], devices="5"))
    assert not [name for name in found if name.startswith("SLURM") or name in job_module.RANKS]
    assert found["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert environment(Job(0, []))["SLURM_PROCID"] == "1", "of several tasks the launcher's ranks are the run's"


def test_a_sweep_is_driven_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    line = [f"run.dir={tmp_path / 's'}", "seed=1"]

    def fake(folder: Path, job: Job) -> Job:
        if not codes:
            done = subprocess.run([sys.executable, "train.py", "-m", *line], cwd=ROOT, capture_output=True, text=True)
            codes.append(done.returncode)
            assert "is being run already" in done.stderr
        return fake_run(folder, job, [1.0])

    assert sweep(monkeypatch, fake, *line) == 0
    assert codes == [2]


def test_runs_that_never_began_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(folder: Path, job: Job) -> Job:
        if job.params["seed"] == "1":
            return fake_run(folder, job, [1.0])
        return write_job(folder, Job(**{**job.__dict__, "status": "failed", "reason": "no disk", "code": 1}))

    sweep(monkeypatch, fake, f"run.folder={tmp_path}", "seed=1,2")
    rows = {Path(row["path"]).name: row for row in load_runs(tmp_path)}
    assert set(rows) == {"0", "1"}
    assert (rows["1"]["status"], rows["1"]["reason"], rows["1"]["overrides"][-1]) == ("failed", "no disk", "seed=2")


def test_numbers_of_a_run() -> None:
    nan = float("nan")
    rows = [
        {"step": 1, "a": 3.0},
        {"step": 2, "b": 1.0},
        {"step": 2, "a": 1.0},
        {"step": 3, "a": 2},
        {"step": 4, "a": nan},
    ]
    points = values_of(rows, "a")
    assert points[:3] == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert best_of(points, "minimize", "best") == 1.0
    assert best_of(points, "maximize", "best") == 3.0
    assert best_of(points, "minimize", "last") is None, "the last number is not finite"
    assert best_of(points[:3], "minimize", "last") == 2.0
    assert best_of([], "minimize", "best") is None


def test_slurm_and_ray_compose() -> None:
    from sana.run.launchers import Batches, find_launcher

    line = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2"]
    found = find_launcher("train", line, 4, None)
    assert isinstance(found, Batches)
    slurm = found.config.hydra.launcher
    assert (slurm.partition, slurm.gpus_per_node, slurm.tasks_per_node) == ("gpu", 2, 1)
    ray = find_launcher("train", ["hydra/launcher=ray", "hydra.launcher.gpus=1.0"], 4, None)
    assert isinstance(ray, Batches)
    assert ray.config.hydra.launcher.gpus == 1.0
    with pytest.raises(ConfigError, match="partitoin"):
        find_launcher("train", ["hydra/launcher=submitit_slurm", "hydra.launcher.partitoin=gpu"], 4, None)


def test_configurations_of_launchers_say_what_they_are() -> None:
    text = (ROOT / "conf" / "hydra" / "launcher" / "ray.yaml").read_text()
    assert yaml.safe_load(text)["_target_"] == "sana.run.ray_launcher.RayLauncher"


@pytest.mark.parametrize(
    "launcher",
    ["submitit_local", pytest.param("ray", marks=pytest.mark.slow)],
)
def test_launchers_of_hydra_run_jobs(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's launcher differs from the local one in the executor; a cluster of either kind is not at hand."""
    from sana.run.launchers import find_launcher

    pytest.importorskip("ray" if launcher == "ray" else "submitit")
    monkeypatch.setenv("STEPS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from test_sweep_processes import CHILD

    (tmp_path / "child.py").write_text(CHILD)
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({**SETTINGS, "entry": str(tmp_path / "child"), "cwd": str(tmp_path)}))
    told: list[Job] = []
    jobs = (write_job(folder, Job(number, [f"seed={number}"])) for number in (0, 2, 5))
    find_launcher("train", [f"hydra/launcher={launcher}"], 2, None).run(folder, jobs, told.append)
    assert [(job.number, job.status, job.value) for job in told] == [
        (0, "finished", 1.0), (2, "finished", 1.0), (5, "finished", 1.0)
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["0", "2", "5"]
