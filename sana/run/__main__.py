"""Command line over the records of runs; nothing heavy is imported.

python -m sana.run list [runs]                   all runs, oldest first
python -m sana.run show RUN                      one run: facts, settings, numbers, checkpoints
python -m sana.run compare RUN RUN ...           settings that differ, and the numbers side by side
python -m sana.run best METRIC [runs] [--max]    runs by the best value that they ever had
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sana.run.columns import HIGHEST, LOWEST, differences, facts_of, numbers_of, settings_of
from sana.run.error import ConfigError
from sana.run.runs import load_run, load_runs

COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red"}
PIPE = 200  # columns into a file or a pipe: whole lines, whatever the default width is


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0, or 2 for what is not there."""
    parser = argparse.ArgumentParser(prog="python -m sana.run", description="Show the records of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", help="one line per run: status, step, loss, time, overrides")
    lister.add_argument("folder", nargs="?", default="runs")
    shower = commands.add_parser("show", help="one run: facts, settings, numbers, checkpoints")
    shower.add_argument("run")
    comparer = commands.add_parser("compare", help="settings that differ between runs, and their numbers")
    comparer.add_argument("run", nargs="+")
    ranker = commands.add_parser("best", help="runs by the best value of a number")
    ranker.add_argument("metric", help="such as val/loss, or eval/overall of a results.json")
    ranker.add_argument("folder", nargs="?", default="runs")
    ranker.add_argument("--max", action="store_true", help="the greatest is the best (default: the least)")
    ranker.add_argument("-n", type=int, default=10, help="how many runs (default: 10)")
    given = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE)
    try:
        if given.command == "list":
            tables = [list_runs(given.folder)]
        elif given.command == "show":
            tables = show(given.run)
        elif given.command == "compare":
            tables = compare(given.run)
        else:
            tables = [best(given.folder, given.metric, given.max, given.n)]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for i, table in enumerate(tables):
        console.print(*([""] if i else []), table, sep="\n")
    return 0


def list_runs(folder: str) -> Table:
    """A line per run."""
    table = _table("run", "status", "step", "loss", "time", "commit")
    table.add_column("settings", overflow="fold")
    for row in load_runs(folder):
        facts = (_status(row), _text(row["step"]), _text(row["metrics"].get("train/loss")), _duration(row["seconds"]))
        table.add_row(_name(row, folder), *facts, _commit(row), _settings(row))
    return table


def show(run: str) -> list[Table]:
    """Facts, settings and numbers of a run."""
    row = _run(run)
    facts = _table("run", escape(run))
    for name, value in facts_of(row, run).items():
        if name not in ("run", "path", "checkpoint", "checkpoints", "status", "seconds") and value is not None:
            facts.add_row(name, _text(value))
    facts.add_row("status", _status(row))
    facts.add_row("time", _duration(row["seconds"]))
    for path in facts_of(row, run)["checkpoints"]:
        facts.add_row("checkpoint", escape(path))
    settings = _table("setting", "value")
    for name, value in settings_of(row).items():
        settings.add_row(escape(name), _text(value))
    numbers = _table("number", "last", "lowest", "highest")
    for name, value in row["metrics"].items():
        numbers.add_row(escape(name), *map(_text, (value, row["lowest"].get(name), row["highest"].get(name))))
    for name, value in numbers_of(row).items():
        if name.startswith("eval/"):
            numbers.add_row(escape(name), _text(value))
    return [table for table in (facts, settings, numbers) if table.row_count]


def compare(runs: Sequence[str]) -> list[Table]:
    """Settings in which runs differ, and the last numbers of those that all have."""
    if len(runs) < 2:
        raise ConfigError("compare: needs the directories of at least two runs")
    rows = [_run(run) for run in runs]
    names = [f"({i + 1})" for i in range(len(runs))]
    head = _table("", "run", "status", "step", "time")
    for name, run, row in zip(names, runs, rows, strict=True):
        head.add_row(name, escape(run), _status(row), _text(row["step"]), _duration(row["seconds"]))
    settings = _table("setting", *names)
    for key, values in differences(list(runs)).items():
        settings.add_row(escape(key), *map(_text, values))
    found = [numbers_of(row) for row in rows]
    numbers = _table("number", *names)
    for key in found[0]:
        if all(key in other for other in found) and not key.endswith((LOWEST, HIGHEST)):
            numbers.add_row(escape(key), *(_text(other[key]) for other in found))
    return [table for table in (head, settings, numbers) if table.row_count]


def best(folder: str, metric: str, greatest: bool, count: int) -> Table:
    """Runs that have a number, the best first.

    Raises:
        ConfigError: no run has it; with those that some have.
    """
    rows = [(row, numbers_of(row)) for row in load_runs(folder)]
    end = HIGHEST if greatest else LOWEST
    found = [(numbers.get(metric + end, numbers.get(metric)), row, numbers) for row, numbers in rows]
    having = [(value, row, numbers) for value, row, numbers in found if value is not None]
    ranked = sorted(having, key=lambda item: item[0], reverse=greatest)
    if not ranked:
        names = sorted({name for _, numbers in rows for name in numbers if not name.endswith((LOWEST, HIGHEST))})
        raise ConfigError(f"best: no run in {folder} has {metric!r}; there are: {', '.join(names) or 'no numbers'}")
    table = _table("run", "status", metric, "last", "step", "commit")
    table.add_column("settings", overflow="fold")
    for value, row, numbers in ranked[: max(count, 1)]:
        facts = (_text(value), _text(numbers.get(metric)), _text(row["step"]), _commit(row))
        table.add_row(_name(row, folder), _status(row), *facts, _settings(row))
    return table


def _run(path: str) -> dict[str, Any]:
    if not (Path(path) / "status.json").is_file():
        raise ConfigError(f"{path}: is not the directory of a run (no status.json); `list` shows where runs are")
    return load_run(path)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("run", "status", "commit"))
    return table


def _name(row: dict[str, Any], folder: str) -> str:
    return escape(os.path.relpath(row["path"], folder))


def _status(row: dict[str, Any]) -> str:
    state = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason'][:60]}"
    return f"[{COLOURS.get(row['status'], 'yellow')}]{escape(state)}[/]"


def _commit(row: dict[str, Any]) -> str:
    return (row["commit"] or "")[:8] + ("+" if row["dirty"] else "")


def _settings(row: dict[str, Any]) -> str:
    return escape(" ".join(text for text in row["overrides"] if not text.startswith("run.")))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


if __name__ == "__main__":
    raise SystemExit(main())
