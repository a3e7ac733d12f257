"""Evaluation: draw images into a folder, score the folder, write results.json, table and report.

Drawing and scoring meet only in the folder, so either can be done elsewhere. The folder has GenEval's layout
(`<split>/00012/samples/00000.png` and `<split>/00012/metadata.jsonl`, one number per prompt) with a JSON
sidecar beside each image. Drawing resumes: an image that is there is kept, image n of a prompt always has the
same seed, and batches are cut the same way every time, so an interrupted evaluation ends with the pixels of
one that was not. Several ranks share the batches.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sana.metric.ranks import barrier, rank, world
from sana.model.found import HELD_OUT, MAIN, MANIFEST, Lines
from sana.model.score import Metric, score_folder
from sana.run.environment import describe_git, peak_rss_gib
from sana.run.records import to_json, write_atomically
from sana.run.report import make_report
from sana.run.results import read_results, results_table, training_facts, write_results
from sana.run.sidecar import REQUIRED, read_sidecar, save_image

ImagesFn = Callable[[list[str], list[int]], NDArray[np.uint8]]
"""Prompts and seeds (n each) -> uint8 images (n, H, W, 3)."""


@dataclass(frozen=True)
class Job:
    """One image to draw: line `entry` of split `split`, image `sample` of it."""

    path: Path
    split: str
    entry: int
    sample: int
    line: Mapping[str, Any]
    seed: int


def image_seed(seed: int, prompt: str, repeat: int, sample: int) -> int:
    """Seed of an image in [0, 2^48), from what it is and not from its place in a list.

    Args:
        seed: of the evaluation.
        prompt: what is drawn.
        repeat: how often the prompt occurred earlier in its list.
        sample: which image of the prompt.
    """
    digest = hashlib.sha256(f"{seed}/{repeat}/{sample}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def draw_folder(
    folder: str | Path,
    images_fn: ImagesFn,
    prompts: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    held_out: Sequence[Mapping[str, Any]] = (),
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    console: Console | None = None,
) -> float:
    """Draw every image of the prompts that the folder does not have yet.

    Args:
        folder: where; made if missing. An interrupted drawing with the same settings is continued.
        images_fn: draws a batch.
        prompts: lines of GenEval's metadata ("tag", "include", "prompt", ...).
        settings: what the images depend on and each sidecar says: at least sampler, steps, guidance,
            checkpoint and commit.
        held_out: lines that are scored apart.
        samples: images per line.
        seed: of the evaluation; see `image_seed`.
        batch_size: images per call of `images_fn`.
        console: where a progress bar goes; None for none.

    Returns:
        Seconds spent drawing this folder, over all attempts.

    Raises:
        ValueError: the folder was drawn with other settings or prompts; a setting is missing; nothing to
            draw; images of a wrong shape.
    """
    folder = Path(folder)
    missing = [key for key in REQUIRED if key not in ("prompt", "seed") and key not in settings]
    if missing:
        raise ValueError(f"evaluate: settings lack {', '.join(missing)}, which the images depend on")
    jobs = _jobs(folder, {MAIN: prompts, HELD_OUT: held_out}, samples, seed)
    if not jobs or batch_size < 1:
        raise ValueError(f"evaluate: {len(jobs)} images in batches of {batch_size}: nothing to draw")
    manifest = _open_manifest(folder, jobs, {**settings, "seed": seed, "samples": samples, "batch_size": batch_size})
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("drawing", total=len(jobs))
        for number, start in enumerate(range(0, len(jobs), batch_size)):
            batch = jobs[start : start + batch_size]
            if number % world() != rank():
                progress.update(task, advance=len(batch))
                continue
            wanted = [i for i, job in enumerate(batch) if read_sidecar(job.path) is None or not job.path.exists()]
            if wanted:
                # The whole batch is drawn even where a part of it exists: rounding depends on the batch.
                clock = time.monotonic()
                images = np.asarray(images_fn([j.line["prompt"] for j in batch], [j.seed for j in batch]))
                if images.shape[:1] != (len(batch),):
                    raise ValueError(f"evaluate: asked for {len(batch)} images, got shape {images.shape}")
                for i in wanted:
                    _save(batch[i], images[i], settings)
                manifest["seconds"] += time.monotonic() - clock
                if rank() == 0:
                    write_atomically(folder / MANIFEST, to_json(manifest, indent=2) + "\n")
            progress.update(task, advance=len(batch))
    barrier()
    return float(manifest["seconds"])


def _jobs(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], samples: int, seed: int) -> list[Job]:
    jobs = []
    for split, lines in splits.items():
        seen: Counter[str] = Counter()
        for entry, line in enumerate(lines):
            prompt = line["prompt"]
            for sample in range(samples):
                path = folder / split / f"{entry:05d}" / "samples" / f"{sample:05d}.png"
                jobs.append(Job(path, split, entry, sample, line, image_seed(seed, prompt, seen[prompt], sample)))
            seen[prompt] += 1
    return jobs


def _open_manifest(folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Begin or continue the folder's record, or refuse to mix two evaluations in one folder."""
    names = "\n".join(f"{j.split} {j.entry} {j.seed} {json.dumps(dict(j.line), sort_keys=True)}" for j in jobs)
    wanted = {
        "images": len(jobs),
        "prompts": hashlib.sha256(names.encode()).hexdigest()[:16],
        "settings": json.loads(to_json(settings)),
    }
    known = read_results(folder / MANIFEST)
    stray = known is None and any(folder.glob("**/*.png"))
    barrier()  # all ranks have looked before the first writes
    if known is None:
        if stray:
            raise ValueError(f"evaluate: {folder} holds images of unknown origin; give an empty folder to draw into")
        folder.mkdir(parents=True, exist_ok=True)
        known = {**wanted, "seconds": 0.0}
        if rank() == 0:
            write_atomically(folder / MANIFEST, to_json(known, indent=2) + "\n")
    before, now = ({k: v for k, v in {**d, **d["settings"]}.items() if k != "settings"} for d in (known, wanted))
    differing = [k for k in now if k not in ("commit", "seconds") and before.get(k) != now[k]]
    if differing:
        k = differing[0]
        raise ValueError(
            f"evaluate: {folder} was drawn with {k} = {before.get(k)!r}, now it is {now[k]!r}; "
            "give another folder, or delete this one"
        )
    return known


