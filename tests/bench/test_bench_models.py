"""The rows of the benchmark at tiny sizes on a CPU: both sides agree, counts are right, files are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana.bench import decoding, end, models, operators, training
from sana.bench.__main__ import main
from sana.bench.counts import (
    Kernel,
    decoder_kernels,
    floor,
    matrix,
    network_kernels,
    passing,
    predicted,
)
from sana.bench.measure import Bench, BrokenDeviceError, Case, attempt, measure, relative
from sana.bench.parts import SIZES, our_network, their_network
from sana.bench.peers import compile_blocks
from sana.bench.roofline import Rates
from sana.bench.rows import Book, Row, plot, table
from sana.bench.run import day
from sana.types import Condition, Grid

CPU = torch.device("cpu")


def bench(dtype: torch.dtype = torch.float32, path: Path | None = None, **more) -> Bench:
    return Bench(CPU, dtype, Book(path), tiny=True, seconds=0.0, **more)


def made(case: Case, on: Bench) -> Row:
    row = Row(case.stage, case.name, case.shape, "fp32")
    case.run(on, row)
    return row


@pytest.mark.parametrize("stage", [models, decoding])
def test_both_sides_agree(stage) -> None:
    on = bench()
    for case in stage.cases(tiny=True):
        if case.part != "compiled":
            row = made(case, on)
            assert row.failed == {}
            assert row.error.keys() == {"ours", "eager", "naive"}
            assert max(row.error.values()) < 1e-5
            assert row.ratio["eager"] == row.ms["eager"]["median"] / row.ms["ours"]["median"]
            assert row.floor_ms is not None
            assert row.predicted_ms is not None
            assert row.predicted_ms >= row.floor_ms > 0


@pytest.mark.parametrize("case", [c for c in operators.cases(tiny=True) if c.part != "compiled"], ids=lambda c: c.name)
def test_each_op_agrees_with_float64(case: Case) -> None:
    torch.manual_seed(0)
    row = made(case, bench())
    assert row.failed == {}
    assert row.error.keys() == {"ours", "eager", "naive"}
    assert max(row.error.values()) < 1e-5


@pytest.mark.slow
def test_drawings_agree_to_the_last_grey_level() -> None:
    for case in end.cases(tiny=True):
        row = made(case, bench())
        assert row.failed == {}
        assert row.facts["mean_difference_of_255"] < 0.3  # uint8 against float: a quarter is what rounding gives
        assert {"text_ms", "denoiser_ms", "decoder_ms"} <= row.facts.keys()


def test_training_starts_from_the_same_loss() -> None:
    (case,) = (case for case in training.cases(tiny=True) if case.part != "compiled")
    row = made(case, bench())
    assert row.failed == {}
    assert row.error["ours"] < 1e-6
    seconds, count = row.ms["ours"]["median"] / 1e3, training.operations(training.TINY[0])
    assert row.facts["mfu"] == pytest.approx(count / seconds / 989e12)


@pytest.mark.parametrize(("name", "px", "batch"), [("tiny", 64, 1), ("sprint-tiny", 96, 2)])
def test_operations_are_those_that_torch_counts(name: str, px: int, batch: int) -> None:
    size, text = SIZES[name], 7
    network, grid = our_network(size, px, torch.float32, CPU), Grid(1, px // 32, px // 32)
    caption = Condition(
        torch.randn(batch, text, size.text_channels), None, torch.ones(batch) if size.guidance else None
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(batch, 32, 1, grid.h, grid.w), torch.rand(batch, 1), caption)
    assert counter.get_total_flops() == batch * network.flops(grid, text)


@pytest.mark.parametrize(("name", "teraflop"), [("600m", 1.121), ("1600m", 2.967), ("1.5-4800m", 8.887)])
def test_kernels_add_up_to_the_published_counts(name: str, teraflop: float) -> None:
    kernels = network_kernels(SIZES[name], 1024, 300, 1, 2)
    assert sum(k.flops * k.times for k in kernels) / 1e12 == pytest.approx(teraflop, rel=2e-3)


def test_kernels_of_the_decoder_add_up() -> None:
    kernels = decoder_kernels(SIZES["1600m"], 1024, 1, 2)
    assert sum(k.flops * k.times for k in kernels) / 1e12 == pytest.approx(8.37, rel=3e-3)


def test_floors_by_hand() -> None:
    rates = Rates(flops=100.0, bytes=10.0)
    kernels = [Kernel("a", 200.0, 5.0), Kernel("b", 10.0, 30.0, times=2), Kernel("gated residual", 0.0, 1e9)]
    assert floor(kernels, rates) == 2.0 + 2 * 3.0
    assert matrix("c", 2, 3, 5, 2) == Kernel("c", 60.0, 2.0 * (10 + 15 + 6), (2, 3, 5))
    assert passing("d", 7, 2, 3) == Kernel("d", 0.0, 14.0, None, 3)
    assert predicted(kernels[:2], rates, launch=1.0) == 2.0 + 6.0 + 3.0


def test_products_in_tiles() -> None:
    rates = Rates(flops=1.0, bytes=float("inf"))
    full = matrix("full", 128 * 132, 256, 64, 2)  # one tile for each multiprocessor
    assert predicted([full], rates, launch=0.0) == full.flops
    more = matrix("more", 128 * 133, 256, 64, 2)  # one tile more: nearly a whole round, unless tiles are halved
    assert 1.0 < predicted([more], rates, launch=0.0) / more.flops <= 1.5


def test_a_file_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    book = Book(path, {"card": "none"})
    first = Row("s", "n", "1", "fp32", bars={"eager": 2.0, "ms": 3.0, "mfu": 0.5})
    first.take({"ours": [2.0, 1.0, 4.0], "eager": [4.0, 5.0, 3.0]})
    book.put(first)
    held = json.loads(path.read_text())
    assert held["rows"][0]["ms"]["ours"] == {"median": 2.0, "min": 1.0, "repeats": 3}
    assert held["rows"][0]["ratio"] == {"eager": 2.0}
    assert held["rows"][0]["reached"] == {"eager": True, "ms": True, "mfu": None}
    again = Book(path)
    again.put(Row("s", "n", "2", "fp32", failed={"ours": "no"}))
    assert [row.shape for row in Book(path).rows.values()] == ["1", "2"]
    assert Book(path).about == {"card": "none"}
    assert "mfu 0.5: not measured yet" in table(again.rows.values())
    plot(again.rows.values(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_row_stops_nothing(tmp_path: Path, capsys) -> None:
    on = bench(path=tmp_path / "rows.json")

    def fail(on: Bench, row: Row) -> None:
        raise ValueError("first line\nsecond")

    def work(on: Bench, row: Row) -> None:
        measure(on, row, {"ours": lambda: None, "eager": lambda: 1 / 0})

    attempt(Case("s", "bad", "1", fail), on)
    attempt(Case("s", "half", "1", work), on)
    bad, half = on.book.rows.values()
    assert bad.failed == {"measured": "ValueError: first line second"}
    assert half.ms.keys() == {"ours"}
    assert half.failed["eager"].startswith("ZeroDivisionError")
    capsys.readouterr()
    attempt(Case("s", "half", "1", fail), on)  # it is there already
    assert "measured" not in half.failed


def test_rows_wait_for_no_time_that_is_not_left(capsys) -> None:
    on = bench(until=0.0)
    attempt(Case("s", "late", "1", lambda on, row: None, seconds=1.0), on)
    assert on.book.rows == {}
    assert "left out" in capsys.readouterr().err


def test_a_row_is_broken_off_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from sana.bench import measure as module

    monkeypatch.setattr(module, "GRACE", 0.2)
    on = bench(until=time.monotonic())
    attempt(Case("s", "long", "1", lambda on, row: time.sleep(30), seconds=-1.0), on)
    (row,) = on.book.rows.values()
    assert row.failed == {"measured": "OutOfTimeError: broken off at the end of the time"}


def test_a_broken_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.bench import measure as module

    def broken(device: torch.device) -> None:
        raise RuntimeError("illegal memory access")

    on = bench()
    monkeypatch.setattr(module, "wait", broken)
    with pytest.raises(BrokenDeviceError, match="illegal memory access"):
        attempt(Case("s", "kernel", "1", lambda on, row: broken(CPU)), on)
    (row,) = on.book.rows.values()
    assert "illegal memory access" in row.failed["measured"]


def test_nan_never_passes() -> None:
    assert relative(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == 0.8


def test_the_day_has_every_row_once_and_compiled_peers_last() -> None:
    cases = day(tiny=False)
    assert len({(c.stage, c.name, c.shape, c.part) for c in cases}) == len(cases)
    parts = [case.part for case in cases]
    assert parts.index("compiled") == parts.count("measured")
    whole = sum(len(stage.cases(False)) for stage in (models, operators, decoding, end, training))
    assert len(cases) == whole
    assert [case.stage for case in cases[:3]] == ["models"] * 3


def test_blocks_share_their_compiled_graphs() -> None:
    """The first block has tokens in another memory layout; all others share one graph, however many they are."""
    network = their_network(replace(SIZES["tiny"], depth=10), 64, torch.float32, CPU).eval().requires_grad_(False)
    given = torch.randn(1, 32, 2, 2), torch.randn(1, 5, 64), torch.full((1,), 500.0)
    with torch.no_grad():
        expected = network(*given, return_dict=False)[0]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_blocks(network.transformer_blocks, backend="eager")
        found = network(*given, return_dict=False)[0]
    assert relative(found, expected) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    options = ["--size", "tiny", "--device", "cpu", "--dtype", "fp32", "--no-compiled", "--json", str(file)]
    assert main(["operators", *options, "--only", "norm"]) == 0
    assert main(["models", *options, "--plot", str(tmp_path / "bars.png")]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["stage"] for row in rows} == {"operators", "models"}
    assert all("norm" in row["name"] for row in rows if row["stage"] == "operators")
    assert "models: forward" in capsys.readouterr().out
    assert (tmp_path / "bars.png").exists()


def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert main(["models", "--device", "cuda"]) == 2
        assert capsys.readouterr().err == "bench.py models: --device cuda: this machine has no CUDA device\n"
    assert main(["blocks", "--px", "100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
