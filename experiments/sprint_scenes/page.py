"""The grids of teacher and student, the plots of results.json, and a page with the tables."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from sana.run.records import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLUMNS = {"teacher": "teacher, 20 steps", "student_1": "one step", "student_2": "two steps", "student_4": "four steps"}
ARMS = {"scm": "consistency alone", "ladd": "adversarial alone", "both": "both"}
SHOWN = 4  # prompts of each task
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .9em;text-align:left;border-bottom:1px solid #ddd}
img{max-width:100%}"""


def draw_grids(judged: Path, path: Path) -> None:
    """The first prompts of each task, by teacher and student from the same noise; a right image has a green frame."""
    found = {name: verdicts(judged / name) for name in COLUMNS}
    rows = [i for task in TASKS for i in [k for k, line in enumerate(found["teacher"]) if line["tag"] == task][:SHOWN]]
    half = (len(rows) + 1) // 2
    figure, axes = plt.subplots(half, 2 * len(COLUMNS), figsize=(15, 1.95 * half), dpi=75, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for place, i in enumerate(rows):
        for column, (name, title) in enumerate(COLUMNS.items()):
            line = found[name][i]
            axis = axes[place % half, column + len(COLUMNS) * (place // half)]
            with Image.open(judged / name / line["filename"]) as image:
                axis.imshow(np.asarray(image))
            for side in axis.spines.values():
                side.set(color="#2f9e44" if line["correct"] else "#e03131", linewidth=2.5)
            text = line["prompt"] if column == 0 else ""
            axis.set_title((title + "\n" if place % half == 0 else "") + text, fontsize=8, loc="left")
    figure.savefig(path)
    plt.close(figure)


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """One line per image, in the order of the files."""
    lines = [json.loads(line) for line in (folder / "results.verdicts.jsonl").read_text().splitlines()]
    return sorted((line for line in lines if line["split"] != "held_out"), key=lambda line: line["filename"])


def draw_training(run: Path, curve: list[tuple[int, float]], path: Path) -> None:
    """The terms of the losses, what the discriminator says, and the score of one step."""
    rows = read_metrics(run / "metrics.jsonl")
    figure, (left, right, last) = plt.subplots(1, 3, figsize=(15, 3.8), dpi=100, layout="constrained")
    last.plot(*zip(*curve, strict=True), "o-", color="#4269d0")
    last.set(xlabel="updates of the student", ylabel="share right in one step", ylim=(0, 1))
    last.grid(alpha=0.25)
    for axis, names in (
        (left, {"train/scm": "consistency", "train/grad_norm": "norm of the gradient"}),
        (right, {f"train/discriminator/{name}": name for name in ("real", "fake", "mismatch")}),
    ):
        for name, label in names.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.1)
        axis.set(xlabel="updates of the student")
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.25)
    left.set(ylabel="loss, norm", yscale="log")
    right.set(ylabel="mean logit")
    figure.savefig(path)
    plt.close(figure)


def draw_ablations(arms: dict[str, Any], path: Path) -> None:
    """Scores of the arms, one and four steps, with every seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained", sharey=True)
    for axis, title, part in ((axes[0], "one step", None), (axes[1], "four steps", "four_steps")):
        for i, arm in enumerate(ARMS):
            figures = arms[arm] if part is None else arms[arm][part]
            axis.bar(i, figures["mean"], color="#4269d0", alpha=0.45, width=0.6)
            axis.plot([i] * len(figures["seeds"]), figures["seeds"], "o", color="#111", markersize=4)
            axis.set_xticks(range(len(ARMS)), list(ARMS.values()))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25, axis="y")
    axes[0].set(ylabel="share of images right", ylim=(0, 1))
    figure.savefig(path)
    plt.close(figure)


def cells(*values: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"


def shown(figure: dict[str, Any]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(figure["mean"], *figure["interval"])


def write(content: dict[str, Any], runs: Path, folder: Path) -> None:
    """grids.png, training.png, ablations.png and page.html."""
    draw_grids(runs / "judged", folder / "grids.png")
    draw_training(runs / "student", content["curve"], folder / "training.png")
    draw_ablations(content["ablations"], folder / "ablations.png")
    rows = [cells("teacher, 20 steps", shown(content["teacher_overall"]), "1")]
    rows += [
        cells(f"student, {n}", shown(content["overall"][n]), shown(content["ratio"][n])) for n in content["overall"]
    ]
    tasks = [
        cells(name, *(f"{value:.3f}" for value in content["tasks"][name].values())) for name in TASKS
    ]  # the teacher, then the student by steps
    arms = [
        cells(label, shown(content["ablations"][arm]), shown(content["ablations"][arm]["four_steps"]),
              ", ".join(map(str, content["ablations"][arm]["updates"])))
        for arm, label in ARMS.items()
    ]  # fmt: skip
    pictures = {
        "grids.png": "The same noise and prompts; green: right, red: wrong.",
        "training.png": "The student's training.",
        "ablations.png": "Four minutes of one core each; points are seeds.",
    }
    figures = "".join(f'<h2>{html.escape(text)}</h2><img src="{name}" alt="">' for name, text in pictures.items())
    table = "<table><tr><th>{}</th></tr>{}</table>"
    (folder / "page.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>SANA-Sprint on scenes</title><style>{STYLE}</style>"
        "<h1>SANA-Sprint on scenes</h1>"
        + table.format("</th><th>".join(("", "share right", "of the teacher's")), "".join(rows))
        + "<h2>By task</h2>"
        + table.format("</th><th>".join(("", "teacher", "one step", "two steps", "four steps")), "".join(tasks))
        + "<h2>What each loss is worth</h2>"
        + table.format("</th><th>".join(("", "one step", "four steps", "updates")), "".join(arms))
        + figures
        + "\n"
    )
