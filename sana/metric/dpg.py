"""DPG-Bench (Hu et al. 2024): a graph of yes-no questions about each image, answered by any visual question answering
model; a question whose parent is answered "no" counts as "no".

The published numbers come from mPLUG-large, which no longer runs in a current environment; whatever answers here is
named beside the number. The published scorer drops the first question of the first item and leaves out images that
fail; here every question counts and a missing image is an error. Zeros pass through the whole graph, in topological
order; the published code gets the same where parents stand before their children, as they do in the published file.
"""

from __future__ import annotations

import csv
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sana.metric.bootstrap import mean_interval

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question of an item.

    Attributes:
        text: what is asked.
        parents: numbers of the questions without which it makes no sense.
        category: "entity", "attribute", "relation", "global" or "other".
    """

    text: str
    parents: tuple[int, ...]
    category: str


class Answerer(Protocol):
    """A visual question answering model.

    Attributes:
        settings: which one, for the record.
    """

    settings: dict[str, Any]

    def __call__(self, image: NDArray[np.uint8], questions: Sequence[str], /) -> Sequence[str]:
        """An answer to each question about a uint8 (h, w, 3) image; right is "yes" and nothing else."""
        ...


def read_questions(path: str | Path) -> dict[str, tuple[str, dict[int, Question]]]:
    """The items of DPG-Bench's CSV file: id -> (prompt, questions by number).

    Raises:
        ValueError: a column is missing, a number is none or comes twice, a parent does not exist, or parents form a
            circle; with the item.
    """
    items: dict[str, tuple[str, dict[int, Question]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if lacking:
                raise ValueError(f"dpg: {path} has no column {', '.join(lacking)}")
            for row in reader:
                where = f"dpg: {path}: item {row['item_id']}, question {row['proposition_id']}"
                try:
                    number = int(row["proposition_id"])
                    parents = tuple(int(p) for p in row["dependency"].split(",") if p.strip() and int(p) != 0)
                except ValueError:
                    raise ValueError(f"{where}: depends on {row['dependency']!r}; expected numbers") from None
                questions = items.setdefault(row["item_id"], (row["text"], {}))[1]
                if number in questions:
                    raise ValueError(f"{where}: comes twice")
                category = row["tuple"].split("(")[0].split("-")[0].strip()
                questions[number] = Question(row["question_natural_language"], parents, category)
    except OSError as error:
        raise ValueError(f"dpg: {path} cannot be read ({error.strerror}); it is dpg_bench.csv of ELLA") from None
    if not items:
        raise ValueError(f"dpg: {path} has no questions")
    for name, (_, questions) in items.items():
        missing = [p for q in questions.values() for p in q.parents if p not in questions]
        if missing:
            raise ValueError(f"dpg: {path}: item {name} has no question {missing[0]}, which another depends on")
        in_order(questions, f"dpg: {path}: item {name}")
    return items


def in_order(questions: Mapping[int, Question], where: str = "dpg") -> list[int]:
    """Numbers of the questions, parents first.

    Raises:
        ValueError: parents form a circle.
    """
    try:
        return list(TopologicalSorter({n: q.parents for n, q in questions.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"{where}: the questions {error.args[1]} depend on each other in a circle") from None


def score(questions: Mapping[int, Question], right: Mapping[int, bool]) -> float:
    """Share of questions that are right and whose ancestors are all right."""
    counted: dict[int, bool] = {}
    for number in in_order(questions):
        counted[number] = right[number] and all(counted[p] for p in questions[number].parents)
    return sum(counted.values()) / len(counted)


def crops(image: NDArray[np.uint8], side: int) -> list[NDArray[np.uint8]]:
    """The four images of a 2 x 2 grid, `side` pixels each, from the corners (0, 0), (side, 0), (0, side), (side, side).

    Raises:
        ValueError: the grid is smaller.
    """
    if min(image.shape[:2]) < 2 * side:
        raise ValueError(f"dpg: a grid of {image.shape[:2]} pixels does not hold four images of {side}")
    return [image[y : y + side, x : x + side] for y, x in ((0, 0), (0, side), (side, 0), (side, side))]


class DPG:
    """DPG-Bench as a metric, in percent.

    Args:
        questions: path of the CSV file.
        answerer: see `Answerer`.
        side: pixels of the images in 2 x 2 grids; None: every image is one sample, and those of a prompt are averaged.
        level, resamples, seed: of the bootstrap over prompts.
    """

    needs_prompts = True

    def __init__(
        self,
        questions: str | Path,
        answerer: Answerer,
        side: int | None = None,
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.items = read_questions(questions)
        self.by_prompt = {_plain(text): name for name, (text, _) in self.items.items()}
        self.answerer, self.side = answerer, side
        self.level, self.resamples, self.seed = level, resamples, seed
        self.settings = {**answerer.settings, "items": len(self.items), "side": side}

    def measure(self, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``{"item", "score", "categories": {name: [right, asked]}}`` per image; categories before parents count.

        Raises:
            ValueError: an image whose "item_id" or "prompt" is not in the file.
        """
        rows = []
        for image, line in zip(images, metadata, strict=True):
            item = line.get("item_id") or self.by_prompt.get(_plain(line.get("prompt", "")))
            if item not in self.items:
                raise ValueError(f"dpg: no questions for {str(line.get('prompt'))[:60]!r}")
            questions = self.items[item][1]
            numbers = list(questions)
            scores, categories = [], {}
            for part in [np.asarray(image)] if self.side is None else crops(np.asarray(image), self.side):
                answers = self.answerer(part, [questions[n].text for n in numbers])
                right = {n: answer == "yes" for n, answer in zip(numbers, answers, strict=True)}
                scores.append(score(questions, right))
                for n in numbers:
                    count = categories.setdefault(questions[n].category, [0, 0])
                    count[0] += right[n]
                    count[1] += 1
            rows.append({"item": item, "score": 100 * float(np.mean(scores)), "categories": categories})
        return rows

    def summary(self, rows: Sequence[Mapping[str, Any]], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
        """``{"mean", "interval", "level", "n", "categories", "settings"}``."""
        draw = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        labels = [row["item"] for row in rows] if clusters is None else clusters
        totals: dict[str, list[int]] = {}
        for row in rows:
            for name, (right, asked) in row["categories"].items():
                total = totals.setdefault(name, [0, 0])
                total[0], total[1] = total[0] + right, total[1] + asked
        shares = {name: 100 * right / asked for name, (right, asked) in sorted(totals.items())}
        figure = mean_interval([row["score"] for row in rows], labels, **draw).asdict()
        return figure | {"categories": shares, "settings": self.settings}

    def __call__(
        self,
        images: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]],
        clusters: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        """`summary` of `measure`."""
        return self.summary(self.measure(images, metadata), clusters)


def _plain(text: str) -> str:
    return " ".join(text.split())
