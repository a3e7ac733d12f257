"""Scoring of a folder of images: every metric asked, and what they say in one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sana.metric.ranks import rank
from sana.model.found import HELD_OUT, MAIN, Images, Lines, find_images
from sana.model.journal import measure
from sana.run.records import to_json, write_atomically

EXTREMES = 4  # images with the highest and with the lowest scores that are named


class Metric(Protocol):
    """Scores images; `clusters` says which prompt of the list each image belongs to.

    One that scores images by themselves may have `measure`, `summary` and `settings` besides (see
    `sana.model.journal`): then nothing is scored twice when scoring is stopped and begun again.
    """

    def __call__(
        self, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]], clusters: Sequence[Any], /
    ) -> dict[str, Any]:
        """GenEval's form (overall, tasks, verdicts), or one figure (mean, interval, n, ...), or several of them
        ({"several": {name: figure}})."""
        ...


def score_folder(
    folder: str | Path,
    metrics: Mapping[str, Metric],
    *,
    lines: Lines | None = None,
    beside: Path | None = None,
    about: Any = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a folder of images, drawn here or elsewhere.

    Args:
        folder: see `find_images`.
        metrics: name -> metric. One with "tasks" in its answer gives the keys overall, tasks and (over the
            held-out images) held_out; any other gives a key of its name. Only metrics whose `scores_prompts` is True
            are asked about held-out images; where none has that or `needs_prompts`, images need no prompt.
        lines: prompts of images made elsewhere.
        beside: path without suffix that verdicts (GenEval's own form) and journals are named after; None: they are
            ``verdicts.jsonl`` and ``scores`` in the folder.
        about: what scores depend on besides, such as the commit.
        console: where a progress bar goes; None for none.

    Returns:
        ``{"metric", "value", "interval", "n", "overall", "tasks", "held_out", <name>..., "extremes", "figures",
        "settings", "files"}``: see `sana.run.results`. Settings are those that all sidecars share; one that differs
        between images lists its values.

    Raises:
        ValueError: see `find_images`; no metric, or two that judge tasks.
    """
    folder = Path(folder)
    if not metrics:
        raise ValueError("metric: no metric was chosen; give such as metric=[fid]")
    needed = any(getattr(m, key, False) for m in metrics.values() for key in ("scores_prompts", "needs_prompts"))
    found = find_images(folder, lines, prompts=needed or lines is not None)
    results: dict[str, Any] = {"figures": {}, "files": {"images": str(folder.resolve())}}
    verdicts: list[dict[str, Any]] = []
    own: dict[str, Any] = {}
    splits = {s: [(p, r) for p, r in found if (r["split"] == HELD_OUT) == (s == HELD_OUT)] for s in (MAIN, HELD_OUT)}
    for split, pairs in splits.items():
        if not pairs:
            continue
        prompts = [r["metadata"] for _, r in pairs]
        clusters = [r["entry"] for _, r in pairs]
        for name, metric in metrics.items():
            if split == HELD_OUT and not getattr(metric, "scores_prompts", False):
                continue
            scores = folder / "scores" if beside is None else beside.with_name(f"{beside.name}.scores")
            with watched(Images([p for p, _ in pairs], [r for _, r in pairs]), name, console) as images:
                answer, rows = _ask(metric, images, prompts, clusters, scores / name, about)
            if split == MAIN and rows and "score" in rows[0]:
                named = [(str(path.relative_to(folder)), record) for path, record in pairs]
                results.setdefault("extremes", {})[name] = extremes(named, [row["score"] for row in rows])
            for verdict in answer.pop("verdicts", ()):
                path, record = pairs[verdict["index"]]
                verdicts.append(_verdict_line(path.relative_to(folder), record, verdict))
            own = own or _settings_of(answer)
            _take(results, name, split, answer)
    if verdicts:
        path = folder / "verdicts.jsonl" if beside is None else beside.with_name(f"{beside.name}.verdicts.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            write_atomically(path, "".join(to_json(v) + "\n" for v in verdicts))
        results["files"]["verdicts"] = str(path.resolve())
    results["settings"] = _shared_settings([r for _, r in found]) | own | {"n": len(splits[MAIN])}
    if lines is not None:
        drawn = {r["entry"] for _, r in found}
        results["settings"] |= {"prompts": len(lines), "prompts_without_image": len(lines) - len(drawn)}
    return results


class _Watched(Sequence[Any]):
    """A sequence that tells a progress bar how many of its items were read for the first time."""

    def __init__(self, items: Sequence[Any], tell: Any) -> None:
        self.items, self.tell, self.seen = items, tell, set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        item = self.items[i]
        if i not in self.seen:
            self.seen.add(i)
            self.tell(len(self.seen))
        return item


@contextmanager
def watched(images: Sequence[Any], name: str, console: Console | None) -> Iterator[Sequence[Any]]:
    """The images, with a progress bar that follows their reading."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(name, total=len(images))
        yield _Watched(images, lambda n: progress.update(task, completed=n))


def _ask(
    metric: Any, images: Sequence[Any], prompts: list[Any], clusters: list[Any], scores: Path, about: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metric's answer, and what it says of each image if it judges them one by one."""
    if hasattr(metric, "measure") and hasattr(metric, "settings"):
        rows = measure(metric, images, prompts, scores, about)
        return metric.summary(rows, clusters), rows
    return metric(images, prompts, clusters), []


def extremes(images: Sequence[tuple[str, Mapping[str, Any]]], scores: Sequence[float]) -> dict[str, Any]:
    """The images with the highest and the lowest scores, from either end, none of them twice.

    Args:
        images: name and record of each.
        scores: of each.

    Returns:
        ``{"best": [{"filename", "prompt", "score"}, ...], "worst": [...]}``, up to `EXTREMES` each.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    count = min(EXTREMES, len(order) // 2)

    def tell(i: int) -> dict[str, Any]:
        name, record = images[i]
        return {"filename": name, "prompt": (record.get("metadata") or {}).get("prompt"), "score": scores[i]}

    return {"best": [tell(i) for i in order[:count]], "worst": [tell(i) for i in order[::-1][:count]]}


def _settings_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    figures = [answer, *answer.get("several", {}).values()]
    return next((dict(f["settings"]) for f in figures if "settings" in f), {})


def _take(results: dict[str, Any], name: str, split: str, answer: dict[str, Any]) -> None:
    if split == HELD_OUT:
        results["held_out"] = answer["overall"]["mean"]
        results["figures"]["held_out"] = {k: answer[k] for k in ("overall", "tasks")}
    elif "tasks" in answer:
        if "tasks" in results:
            raise ValueError(f"metric: {name} and another both judge GenEval's tasks; ask for one of them at a time")
        extra = {k: answer[k] for k in ("shares", "settings") if k in answer}
        results["overall"] = answer["overall"]["mean"]
        results["tasks"] = {task: figure["mean"] for task, figure in answer["tasks"].items()}
        results["figures"] |= {"overall": answer["overall"] | extra, "tasks": answer["tasks"]}
        _lead(results, name, answer["overall"])
    else:
        for key, figure in answer.get("several", {name: answer}).items():
            results[key] = figure["mean"]
            results["figures"][key] = figure
            _lead(results, key, figure)


def _lead(results: dict[str, Any], name: str, figure: Mapping[str, Any]) -> None:
    """The first metric asked for stands at the top."""
    if "metric" not in results:
        results |= {"metric": name, "value": figure["mean"], "interval": figure["interval"], "n": figure["n"]}


def _verdict_line(path: Path, record: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "filename": str(path),
        "tag": verdict["task"],
        "prompt": verdict["prompt"],
        "correct": verdict["correct"],
        "reason": verdict["reason"],
        "metadata": record["metadata"],
        "split": record["split"],
        "seed": record.get("seed"),
    }


def _shared_settings(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = {"prompt", "seed", "pixels", "split", "entry", "sample", "metadata"}
    settings: dict[str, Any] = {}
    for key in sorted({k for r in records for k in r} - own):
        values = {to_json(r.get(key)): r.get(key) for r in records}
        settings[key] = next(iter(values.values())) if len(values) == 1 else [values[k] for k in sorted(values)]
    return settings
