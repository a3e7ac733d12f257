"""``bench.py predicted``: every row's floor and predicted time on an H200, beside what was measured there if it was.

The rates: bf16 products at 790 TFLOP/s, copies at 4.3 TB/s (measured on such a card), 2 us between kernels of a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sana.bench import decoding, end, models, operators, training
from sana.bench.counts import H200, LAUNCH, PEAK, decoder_kernels, network_kernels
from sana.bench.measure import Bench, Case, set_floors
from sana.bench.parts import SIZES
from sana.bench.rows import Book, Row, plot, table
from sana.bench.shapes import TEXT

HERE = Path(__file__).resolve().parents[2] / "experiments" / "performance"
BEGIN, END = "<!-- bench.py predicted: the table -->", "<!-- the end of the table -->"
MISSING = "not measured yet"
RUN = ("date", "card", "driver", "commit", "command", "python", "versions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=[], help="rows.json of days with a GPU, oldest first"
    )
    parser.add_argument(
        "--folder", type=Path, default=HERE, help="of README.md and results.json, which it brings up to date"
    )


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    results = options.folder / "results.json"
    files = ([results] if results.exists() else []) + options.measured
    missing = [str(path) for path in options.measured if not path.is_file()]
    if missing:
        print(f"bench.py predicted: no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    rows = {row.key: row for row in predictions()}
    for path in files:
        merge(rows, json.loads(path.read_text(encoding="utf-8")))
    print(table(rows.values()))
    options.folder.mkdir(parents=True, exist_ok=True)
    rates = {"flops_per_s": H200.flops, "bytes_per_s": H200.bytes, "launch_s": LAUNCH, "mfu_refers_to": PEAK}
    entries = [asdict(row) | {"reached": row.reached(), "status": _status(row)} for row in rows.values()]
    _write(results, json.dumps({"predicted_with": rates, "rows": entries}, indent=1) + "\n")
    readme = options.folder / "README.md"
    if readme.exists():
        _write(readme, with_table(readme.read_text(encoding="utf-8"), list(rows.values())))
    if any(row.ratio for row in rows.values()):
        plot(rows.values(), options.folder / "ratios.png")
    return 0


def predictions() -> list[Row]:
    """All rows of a day with an H200, in bf16, without times."""
    rows = []
    for shape in models.SHAPES:
        for reuse in (False, True):
            row = Row("models", "forward, caption reused" if reuse else "forward", shape.text, "bf16")
            row.bars = {} if reuse else dict(shape.bars)
            args = SIZES[shape.size], shape.grid.tokens, TEXT, shape.batch, 2, reuse
            set_floors(row, lambda args=args: network_kernels(*args))
            rows.append(row)
    meta = Bench(torch.device("meta"), torch.bfloat16, Book(None))
    for case in operators.cases(tiny=False):
        if case.part != "compiled":
            rows.append(_row(case))
            case.run.forecast(meta, rows[-1])  # type: ignore[attr-defined]
    for picture in decoding.PICTURES:
        rows.append(Row("autoencoder", "decode", picture.text, "bf16", bars=dict(picture.bars)))
        set_floors(rows[-1], lambda p=picture: decoder_kernels(SIZES[p.size], p.px, p.batch, 2))
    for case, drawing in zip(end.cases(tiny=False), end.DRAWINGS, strict=True):
        rows.append(_row(case, dict(drawing.bars)))
        set_floors(rows[-1], lambda d=drawing: end.drawing_kernels(d, 2))
    for step in training.STEPS:
        rows.append(Row("update", training.NAME, step.text, "bf16", bars=dict(step.bars)))
        set_floors(rows[-1], lambda s=step: training.step_kernels(s))
    return rows


def merge(rows: dict[str, Row], held: dict[str, Any]) -> None:
    """Take times, errors and facts of measured rows, and where and when they were measured; predictions stay new.

    A day of compiled peers alone adds those to a row; a day without them leaves those that are there.
    """
    about = {name: held.get("about", {}).get(name) for name in RUN}
    for one in held["rows"]:
        found = Row(**{name: value for name, value in one.items() if name not in ("reached", "status")})
        new = rows.setdefault(found.key, found)
        facts = {name: value for name, value in found.facts.items() if name != "parts"}
        if not found.ms:
            if not new.ms:
                new.failed = found.failed
        elif new is found or not new.ms:
            new.ms, new.ratio, new.error, new.failed = found.ms, found.ratio, found.error, found.failed
            new.facts = {"run": about} | facts
        else:
            _update(new, found, {"run": about} | facts)


def _update(new: Row, found: Row, facts: dict[str, Any]) -> None:
    """Bring a measured row up to date."""
    late = ("compiled", "ours compiled")
    whole = "eager" in found.ms or not any(side in found.ms for side in late)
    for name in ("ms", "ratio", "error"):
        here, there = getattr(new, name), getattr(found, name)
        if whole:
            setattr(new, name, {side: v for side, v in here.items() if side in late} | there)
        else:
            here |= {side: v for side, v in there.items() if side in late}
    if whole:
        if "compiled" in new.ms and "compiled" not in found.ms:
            facts["run_of_compiled"] = new.facts.get("run_of_compiled", new.facts["run"])
        new.facts, new.failed = facts, found.failed
    else:
        new.facts["run_of_compiled"] = facts["run"]
        new.failed |= found.failed
        new.facts |= {"mfu": max(new.facts["mfu"], facts["mfu"])} if "mfu" in new.facts and "mfu" in facts else {}


def with_table(text: str, rows: list[Row]) -> str:
    """The page with its table replaced, or added at its end."""
    head = ["what", "shape", "ours ms", "eager / ours", "compiled / ours", "error (eager's)", "floor ms"]
    head += ["predicted ms", "bars", "when"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        ours = row.ms.get("ours")
        errors = f"{row.error['ours']:.1e}" if "ours" in row.error else ""
        errors += f" ({row.error['eager']:.1e})" if "eager" in row.error else ""
        words = {True: "met", False: "missed", None: MISSING}
        bars = ", ".join(f"{bar} {row.bars[bar]:g}: {words[met]}" for bar, met in row.reached().items())
        mfu = row.facts.get("mfu")
        bars += f" (MFU {mfu:.3f})" if mfu is not None and "run" in row.facts else ""
        ratios = [f"{row.ratio[peer]:.2f}" if peer in row.ratio else "" for peer in ("eager", "compiled")]
        cells = [f"{row.stage}: {row.name}", row.shape, f"{ours['median']:.3g}" if ours else MISSING, *ratios, errors]
        cells += [f"{value:.3g}" if value is not None else "" for value in (row.floor_ms, row.predicted_ms)]
        when = str((row.facts.get("run") or {}).get("date") or "")[:16].replace("T", " ")
        lines.append("| " + " | ".join([*cells, bars, when]) + " |")
    new = "\n".join([BEGIN, "", *lines, "", END])
    if BEGIN in text and END in text:
        return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]
    return text.rstrip("\n") + "\n\n" + new + "\n"


def _row(case: Case, bars: dict[str, float] | None = None) -> Row:
    return Row(case.stage, case.name, case.shape, "bf16", bars=bars or {})


def _status(row: Row) -> str:
    return "measured" if row.ms else MISSING


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
