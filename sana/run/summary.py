"""metrics.jsonl of a run in short: the last, lowest and highest value of every number, without a list of rows.

A long file is read by pyarrow, some ten times faster than line by line and beside other threads; what was found is kept
beside it in ``metrics.summary.json`` with a fingerprint of the file. A file that has only grown since is read from
where it had ended, so runs under way cost their new rows.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import pyarrow

NAME = "metrics.summary.json"
FORMAT = 1
KEPT_FROM = 1 << 16  # bytes; shorter files are read line by line sooner than pyarrow is imported
PROBE = 4096  # bytes before the end of what was read that tell whether a file has only grown
NOT_METRICS = ("step", "time")


@dataclass(frozen=True)
class Summary:
    """What the rows of a metrics.jsonl come to.

    Attributes:
        rows: their number, torn ones left out.
        step: of the last row; None where it has none.
        begun, ended: times of the first and last row, seconds since 1970.
        last: metric -> its last value, NaN included.
        lowest, highest: metric -> extreme over all rows; numbers alone, NaN left out.
    """

    rows: int = 0
    step: int | None = None
    begun: float | None = None
    ended: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)

    def __add__(self, later: Summary) -> Summary:
        """The summary of both parts, `later` being the rows after these."""
        if not later.rows:
            return self
        return Summary(
            self.rows + later.rows,
            later.step,
            self.begun if self.begun is not None else later.begun,
            later.ended if later.ended is not None else self.ended,
            self.last | later.last,
            {k: min(v, self.lowest.get(k, v)) for k, v in (self.lowest | later.lowest).items()},
            {k: max(v, self.highest.get(k, v)) for k, v in (self.highest | later.highest).items()},
        )


def summarise(path: str | Path) -> Summary:
    """The summary of a metrics.jsonl; that of no rows where there is no such file. Never fails on torn lines, and only
    reads where the folder cannot be written to."""
    path = Path(path)
    try:
        stat = path.stat()
    except OSError:
        return Summary()
    if stat.st_size < KEPT_FROM:
        return _of_rows(rows_of(path.read_bytes()))
    known, at, probe, of = _known(path)
    now = [stat.st_size, stat.st_mtime_ns]
    if of == now and at == stat.st_size:
        return known
    with open(path, "rb") as file:
        if not 0 < at <= stat.st_size or _probe(file, at) != probe:
            known, at = Summary(), 0
        file.seek(at)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a row that is being written is read again the next time
        if whole:
            known += summarise_bytes(whole)
            at += len(whole)
            _keep(path, known, at, _probe(file, at), now)
    return known + _of_rows(rows_of(data[len(whole) :]))


def summarise_bytes(data: bytes) -> Summary:
    """The summary of the text of a metrics.jsonl."""
    table = arrow_table(data)
    return _of_rows(rows_of(data)) if table is None else _of_table(table)


def rows_of(data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of the text of a metrics.jsonl; torn lines are left out, "nan" and "inf" become numbers."""
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}


def arrow_table(data: bytes) -> pyarrow.Table | None:
    """The rows as a table with a column per key, numbers in all of them; None where they have to be read one by one,
    because of torn lines or of values that are no numbers, such as the "nan" that JSON lacks."""
    import pyarrow
    from pyarrow import json as arrow_json

    if len(data) < KEPT_FROM:
        return None
    options = arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    try:
        table = arrow_json.read_json(pyarrow.BufferReader(data), read_options=options)
    except pyarrow.ArrowInvalid:
        return None
    is_known = (pyarrow.types.is_floating, pyarrow.types.is_integer, pyarrow.types.is_null)
    return table if all(any(known(column.type) for known in is_known) for column in table.columns) else None


def _of_table(table: pyarrow.Table) -> Summary:
    from pyarrow import compute

    last, lowest, highest, times = {}, {}, {}, [None, None]
    for name, column in zip(table.column_names, table.columns, strict=True):
        present = column.drop_null() if column.null_count else column
        if not len(present):
            continue
        if name == "time":
            times = [present[0].as_py(), present[-1].as_py()]
        elif name != "step":
            last[name] = present[-1].as_py()
            ends = compute.min_max(present)  # type: ignore[attr-defined]  # generated at import
            lowest[name], highest[name] = ends["min"].as_py(), ends["max"].as_py()
    step = table["step"][-1].as_py() if "step" in table.column_names and len(table) else None
    return Summary(len(table), step, times[0], times[1], last, lowest, highest)


def _of_rows(rows: Iterator[dict[str, Any]]) -> Summary:
    count, step, times = 0, None, []
    last: dict[str, Any] = {}
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}
    for row in rows:
        count, step = count + 1, row.get("step")
        if isinstance(row.get("time"), int | float):
            times.append(row["time"])
        for key, value in row.items():
            if key in NOT_METRICS or value is None:
                continue
            last[key] = value
            if is_number(value) and not math.isnan(value):
                lowest[key] = min(value, lowest.get(key, value))
                highest[key] = max(value, highest.get(key, value))
    begun, ended = (times[0], times[-1]) if times else (None, None)
    return Summary(count, step, begun, ended, last, lowest, highest)


def is_number(value: Any) -> bool:
    """Whether a value of a row can be plotted; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _probe(file: Any, at: int) -> str:
    """Digest of the bytes before a place."""
    start = max(at - PROBE, 0)
    file.seek(start)
    return xxhash.xxh3_64(file.read(at - start)).hexdigest()


def _known(path: Path) -> tuple[Summary, int, str, list[int] | None]:
    """What an earlier reading left: the summary, how far it reaches, the digest before that place, and size and time
    of the file it was read from."""
    try:
        content = json.loads(path.with_name(NAME).read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            return Summary(**content["summary"]), int(content["at"]), content["probe"], content["of"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Summary(), 0, "", None


def _keep(path: Path, summary: Summary, at: int, probe: str, of: list[int]) -> None:
    """Write the summary in one step; where that is not allowed, the file is read again the next time."""
    place = path.with_name(NAME)
    temporary = place.with_name(f".{NAME}.{os.getpid()}.{threading.get_ident()}")
    content = {"format": FORMAT, "of": of, "at": at, "probe": probe, "summary": asdict(summary)}
    with suppress(OSError):
        temporary.write_text(json.dumps(content), encoding="utf-8")  # NaN as json writes and reads it
        os.replace(temporary, place)
