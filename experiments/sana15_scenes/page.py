"""The plots of results.json and a page with the table."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import chain
import matplotlib

from sana.run.records import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"small": "#6b7280", "deep": "#4269d0", "grown": "#c2410c"}
NAMES = {
    "small": f"small, {chain.SMALL} blocks from scratch",
    "deep": f"deep, {chain.DEEP} blocks from scratch",
    "grown": f"grown, {chain.SMALL} to {chain.DEEP} blocks",
}
SHARE = "share of images right"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .9em;text-align:left;border-bottom:1px solid #ddd}
img{max-width:100%}"""


def draw_growth(curves: dict[str, Any], homes: list[Path], path: Path) -> None:
    """Scores against updates, and how far each block of the first seed's grown network moves its tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), dpi=130, layout="constrained")
    for name, several in curves.items():
        for i, one in enumerate(several):
            steps, values = zip(*one, strict=True)
            left.plot(
                steps, values, "o-", color=COLOURS[name], alpha=0.75, markersize=3, label=None if i else NAMES[name]
            )
    left.set(xlabel="updates of 64 images (the grown network's own)", ylabel=SHARE, ylim=(0, 1))
    left.legend(frameon=False, fontsize=9)
    rows = [row for row in read_metrics(homes[0] / "grown" / "metrics.jsonl") if "importance/block_00" in row]
    steps = [row["step"] for row in rows]
    for block in range(chain.DEEP):
        new = block >= chain.SMALL
        values = [row[f"importance/block_{block:02d}"] for row in rows]
        color = plt.get_cmap("plasma" if new else "viridis")(0.15 + 0.7 * (block % chain.SMALL) / chain.SMALL)
        label = f"{block} (new)" if new else str(block)
        right.plot(steps, values, "o--" if new else "-", color=color, markersize=3, label=label)
    right.set_yscale("symlog", linthresh=1e-3)
    right.set(xlabel="updates after growing", ylabel="importance of the block, 1 - cosine", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8, ncol=2, title="block")
    finish(figure, (left, right), path)


def draw_prune(prune: dict[str, Any], grown: float, path: Path) -> None:
    """Score of each arm over the seeds."""
    figure, axes = plt.subplots(figsize=(5.6, 4), dpi=130, layout="constrained")
    for i, arm in enumerate(chain.ARMS):
        axes.bar(i, prune[arm]["mean"], color="#4269d0", alpha=0.45, width=0.6)
        axes.plot([i] * len(prune[arm]["seeds"]), prune[arm]["seeds"], "o", color="#111", markersize=4)
    axes.axhline(grown, color=COLOURS["grown"], linewidth=1.2, label=f"{chain.DEEP} blocks, before pruning")
    labels = {"importance": "least\nimportant", "last": "last", "random": "at random"}
    axes.set_xticks(range(len(chain.ARMS)), [labels[arm] for arm in chain.ARMS])
    axes.set(xlabel=f"which {chain.DEEP - chain.PRUNED} of {chain.DEEP} blocks went", ylabel=SHARE, ylim=(0, 1))
    axes.legend(frameon=False, fontsize=9)
    finish(figure, (axes,), path)


def draw_best_of(content: dict[str, Any], path: Path) -> None:
    """Quality against n by judge, with bands over the seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    lines = {"the oracle": (content["best_of_n"], "#c26b00")}
    for judge, color in zip(chain.JUDGES, ("#4269d0", "#3a8a5f"), strict=True):
        related = content["judge_correlation"][judge]["mean"]
        lines[f"{judge} (rank correlation {related:.2f})"] = (content["best_of_n_judged"][judge], color)
    for label, (points, color) in lines.items():
        ns = [int(n) for n in points]
        low, high = zip(*(points[n]["interval"] for n in points), strict=True)
        axes.fill_between(ns, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(ns, [points[n]["mean"] for n in points], "o-", color=color, markersize=4, label=f"chosen by {label}")
    axes.axhline(content["best_of_n"]["1"]["mean"], color="#6b7280", linestyle=":", linewidth=1.2, label="not chosen")
    axes.set_xscale("log", base=2)
    ns = [int(n) for n in content["best_of_n"]]
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.minorticks_off()
    axes.set(xlabel="best of n", ylabel=SHARE)
    axes.legend(frameon=False, fontsize=9)
    finish(figure, (axes,), path)


def finish(figure: Any, all_axes: Any, path: Path) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.25)
    figure.savefig(path)
    plt.close(figure)


def row(name: str, figure: dict[str, Any]) -> str:
    """One line of the table."""
    seeds = ", ".join("never" if v is None else f"{v:.3f}" for v in figure["seeds"])
    mean = interval = "not of every seed"
    if figure["mean"] is not None:
        mean, interval = f"{figure['mean']:.3f}", "{:.3f} to {:.3f}".format(*figure["interval"])
    return f"<tr><td>{html.escape(name)}</td><td>{mean}</td><td>{interval}</td><td>{seeds}</td></tr>"


def write(content: dict[str, Any], homes: list[Path], folder: Path) -> None:
    """growth.png, prune.png, best_of_n.png and page.html."""
    draw_growth(content["curves"], homes, folder / "growth.png")
    draw_prune(content["prune"], content["scores"]["grown"]["mean"], folder / "prune.png")
    draw_best_of(content, folder / "best_of_n.png")
    steps = content["steps"]
    rows = [row(f"{NAMES[name]}, {steps[name]} updates", content["scores"][name]) for name in NAMES]
    rows.append(
        row(
            "updates of the grown network to the deep one's score, over the deep one's",
            content["growth_steps_ratio"],
        )
    )
    what = {"importance": "the least important", "last": "the last", "random": "random"}
    rows += [
        row(f"{chain.PRUNED} blocks, {what[arm]} removed, {steps['recovery']} updates", content["prune"][arm])
        for arm in chain.ARMS
    ]
    rows += [row(f"best of {n}, chosen by the oracle", figure) for n, figure in content["best_of_n"].items()]
    for judge in chain.JUDGES:
        rows += [
            row(f"best of {n}, chosen by {judge}", figure) for n, figure in content["best_of_n_judged"][judge].items()
        ]
        rows.append(row(f"rank correlation of {judge} with the oracle", content["judge_correlation"][judge]))
    pictures = {
        "growth.png": "Left: scores while training. Right: what each block of the grown network does, seed 0.",
        "prune.png": "What pruning leaves after the same recovery; points are seeds.",
        "best_of_n.png": "What choosing gains, by who chooses.",
    }
    shown = "".join(
        f'<h2>{html.escape(text)}</h2><img src="{name}" alt="{html.escape(text)}">' for name, text in pictures.items()
    )
    head = "<tr><th></th><th>mean</th><th>95 % interval over seeds</th><th>seeds</th></tr>"
    (folder / "page.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>SANA-1.5 on scenes</title><style>{STYLE}</style>"
        f"<h1>SANA-1.5 on scenes: grow, prune, choose</h1><table>{head}{''.join(rows)}</table>{shown}\n"
    )
