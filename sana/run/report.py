"""One self-contained HTML page about a run: what it drew, how it learned, how right it is, and with which
settings.

The page opens offline: style, script, charts and pictures are inside it. It can be made at any time, also of
a run that failed, is still running or was never evaluated, and shows what there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from sana.run.report_charts import clip_path, smooth
from sana.run.report_curves import curves
from sana.run.report_page import page
from sana.run.report_pictures import examples, extremes, grid_over_training
from sana.run.report_read import Run, read_run
from sana.run.results import read_results
from sana.run.sidecar import replace_bytes

STATES = {"finished": "good", "running": "warn", "interrupted": "warn", "preempted": "warn"}  # others are bad
FACT_FILES = {
    "results.json": "the numbers of this page",
    "config.yaml": "every setting, resolved",
    "overrides.yaml": "what the command line said",
    "environment.json": "commit, versions, hardware, data",
    "diff.patch": "changes that were not committed",
    "metrics.jsonl": "all curves, one row per line",
    "status.json": "how it ended",
    "samples": "sample grids over training",
    "checkpoints": "weights",
}


def make_report(run_dir: str | Path, results: Mapping[str, Any] | None = None, path: str | Path | None = None) -> Path:
    """Write ``report.html`` into a run's directory.

    Args:
        run_dir: the directory; any of its records may be missing.
        results: as `sana.model.evaluate.evaluate` gives them. None: those of results.json if there is one.
        path: of the page, where it is not to be in the directory.

    Returns:
        The path of the page.

    Raises:
        ValueError: `run_dir` is not a directory.
    """
    given = dict(results) if results is not None else read_results(Path(run_dir) / "results.json")
    run = read_run(run_dir, given)
    results = given or {}
    figures: dict[str, Any] = results.get("figures") or {}
    name = f"{run.path.resolve().parent.name}/{run.path.resolve().name}"
    sections = [
        ("samples", "What it draws", _samples(run)),
        ("curves", "How it learned", curves(run.series)),
        ("accuracy", "What it gets right", _accuracy(run, figures)),
        ("extremes", "Highest and lowest scores", _extremes(results)),
        ("settings", "Settings", _settings(run, results)),
        ("files", "Where everything lies", _files(run, results)),
    ]
    footer = "Made by SANA Lab from the run's own records; this page fetches nothing."
    html = page(
        f"{name} · SANA Lab", _header(run, name), clip_path() + _verdict(run, results, figures), sections, footer
    )
    path = run.path / "report.html" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, html.encode())
    return path


def duration(seconds: float | None) -> str:
    """ "1 h 02 min", "3 min 20 s", "12.3 s"; "unknown" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- header -----------------------------------------------------------------------------------------


def _header(run: Run, name: str) -> str:
    summary, hardware = run.summary, run.environment.get("hardware") or {}
    state = str(summary.get("status") or "unknown")
    facts = [
        str(summary.get("started") or "").replace("T", " ").removesuffix("+00:00"),
        f"commit {summary['commit'][:10]}{' and changes' if summary.get('dirty') else ''}"
        if summary.get("commit")
        else "",
        ", ".join(str(gpu) for gpu in summary.get("gpus") or []) or str(hardware.get("cpu") or ""),
    ]
    meta = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    pill = f'<span class="pill {STATES.get(state, "bad")}">{escape(state)}</span>' if state != "unknown" else ""
    banner = ""
    if summary.get("reason"):
        trace = (
            f"<details><summary>Traceback</summary><pre>{escape(run.details)}</pre></details>" if run.details else ""
        )
        banner = f'<div class="card banner" role="alert"><p>{escape(str(summary["reason"]))}</p>{trace}</div>'
    return f'<h1>{escape(name)}</h1><div class="meta">{pill}{meta}</div>{banner}'


