"""Judges: scenes drawn by the generator, plain prompts, rewards, and mixes by ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from sana.metric.scenes import oracle
from sana.reward.asked_colours import AskedColours
from sana.reward.judge import RewardJudge, SingleJudge
from sana.reward.mix import Mix
from sana.reward.scene_verdict import SceneVerdict, read_scene
from sana.run.build import build
from sana.run.compose import compose
from sana.scenes import COLORS, coverage, eval_prompts


def picture(*things: tuple[str, str, float, float]) -> np.ndarray:
    """Shapes (shape, colour, x, y) of 18 pixels on grey, 64 x 64."""
    image = np.full((64, 64, 3), 180.0)
    at = np.arange(64) + 0.5
    for shape, color, x, y in things:
        alpha = coverage(shape, at[None, :] - x, at[:, None] - y, 9.0)[..., None]
        image = (1 - alpha) * image + alpha * np.array(COLORS[color])
    return image.round().astype(np.uint8)


def test_every_prompt_of_the_scenes_is_read():
    for held_out in (False, True):
        for line in eval_prompts(60, 3, held_out):
            assert read_scene(line["prompt"]) == line
    for other in ("a cat", "two circle", "a orange ring", "a red circle and", "a star and a ring and a cross",
                  "five stars", "A red circle", ""):  # fmt: skip
        assert read_scene(other) is None


def test_the_oracle_judges_with_and_without_metadata():
    judge = SceneVerdict("oracle", oracle)
    right = picture(("circle", "red", 16, 32), ("square", "blue", 46, 32))
    wrong = picture(("circle", "red", 46, 32), ("square", "blue", 16, 32))
    line = {"prompt": "a red circle left of a blue square"}
    assert judge.score([right, wrong], [line, line]).tolist() == [1, 0]
    full = read_scene(line["prompt"])
    assert judge.score([right, wrong], [full, full]).tolist() == [1, 0]
    assert judge.settings == {"scorer": "sana.metric.scenes.oracle"}
    judge.check([line, full])
    with pytest.raises(ValueError, match="'a cat'"):
        judge.check([line, {"prompt": "a cat"}])


def test_colours_see_colours_and_nothing_else():
    judge = AskedColours()
    both = picture(("star", "red", 16, 16), ("star", "blue", 46, 40))
    one = picture(("circle", "red", 16, 16), ("square", "red", 46, 40))
    three = picture(("circle", "red", 14, 16), ("square", "blue", 46, 40), ("ring", "green", 16, 48))
    line = {"prompt": "a red circle left of a blue square"}
    assert judge.score([both, one, three, picture()], [line] * 4) == pytest.approx([1, 1 / 2, 2 / 3, 0])
    assert judge.score([both], [{"prompt": "a star"}]).tolist() == [0]
    for name in COLORS:
        (score,) = judge.score([picture(("ring", name, 32, 32))], [{"prompt": f"a {name} ring"}])
        assert score == 1


class Fixed(SingleJudge):
    def score(self, images, lines):
        return np.array([float(image[0, 0, 0]) for image in images])


def test_a_mix_adds_ranks():
    a, b = Fixed("a", {"x": 1}), Fixed("b", {})
    mix = Mix("m", {"a": a, "b": b, "c": None}, {"a": 1.0, "b": -0.5, "c": 3.0})
    rng = np.random.default_rng(0)
    parts = {"a": rng.integers(0, 4, 7).astype(float), "b": rng.normal(size=7) * 1e9}
    want = (rankdata(parts["a"]) - 1) / 6 - 0.5 * (rankdata(parts["b"]) - 1) / 6
    assert mix.combine(parts) == pytest.approx(want)
    assert mix.combine({"a": np.zeros(3), "b": np.zeros(3)}) == pytest.approx([0.25] * 3)
    assert mix.combine({"a": np.ones(1), "b": np.ones(1)}) == pytest.approx([0.25])
    assert mix.settings == {"a": {"weight": 1.0, "x": 1}, "b": {"weight": -0.5}}
    for judges, weights, said in (
        ({"a": a}, {"a": 1.0}, "two or more"),
        ({"a": a, "b": b}, {"a": 1.0}, r"weights\.b: None"),
        ({"a": a, "b": b}, {"a": 1.0, "b": 0.0}, r"weights\.b: 0\.0"),
        ({"a": a, "b": b}, {"a": 1.0, "b": 1.0, "d": 1.0}, r"weights\.d: there is no such judge"),
        ({"a": a, "m": mix}, {"a": 1.0, "m": 1.0}, r"judges\.m: is a mix"),
    ):
        with pytest.raises(ValueError, match=said):
            Mix("m", judges, weights)


def test_a_reward_is_a_judge():
    class Brightness:
        def __init__(self):
            self.settings = {"reward": "brightness"}

        def __call__(self, images, prompts):
            return torch.tensor([x.mean() + len(p) for x, p in zip(images, prompts, strict=True)], dtype=torch.float32)

    judge = RewardJudge("bright", Brightness())
    scores = judge.score([np.full((4, 5, 3), v, np.uint8) for v in (3, 9)], [{"prompt": "ab"}, {"prompt": ""}])
    assert scores.dtype == np.float64
    assert scores.tolist() == [5, 9]
    assert judge.combine({"bright": scores}) is scores
    assert judge.settings == {"reward": "brightness"}


def test_the_judges_of_conf_are_built(tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-judge.json").write_text(json.dumps(config))
    clip = [f"model={tmp_path / 'tiny-judge.json'}", "weights=random:0"]
    images, line = [picture(("star", "red", 30, 30)), picture()], {"prompt": "a red star"}
    for name, extra in (
        ("oracle", []),
        ("second", []),
        ("colours", []),
        ("mix_scenes", []),
        ("clip_score", [f"judge.reward.{x}" for x in clip]),
    ):
        composed = compose("sample", ["ckpt=x", "prompt=x", f"judge={name}", *extra])
        judge = build(composed.config.judge, "judge")
        assert judge.name == name
        parts = {key: part.score(images, [line, line]) for key, part in judge.parts.items()}
        scores = judge.combine(parts)
        assert scores.shape == (2,)
        if name != "clip_score":
            assert scores[0] > scores[1]
