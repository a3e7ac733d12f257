"""DPG-Bench's scoring on graphs worked out by hand, with a model that answers from a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sana.metric.dpg import DPG, Question, crops, in_order, read_questions, score

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def graph(**parents: tuple[int, ...]) -> dict[int, Question]:
    return {int(k[1:]): Question(k, p, "entity") for k, p in parents.items()}


@pytest.mark.parametrize(
    ("questions", "right", "expected"),
    [
        (graph(q1=(), q2=(1,), q3=(1,)), {1: True, 2: True, 3: False}, 2 / 3),
        (graph(q1=(), q2=(1,), q3=(1,)), {1: False, 2: True, 3: True}, 0),  # children of a "no" are "no"
        (graph(q1=(), q2=(1,), q3=(2,)), {1: False, 2: True, 3: True}, 0),  # and theirs
        (graph(q1=(), q2=(), q3=(1, 2)), {1: True, 2: False, 3: True}, 1 / 3),  # any parent
        (graph(q1=(2,), q2=(3,), q3=()), {1: True, 2: True, 3: False}, 0),  # children before their parents
        (graph(q1=(2,), q2=(), q3=()), {1: False, 2: True, 3: True}, 2 / 3),  # a "no" leaves its parents alone
        (graph(q1=()), {1: True}, 1),
    ],
)
def test_zeros_pass_down_the_graph(questions, right, expected):
    assert score(questions, right) == pytest.approx(expected)


def test_order_is_parents_first():
    order = in_order(graph(q1=(4,), q2=(1, 3), q3=(), q4=(3,)))
    assert [order.index(n) for n in (3, 4, 1, 2)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="in a circle"):
        in_order(graph(q1=(2,), q2=(1,)))


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


ROWS = (
    'a,a red car,,1,0,entity,whole,entity - whole (car),Is there a car?',
    'a,a red car,,2,1,attribute,color,"attribute - color (car, red)",Is the car red?',
    'b,"a dog, a cat",,1,0,entity,whole,entity - whole (dog),Is there a dog?',
    'b,"a dog, a cat",,2,0,entity,whole,entity - whole (cat),Is there a cat?',
    'b,"a dog, a cat",,3,"1,2",relation,spatial,"relation - spatial (dog, cat)",Is the dog by the cat?',
)  # fmt: skip


def test_file_is_read_whole(tmp_path):
    items = read_questions(write(tmp_path / "q.csv", *ROWS))
    assert {k: (t, len(q)) for k, (t, q) in items.items()} == {"a": ("a red car", 2), "b": ("a dog, a cat", 3)}
    assert items["a"][1][1].text == "Is there a car?", "the published loader drops the first question"
    assert items["b"][1][3] == Question("Is the dog by the cat?", (1, 2), "relation")
    for rows, message in (
        ((ROWS[0], ROWS[0]), "comes twice"),
        ((ROWS[1],), "has no question 1"),
        ((ROWS[0].replace(",1,0,", ",1,x,"),), "expected numbers"),
        ((), "has no questions"),
    ):
        with pytest.raises(ValueError, match=message):
            read_questions(write(tmp_path / "bad.csv", *rows))
    (tmp_path / "bad.csv").write_text("item_id,text\n")
    with pytest.raises(ValueError, match="has no column proposition_id"):
        read_questions(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        read_questions(tmp_path / "none.csv")


class Listed:
    """Answers by the grey of the image: bit n of it for question n."""

    settings = {"answerer": "list"}  # noqa: RUF012

    def __call__(self, image, questions):
        assert (image == image[0, 0, 0]).all()
        return ["yes" if image[0, 0, 0] >> n & 1 else "no" for n in range(len(questions))]


def grey(value: int, side: int = 6) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_four_crops_are_averaged(tmp_path):
    metric = DPG(write(tmp_path / "q.csv", *ROWS), Listed(), side=6, resamples=50)
    grid = np.concatenate([np.concatenate([grey(0b11), grey(0b01)], 1), np.concatenate([grey(0b10), grey(0)], 1)])
    figure = metric([grid], [{"prompt": "a  red car"}])
    assert figure["mean"] == pytest.approx(100 * np.mean([1, 0.5, 0, 0]))
    assert figure["categories"] == pytest.approx({"entity": 50, "attribute": 50}), "before parents count"
    assert [c[0, 0, 0] for c in crops(grid, 6)] == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="does not hold four images of 7"):
        crops(grid, 7)


def test_total_is_the_mean_over_images(tmp_path):
    metric = DPG(write(tmp_path / "q.csv", *ROWS), Listed(), resamples=50)
    lines = [{"prompt": "a red car"}, {"prompt": "", "item_id": "b"}, {"prompt": "a dog, a cat"}]
    figure = metric([grey(0b01), grey(0b111), grey(0b110)], lines)
    assert figure["mean"] == pytest.approx(100 * np.mean([0.5, 1, 1 / 3]))
    assert figure["n"] == 3
    with pytest.raises(ValueError, match="no questions for 'a boat'"):
        metric([grey(0)], [{"prompt": "a boat"}])
