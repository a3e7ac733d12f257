"""``data.inspect=true``: what the data are like, before anything is trained on them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from sana.run.sidecar import save_grid

CHECKED = 2000
"""Samples that are read and decoded, evenly spread over the data."""
SHOWN = 8
"""Bad samples that are printed; the others are in the file."""


def inspect(data: Any, folder: str | Path, console: Console | None = None) -> int:
    """Print counts, sizes, buckets, caption lengths and bad samples, and draw a batch as the model will see it.

    Args:
        data: a data module over sources, as training builds it.
        folder: gets ``inspect.png`` (with its JSON) and, if there are bad samples, ``inspect_bad_samples.jsonl``.
        console: where to print.

    Returns:
        0, or 1 if more of the samples are bad than `data.max_bad_fraction` allows.
    """
    console, folder = console or Console(), Path(folder)
    if hasattr(data, "write"):
        data.write()
    samples, planner = data.samples(), data.planner()
    console.print(_counts(data, samples))
    console.print(_sizes(samples.sources))
    console.print(_buckets(data, planner))
    lengths, bad, checked = _read(data, samples)
    console.print(_captions(lengths))
    console.print(f"{checked:,} of {len(samples):,} samples were read: {len(bad)} bad")
    for entry in bad[:SHOWN]:
        console.print(f"  {escape(entry['shard'])}/{escape(entry['key'])}: {escape(entry['reason'])}", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    if bad:
        path = folder / "inspect_bad_samples.jsonl"
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad), encoding="utf-8")
        console.print(f"  all of them: {path}", soft_wrap=True)
    console.print(f"a batch as the model will see it: {_draw(data, folder / 'inspect.png')}", soft_wrap=True)
    return int(len(bad) > data.max_bad_fraction * max(checked, 1))


def _counts(data: Any, samples: Any) -> Table:
    table = Table("source", "samples", "after filter", "shards or files", "bad when indexed", title="data")
    for place, source in zip(data.folders, samples.sources, strict=True):
        kept = data.filter.kept(source.index)
        shards = len(getattr(source.index, "shards", ()))
        numbers = (len(source), len(source) if kept is None else len(kept), shards, len(getattr(source, "bad", ())))
        table.add_row(escape(place), *(f"{number:,}" for number in numbers))
    return table


def _sizes(sources: list[Any]) -> Table:
    table = Table("", "least", "median", "greatest", title="resolutions")
    width, height = (np.concatenate([source.index.column(name) for source in sources]) for name in ("width", "height"))
    ratio = height / np.maximum(width, 1)
    for name, values, form in (
        ("width", width, "{:.0f}"), ("height", height, "{:.0f}"), ("height / width", ratio, "{:.2f}"),
    ):  # fmt: skip
        table.add_row(name, *(form.format(f(values)) for f in (np.min, np.median, np.max)))
    return table


def _buckets(data: Any, planner: Any) -> Table:
    table = Table("bucket (height x width)", "samples per epoch", "batches in 100 epochs", "", title="buckets")
    sizes = data.table(data.sources()).sizes
    due = {bucket: float(sum(cell.due for cell in stream.cells)) for bucket, stream in planner.streams.items()}
    for bucket, count in due.items():
        steps = planner.streams[bucket].before(100) // planner.batch
        bar = "#" * max(1, round(40 * count / max(due.values())))
        table.add_row("{}x{}".format(*sizes[bucket]), f"{count:,.0f}", f"{steps:,}", bar)
    return table


def _captions(lengths: dict[str, list[int]]) -> Table:
    table = Table("caption source", "captions", "shortest", "median", "longest", title="captions, in characters")
    for source, values in sorted(lengths.items()):
        table.add_row(escape(source), f"{len(values):,}", *(f"{f(values):.0f}" for f in (np.min, np.median, np.max)))
    return table


def _read(data: Any, samples: Any) -> tuple[dict[str, list[int]], list[dict[str, str]], int]:
    """Caption source -> lengths, the bad samples, and how many were read."""
    lengths: dict[str, list[int]] = defaultdict(list)
    bad = [entry.entry() for source in samples.sources for entry in getattr(source, "bad", ())]
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), CHECKED)).astype(int)).tolist()
    for sample in track(chosen, "reading samples", console=Console(stderr=True), transient=True):
        batch = samples.__getitems__(data.slots(samples, [sample]))
        bad += [entry._asdict() for entry in batch.bad]
        if not batch.bad:
            source, i = samples.locate([sample])[0]
            for caption in source.record(i).captions:
                lengths[caption.source].append(len(caption.text))
    return lengths, bad, len(chosen)


def _draw(data: Any, path: Path) -> Path:
    """The first samples of the first global batch, each beside its caption."""
    batch = next(data.batches())
    assert batch.image is not None
    count = max(2, min(8, 2048 // batch.image.shape[2]))
    images = [[image.permute(1, 2, 0).numpy()] for image in batch.image[:count]]
    return save_grid(path, images, batch.caption[:count], (), f"{batch.image.shape[2]}x{batch.image.shape[3]} pixels")
