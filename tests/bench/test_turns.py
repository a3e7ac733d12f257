"""Works that take turns: one at a time, the time of each its own, failures told."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from sana.bench.turns import Turns


def test_one_works_at_a_time_and_each_step_is_followed_by_the_others():
    turns, seen = Turns(), []
    parts = {name: SimpleNamespace(step=lambda i, name=name: seen.append((name, i))) for name in "ab"}

    def work(name: str, steps: int, pause: float):
        def run():
            for i in range(steps):
                time.sleep(pause)
                parts[name].step(i)

        return run

    for part in parts.values():
        turns.wrap(part, "step")
    spent = turns.run({"b": work("b", 2, 0.05), "a": work("a", 4, 0.01)})
    assert seen == [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 2), ("a", 3)]
    assert spent.keys() == {"a", "b"}
    assert 0.1 <= spent["b"] < 0.1 + 0.1
    assert 0.04 <= spent["a"] < 0.04 + 0.1
    parts["a"].step(9)  # outside of turns a call is only a call
    assert seen[-1] == ("a", 9)


def test_a_failure_ends_all_and_is_raised():
    turns = Turns()

    def fails():
        raise ValueError("no weights")

    def waits():
        while True:
            turns.hand_over()

    with pytest.raises(ValueError, match="no weights"):
        turns.run({"waits": waits, "fails": fails})
    assert turns.run({"again": lambda: None}).keys() == {"again"}
