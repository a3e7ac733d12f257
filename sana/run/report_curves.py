"""Which charts a report draws from the metrics of a run, and how each of them is to be read."""

from __future__ import annotations

from collections.abc import Mapping

from sana.run.report_charts import Line, chart, common, smooth
from sana.run.report_read import Series
from sana.scenes import TASKS

OTHERS = 8  # metrics that no chart knows, drawn by themselves
PARTS = ("time/model", "time/autoencoder", "time/text", "time/data")


def curves(series: Mapping[str, Series]) -> str:
    """Charts of all metrics: the known ones first, then up to OTHERS that have at least two values."""
    bins = sorted((k for k in series if k[:10] == "val/loss_t" and k[10:].isdigit()), key=lambda k: int(k[10:]))
    tasks = [k for k in ("val/overall", *(f"val/{task}" for task in TASKS)) if k in series]
    blocks = sorted(k for k in series if k.startswith("importance/block_"))
    known = {
        *blocks,
        "train/loss",
        "val/loss",
        "train/grad_norm",
        "train/lr",
        "train/samples_per_s",
        *PARTS,
        *bins,
        *tasks,
    }
    known |= {"train/samples", "time/evaluation"}  # one is a straight line, the other not part of a training step
    others = sorted(k for k in series if k not in known and len(series[k][0]) > 1)
    charts = [
        _loss(series),
        _by_time(series, bins),
        _accuracy(series, tasks),
        _importance(series, blocks),
        _single(series, "train/grad_norm", "Gradient norm", "Global norm before clipping.", log=True),
        _single(series, "train/lr", "Learning rate", "What the schedule gave at each update.", zero=True),
        _single(series, "train/samples_per_s", "Throughput (images/s)", "Training images per second.", zero=True),
        _parts(series),
        *(_single(series, key, key, "As recorded in metrics.jsonl.") for key in others[:OTHERS]),
    ]
    html = "".join(charts)
    return f'<div class="charts">{html}</div>' if html else ""


def _loss(series: Mapping[str, Series]) -> str:
    lines, caption = [], "Mean squared error of the velocity, on a logarithmic axis."
    if "train/loss" in series:
        x, y = series["train/loss"]
        window = max(10, len(y) // 40)
        lines = [Line("", x, y, "c1", "faint"), Line("training, smoothed", x, smooth(y, window), "c1")]
        caption += f" Behind the line are the raw values; it is their mean over {window} rows."
    if "val/loss" in series:
        lines.append(Line("validation", *series["val/loss"], "c2", "dots"))
        caption += " Validation has the same images and the same noise every time."
    return chart("Loss", caption, lines, log=True)


def _by_time(series: Mapping[str, Series], bins: list[str]) -> str:
    n = len(bins)
    lines = [
        Line(f"t = {i / n:.2g} to {(i + 1) / n:.2g}", *series[k], f"t{round(9 * i / max(1, n - 1))}", "dots")
        for i, k in enumerate(bins)
    ]
    caption = "One line per bin of t, from data (t = 0) to noise (t = 1), with the same images and noise every time."
    return chart("Validation loss by time t", caption, lines, log=True)


def _accuracy(series: Mapping[str, Series], tasks: list[str]) -> str:
    lines = [
        Line(k[4:].replace("_", " "), *series[k], f"c{0 if k == 'val/overall' else 1 + TASKS.index(k[4:])}", "dots")
        for k in tasks
    ]
    return chart("Accuracy while training", "Few prompts at fixed seeds: read the trend.", lines, percent=True)


def _importance(series: Mapping[str, Series], blocks: list[str]) -> str:
    n = len(blocks)
    few = {round(i * (n - 1) / 9) for i in range(10)}  # that are named; all are drawn
    lines = [
        Line(f"block {int(k[17:])}" if i in few else "", *series[k], f"t{round(9 * i / max(1, n - 1))}", "dots")
        for i, k in enumerate(blocks)
    ]
    caption = (
        "1 - cos of the tokens before and after each block, on the same samples, noise and times: 0 is an identity."
    )
    return chart("Block importance", caption, lines, log=True)


def _parts(series: Mapping[str, Series]) -> str:
    parts = [k for k in PARTS if k in series]
    if not parts:
        return ""
    x, *times = common([series[k] for k in parts])
    lines = [
        Line(k[5:], x, [1000 * v for v in t], f"c{1 + i}") for i, (k, t) in enumerate(zip(parts, times, strict=True))
    ]
    return chart("Time per update (ms)", "Where a training step spends its time.", lines, stacked=True) if x else ""


def _single(
    series: Mapping[str, Series], key: str, title: str, caption: str, *, log: bool = False, zero: bool = False
) -> str:
    if key not in series:
        return ""
    x, y = series[key]
    if len(y) < 30 or key == "train/lr":
        lines = [Line(title.lower(), x, y, "c1", "line" if len(y) > 40 else "dots")]
    else:
        window = max(5, len(y) // 40)
        lines = [Line("", x, y, "c1", "faint"), Line("smoothed", x, smooth(y, window), "c1")]
    return chart(title, caption, lines, log=log, zero=zero)