def _verdict(run: Run, results: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    return _hero(figures) + _tiles(run, results, figures)


def _hero(figures: Mapping[str, Any]) -> str:
    overall = figures.get("overall")
    if not overall:
        return ""
    bars = "".join(
        f"<span>{_title(task)}</span>{_bar(figure)}<b>{_percent(figure['mean'])}</b>"
        for task, figure in figures.get("tasks", {}).items()
    )
    return (
        f'<div class="hero"><div class="card"><div class="big">{100 * overall["mean"]:.1f}<small> %</small></div>'
        f'<p class="label">overall accuracy, the mean of {len(figures.get("tasks", {}))} task means<br>'
        f"{_interval(overall)} with {100 * overall.get('level', 0.95):.0f} % confidence, "
        f'{overall["n"]:,} images</p></div><div class="card bars">{bars}</div></div>'
    )


def _tiles(run: Run, results: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    held_out = figures.get("held_out")
    if held_out:
        tiles.append((_percent(held_out["overall"]["mean"]), "on held-out combinations"))
    for key, figure in figures.items():
        if key not in ("overall", "tasks", "held_out"):
            tiles.append((f"{figure['mean']:.3g}", f"{key}, lower is better" if key.startswith("fid") else key))
    steps = results.get("steps") or run.summary.get("step")
    loss = run.series.get("train/loss")
    rate = run.series.get("train/samples_per_s")
    memory = results.get("peak_rss_gib")
    if steps is not None:
        tiles.append((f"{steps:,}", "updates"))
    if loss and not figures:
        tiles.append((f"{smooth(loss[1], max(10, len(loss[1]) // 40))[-1]:.4g}", "training loss, smoothed"))
    if run.summary.get("seconds"):
        tiles.append((duration(run.summary["seconds"]), "training"))
    if rate:
        tiles.append((f"{sorted(rate[1])[len(rate[1]) // 2]:,.0f}", "images per second, median"))
    if memory:
        tiles.append((f"{memory:.2f} GiB", "peak memory"))
    html = "".join(
        f'<div class="card tile"><b>{escape(v)}</b><span class="label">{escape(k)}</span></div>' for v, k in tiles
    )
    return f'<div class="tiles">{html}</div>' if html else ""


def _bar(figure: Mapping[str, Any]) -> str:
    mean, (low, high) = 100 * figure["mean"], (100 * v for v in figure["interval"])
    whisker = 'class="whisker" vector-effect="non-scaling-stroke"'
    return (
        '<svg class="bar" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="ground" width="100" height="16"/><rect class="fill" width="{mean:.2f}" height="16"/>'
        f'<path {whisker} d="M{low:.2f} 8H{high:.2f}M{low:.2f} 4V12M{high:.2f} 4V12"/></svg>'
    )


# --- sections ---------------------------------------------------------------------------------------


def _samples(run: Run) -> str:
    grid = grid_over_training(run.frames)
    lead = "The same prompts and the same noise at every row; the only thing that changes is the network."
    return f'<p class="lead">{lead}</p>{grid}' if grid else ""


def _accuracy(run: Run, figures: Mapping[str, Any]) -> str:
    tasks, held_out = figures.get("tasks") or {}, figures.get("held_out") or {}
    if not tasks:
        return ""
    rows = [_row(_title(task), figure) for task, figure in tasks.items()]
    if "overall" in figures:
        rows.append(_row("Overall", figures["overall"], "sum"))
    for task, figure in held_out.get("tasks", {}).items():
        rows.append(_row(f"Held out: {_title(task).lower()}", figure))
    if held_out:
        rows.append(_row("Held out", held_out["overall"], "sum"))
    head = "".join(
        f'<th scope="col"{attributes}>{name}</th>'
        for name, attributes in (
            ("Task", ""),
            ("Bar and interval", ""),
            ("Right", ' class="n"'),
            ("95 % interval", ' class="n"'),
            ("Images", ' class="n"'),
            ("What went wrong", ""),
        )
    )
    lead = "Every image is judged by an exact scorer: right only if it shows just what the prompt says."
    titles = {f"prompts/{task}": _title(task) for task in tasks}
    titles |= {f"held_out/{task}": f"Held out: {_title(task).lower()}" for task in held_out.get("tasks", {})}
    shots = examples(run.verdicts, titles)
    held = (
        " Held-out rows ask for combinations of colour, shape and relation that training never showed."
        if held_out
        else ""
    )
    return (
        f'<p class="lead">{lead}{held}</p><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{shots}"
    )


def _extremes(results: Mapping[str, Any]) -> str:
    folder = (results.get("files") or {}).get("images")
    return "".join(extremes(folder, name, ends) for name, ends in (results.get("extremes") or {}).items() if folder)


def _row(title: str, figure: Mapping[str, Any], kind: str = "") -> str:
    reasons = list((figure.get("reasons") or {}).items())
    chips = "".join(f'<span class="chip">{escape(str(r))} <b>{c:,}</b></span>' for r, c in reasons[:3])
    more = sum(c for _, c in reasons[3:])
    chips += f'<span class="chip">other <b>{more:,}</b></span>' if more else ""
    return (
        f'<tr class="{kind}"><th scope="row">{escape(title)}</th><td class="wide">{_bar(figure)}</td>'
        f'<td class="n">{_percent(figure["mean"])}</td><td class="n">{_interval(figure)}</td>'
        f'<td class="n">{figure["n"]:,}</td><td><div class="chips">{chips}</div></td></tr>'
    )


def _settings(run: Run, results: Mapping[str, Any]) -> str:
    html = ""
    if run.summary.get("overrides"):
        chips = "".join(f'<span class="chip"><code>{escape(str(o))}</code></span>' for o in run.summary["overrides"])
        html += f'<h3>Given on the command line</h3><div class="chips">{chips}</div><br>'
    pairs = {k: v for k, v in (results.get("settings") or {}).items() if not isinstance(v, dict)}
    for name, figure in (results.get("figures") or {}).items():
        if isinstance(figure, dict) and "feature_space" in figure:
            pairs[f"{name}: features"] = figure["feature_space"]
            pairs[f"{name}: reference images"] = figure.get("reference_n")
            pairs[f"{name}: two halves of the reference"] = figure.get("reference_halves")
    if pairs:
        html += f"<h3>What the numbers depend on</h3>{_pairs(pairs)}"
    if run.config:
        html += f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    environment = _flat(run.environment)
    if environment:
        html += f"<details><summary>Environment</summary><br>{_pairs(environment)}</details>"
    return f'<div class="card">{html}</div>' if html else ""


def _files(run: Run, results: Mapping[str, Any]) -> str:
    """Absolute places first, then the names of what lies in the run's directory and what each is."""
    files = results.get("files") or {}
    places = {"this run": run.path.resolve(), "newest checkpoint": run.summary.get("checkpoint")}
    places |= {"evaluated images": files.get("images"), "verdicts on them": files.get("verdicts")}
    rows = [(escape(name), f"<code>{escape(str(place))}</code>") for name, place in places.items() if place]
    rows += [(f"<code>{name}</code>", what) for name, what in FACT_FILES.items() if (run.path / name).exists()]
    return f'<div class="card"><dl>{"".join(f"<dt>{name}</dt><dd>{what}</dd>" for name, what in rows)}</dl></div>'


# --- pieces -----------------------------------------------------------------------------------------


def _pairs(pairs: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{rows}</dl>"


def _plain(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _title(key: str) -> str:
    return escape(key.replace("_", " ").replace("attr", "attribution").capitalize())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * low:.1f} to {100 * high:.1f} %"