def _save(job: Job, image: NDArray[np.uint8], settings: Mapping[str, Any]) -> None:
    home = job.path.parent.parent
    home.mkdir(parents=True, exist_ok=True)
    (home / "metadata.jsonl").write_text(json.dumps(dict(job.line)) + "\n", encoding="utf-8")
    place = {"split": job.split, "entry": job.entry, "sample": job.sample, "metadata": dict(job.line)}
    save_image(job.path, image, {"prompt": job.line["prompt"], "seed": job.seed, **settings, **place})


def evaluate(
    folder: str | Path,
    metrics: Mapping[str, Metric],
    *,
    run_dir: str | Path | None = None,
    output: str | Path | None = None,
    commit: str | None = None,
    training: Mapping[str, Any] | None = None,
    drawing: Mapping[str, Any] | None = None,
    lines: Lines | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw (unless done elsewhere), score, and write results.json and the report.

    Args:
        folder: of the images.
        metrics: see `score_folder`.
        run_dir: of the run whose checkpoint drew the images; its records give steps, seconds and memory of
            training, and the report is made in it. None: the report is made in `folder`.
        output: the results file; the report, the verdicts and the journals of scoring then stand beside it under its
            name. None: ``results.json`` beside ``report.html``, verdicts and journals in `folder`.
        commit: of the code that evaluates; None: as the repository says.
        training: facts that are better known than from the records, such as {"steps": updates of the checkpoint}.
        drawing: arguments of `draw_folder` without `folder` and `console`. None: the folder is complete.
        lines: prompts of images made elsewhere; see `sana.model.found.find_images`.
        console: for progress and the table; None for silence.

    Returns:
        What results.json holds.

    Raises:
        ValueError: see `draw_folder` and `score_folder`.
    """
    folder = Path(folder)
    home = folder if run_dir is None else Path(run_dir)
    named = None if output is None else Path(output)
    report = home / "report.html" if named is None else named.with_suffix(".html")
    beside = None if named is None else named.with_suffix("")
    output = home / "results.json" if named is None else named
    parts: dict[str, float | None] = {}
    if drawing is not None:
        draw_folder(folder, console=console, **drawing)
    clock = time.monotonic()
    facts, changes = describe_git()
    # Scores of other code are not taken over, be it committed or not.
    code = [(facts or {}).get("commit"), hashlib.sha256(changes.encode()).hexdigest()[:16]]
    results = score_folder(folder, metrics, lines=lines, beside=beside, about=code, console=console)
    parts["scoring"] = time.monotonic() - clock
    manifest = read_results(folder / MANIFEST) or {}
    trained = ({} if run_dir is None else training_facts(run_dir)) | dict(training or {})
    parts |= {"training": trained.get("seconds"), "drawing": manifest.get("seconds")}
    results["settings"] = manifest.get("settings", {}) | results["settings"]
    results |= {
        "steps": trained.get("steps"),
        "seconds": sum(s for s in parts.values() if s is not None),
        "seconds_by_part": parts,
        "peak_rss_gib": max(trained.get("peak_rss_gib") or 0.0, peak_rss_gib()),
        "commit": commit or code[0],
    }
    results["files"] |= {"results": str(output.resolve()), "report": str(report.resolve())}
    if rank() == 0:
        write_results(output, results)
        make_report(home if home.is_dir() else folder, results, report)  # a shipped model has no run here
    if console is not None:
        console.print(results_table(results))
    return results
