"""``bench.py predicted``: a page without measurements says so, measured days are merged in, and stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana.bench.__main__ import main
from sana.bench.forecast import BEGIN, END, MISSING, merge, predictions, with_table
from sana.bench.rows import Book, Row


def test_all_rows_are_predicted() -> None:
    rows = predictions()
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.failed == {}
        assert row.floor_ms is not None
        assert row.predicted_ms is not None
        assert 0 < row.floor_ms <= row.predicted_ms
        assert all(met is None for met in row.reached().values())
    forward = next(row for row in rows if row.shape == "1600m 1024px b1")
    assert forward.bars == {"eager": 2.0, "compiled": 1.1}
    assert forward.floor_ms == pytest.approx(3.9, rel=0.1)  # the plan of performance, A2


def test_a_measured_day_is_merged_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("# On GPUs\n\nBefore.\n")
    folder = ["--folder", str(tmp_path)]
    assert main(["predicted", *folder]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# On GPUs\n\nBefore.\n")
    assert page.count("| models: forward | 1600m 1024px b1 | " + MISSING) == 1
    assert not (tmp_path / "ratios.png").exists()

    book = Book(tmp_path / "rows.json", {"card": "a card", "commit": "abc", "date": "today", "threads": 3})
    row = Row("models", "forward", "1600m 1024px b1", "bf16", facts={"parts": ["measured"], "tflops": 1.5})
    row.take({"ours": [5.0], "eager": [12.5]})
    row.error = {"ours": 1e-2, "eager": 1.1e-2}
    book.put(row)
    book.put(Row("models", "forward", "1600m 1024px b16", "bf16", failed={"measured": "out of memory"}))
    assert main(["predicted", *folder, "--measured", str(book.path)]) == 0
    assert main(["predicted", *folder]) == 0  # once more, without the day's file
    results = {(r["name"], r["shape"]): r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    found, other = (results["forward", f"1600m 1024px {batch}"] for batch in ("b1", "b16"))
    assert found["status"] == "measured"
    assert found["reached"] == {"eager": True, "compiled": None}
    assert found["facts"]["run"] == {"date": "today", "card": "a card", "driver": None, "commit": "abc",
                                     "command": None, "python": None, "versions": None}  # fmt: skip
    assert (other["status"], other["failed"]) == (MISSING, {"measured": "out of memory"})
    page = (tmp_path / "README.md").read_text()
    assert "| models: forward | 1600m 1024px b1 | 5 | 2.50 |  | 1.0e-02 (1.1e-02) |" in page
    assert page.count(BEGIN) == page.count(END) == 1
    assert (tmp_path / "ratios.png").exists()
    capsys.readouterr()


def test_a_newer_day_replaces_an_older_one() -> None:
    rows = {row.key: row for row in predictions()[:1]}
    (key,) = rows
    for date, ms in (("first", 7.0), ("second", 6.0)):
        row = Row(*key.split(" | "))
        row.take({"ours": [ms]})
        held = {"about": {"date": date}, "rows": [row.__dict__]}
        merge(rows, json.loads(json.dumps(held)))
    assert rows[key].ms["ours"]["median"] == 6.0
    assert rows[key].facts["run"]["date"] == "second"


def test_compiled_peers_of_another_day_join_a_row() -> None:
    rows = {row.key: row for row in predictions()[:1]}
    (key,) = rows

    def day(date: str, times: dict[str, list[float]], **facts: float) -> None:
        row = Row(*key.split(" | "), facts=dict(facts))
        row.take(times)
        row.error = dict.fromkeys(times, times["ours"][0])
        merge(rows, json.loads(json.dumps({"about": {"date": date}, "rows": [row.__dict__]})))

    day("first", {"ours": [7.0], "eager": [21.0]}, mfu=0.4)
    day("second", {"ours": [8.0], "compiled": [12.0]}, mfu=0.3)
    row = rows[key]
    assert row.ratio == {"eager": 3.0, "compiled": 1.5}
    assert row.ms["ours"]["median"] == 7.0
    assert row.error == {"ours": 7.0, "eager": 7.0, "compiled": 8.0}
    assert row.facts["mfu"] == 0.4
    assert (row.facts["run"]["date"], row.facts["run_of_compiled"]["date"]) == ("first", "second")
    day("third", {"ours": [5.0], "eager": [20.0]}, mfu=0.5)
    assert row.ratio == {"eager": 4.0, "compiled": 1.5}
    assert row.ms["ours"]["median"] == 5.0
    assert row.facts["mfu"] == 0.5
    assert (row.facts["run"]["date"], row.facts["run_of_compiled"]["date"]) == ("third", "second")


def test_the_table_is_replaced_in_its_place() -> None:
    text = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    page = with_table(text, [Row("s", "n", "x", "bf16")])
    assert page.startswith("before\n\n")
    assert page.endswith("\n\nafter\n")
    assert "old" not in page
    assert f"| s: n | x | {MISSING} |" in page


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predicted", "--measured", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"bench.py predicted: no such file: {tmp_path / 'none.json'}\n"
