"""All runs as one table: `load_runs` gives a pandas DataFrame, `load_metrics` the curves of one run.

    from sana.run import load_metrics, load_runs, over_seeds
    runs = load_runs("runs")
    runs.sort_values("val/loss:min")[["run", "optimizer.lr", "seed", "val/loss", "val/loss:min"]]
    over_seeds(runs, ["val/loss"])

Nothing here needs a server, and nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from sana.run import runs as records
from sana.run.columns import FACTS, facts_of, numbers_of, settings_of
from sana.run.summary import arrow_table, is_number, rows_of

COLUMNS = "overrides"
"""Key of DataFrame.attrs under which the columns that hold settings are listed."""


def load_runs(folder: str | Path = "runs") -> pandas.DataFrame:
    """Every run below a folder, one row each by start: running, failed and half-written ones too.

    Returns:
        Columns:

        * `run` (path below the folder), `status` (running, finished, failed, killed, interrupted, preempted; unknown
          where the run did not come to write it), `reason`, `started` (UTC), `seconds` of wall time, `step` (updates),
          `commit`, `dirty`, `peak_rss_gib`, `peak_gpu_gib`, `gpus`, `checkpoint` (the newest), `checkpoints` (paths by
          step), `path`;
        * a column per setting that any command line gave, such as `seed` or `optimizer.lr`; missing (NaN) in runs that
          left it at what conf/ says. ``attrs["overrides"]`` names them;
        * per number of metrics.jsonl its last value (`val/loss`) and its extremes (`val/loss:min`, `val/loss:max`);
        * per number of results.json `eval/<name>`.

    Raises:
        ConfigError: there is no such folder.
    """
    rows = records.load_runs(folder)
    settings = [settings_of(row) for row in rows]
    names = list(dict.fromkeys(name for run in settings for name in run))
    table = [facts_of(row, folder) | numbers_of(row) | run for row, run in zip(rows, settings, strict=True)]
    numbers = sorted({name for row in table for name in row} - set(FACTS) - set(names))
    frame = pandas.DataFrame(table, columns=[*FACTS, *(name for name in names if name not in FACTS), *numbers])
    for name in ("seconds", "step", "peak_rss_gib", "peak_gpu_gib"):
        frame[name] = pandas.to_numeric(frame[name], errors="coerce")
    frame["started"] = pandas.to_datetime(frame["started"], utc=True, errors="coerce", format="ISO8601")
    frame.attrs[COLUMNS] = [name for name in names if name not in FACTS]
    return frame


def load_metrics(run: str | Path) -> pandas.DataFrame:
    """The curves of a run: one row per step (index `step`), a column per number, and `time` in seconds since 1970.

    Numbers that were written at the same step stand in one row; where a step was written twice, because a run was
    resumed, the later value counts. NaN where a number was not written at a step, or was NaN itself.

    Args:
        run: its directory, or its metrics.jsonl.

    Raises:
        FileNotFoundError: no metrics.jsonl there.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() or path.suffix != ".jsonl" else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a run")
    data = path.read_bytes()
    table = arrow_table(data)
    if table is not None:
        frame = table.to_pandas()
    else:
        rows = ({k: v for k, v in row.items() if is_number(v)} for row in rows_of(data))
        frame = pandas.DataFrame(row for row in rows if "step" in row)
    if "step" not in frame:
        return pandas.DataFrame(index=pandas.Index([], dtype="int64", name="step"))
    frame = frame.dropna(subset="step").astype({"step": "int64"})
    if frame["step"].is_unique and frame["step"].is_monotonic_increasing:
        return frame.set_index("step")
    return frame.groupby("step", sort=True).last()


def load_curves(runs: pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """One number of several runs over the steps: index `step`, a column per run (named as in `run`). Runs that never
    wrote it are left out.

    Args:
        runs: rows of `load_runs`.
        metric: such as "val/loss".
    """
    found = {}
    for name, path in zip(runs["run"], runs["path"], strict=True):
        try:
            curve = load_metrics(path)
        except FileNotFoundError:
            continue
        if metric in curve:
            found[name] = curve[metric].dropna()
    return pandas.DataFrame(found).rename_axis("step")


def over_seeds(
    runs: pandas.DataFrame,
    metrics: Sequence[str],
    by: Sequence[str] | None = None,
    seed: str = "seed",
    status: Sequence[str] = ("finished",),
) -> pandas.DataFrame:
    """Mean, standard deviation (n - 1; NaN for one run) and number of runs that differ by their seed alone.

    Args:
        runs: from `load_runs`.
        metrics: columns to average; a run counts for those it has.
        by: settings that make runs one group; None: all that differ, but the seed and where the run lies.
        seed: the setting to average over.
        status: runs that count; a failed one's last numbers are not those of a result.

    Returns:
        A row per group, index `by`; columns (metric, "mean" | "std" | "n").

    Raises:
        ValueError: a metric or setting that no run has; or no `by`, and rows that did not come from `load_runs`.
    """
    if by is None:
        if COLUMNS not in runs.attrs:
            raise ValueError("over_seeds: by=[...] is needed, as these rows do not say which columns are settings")
        by = [name for name in runs.attrs[COLUMNS] if name != seed and not name.startswith("run.")]
        by = [name for name in by if name in runs and len(set(map(str, runs[name].dropna()))) > 1]
    for name in [*metrics, *by]:
        if name not in runs:
            raise ValueError(f"over_seeds: no run has {name!r}")
    counted = runs[runs["status"].isin(status)]
    keys = [counted[name] for name in by] or [pandas.Series("all", counted.index, name="runs")]
    numbers = pandas.DataFrame(counted, columns=list(metrics))
    table: Any = numbers.groupby(keys, dropna=False, sort=True).agg(["mean", "std", "count"])
    return table.rename(columns={"count": "n"}, level=1)
