"""Command line over the records: ``python -m sana.run list [folder]`` shows all runs, oldest first."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sana.run.error import ConfigError
from sana.run.runs import load_runs

COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red"}


def main() -> int:
    """Entry point; 0, or 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(prog="python -m sana.run", description="Show the records of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", help="one line per run: status, step, loss, time, overrides")
    lister.add_argument("folder", nargs="?", default="runs")
    arguments = parser.parse_args()
    try:
        rows = load_runs(arguments.folder)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "status", "step", "loss", "time", "commit"):
        table.add_column(column, no_wrap=True)
    table.add_column("settings", overflow="fold")
    for row in rows:
        loss = row["metrics"].get("train/loss")
        state = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason'][:60]}"
        table.add_row(
            escape(os.path.relpath(row["path"], arguments.folder)),
            f"[{COLOURS.get(row['status'], 'yellow')}]{escape(state)}[/]",
            "" if row["step"] is None else str(row["step"]),
            f"{loss:.4g}" if isinstance(loss, float) else "",
            _duration(row["seconds"]),
            (row["commit"] or "")[:8] + ("+" if row["dirty"] else ""),
            escape(" ".join(text for text in row["overrides"] if not text.startswith("run."))),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # into a file or a pipe: whole lines, whatever the default width is
    console.print(table)
    return 0


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


if __name__ == "__main__":
    raise SystemExit(main())
