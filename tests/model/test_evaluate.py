"""Evaluation over a folder: nothing is drawn twice, interruptions change nothing, and the numbers are those counted."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sana.metric.features import SCENE_FEATURES, scene_features
from sana.metric.frechet import Frechet
from sana.metric.geneval_scenes import GenEvalScenes
from sana.model.evaluate import draw_folder, evaluate, image_seed
from sana.model.found import find_images
from sana.model.score import score_folder
from sana.run.sidecar import read_sidecar

SETTINGS = {
    "sampler": "flow_dpm",
    "steps": 20,
    "guidance": 4.5,
    "checkpoint": "00ff",
    "commit": "abc",
    "weights": "EMA",
}


def line(tag: str, prompt: str) -> dict:
    return {"tag": tag, "include": [{"class": "circle", "count": 1}], "exclude": [], "prompt": prompt}


PROMPTS = [line("colors", f"c{i % 3}") for i in range(7)] + [line("position", f"p{i}") for i in range(4)]
HELD_OUT = [line("colors", f"h{i}") for i in range(3)]


class Artist:
    """Draws an image that is a function of prompt and seed, and can die after so many of them."""

    def __init__(self, lives: int = 10**9) -> None:
        self.lives, self.calls = lives, []

    def __call__(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.calls.append((prompt, seed))
            rng = np.random.default_rng([seed, len(prompt), ord(prompt[0])])
            images.append(rng.integers(0, 256, size=(8, 12, 3), dtype=np.uint8))
        return np.stack(images)


def score(image, line) -> tuple[bool, str]:
    """Right when the first pixel is even: a function of the pixels that no other code knows."""
    return (True, "") if image[0, 0, 0] % 2 == 0 else (False, "odd: the first pixel")


def draw(folder, artist, **more):
    arguments = {"prompts": PROMPTS, "settings": SETTINGS, "held_out": HELD_OUT, "samples": 2, "batch_size": 4}
    return draw_folder(folder, artist, **(arguments | more))


def pixels(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".jsonl")}


def sidecars(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("samples/*.json")}


def test_every_image_is_drawn_once_with_its_own_seed(tmp_path):
    artist = Artist()
    draw(tmp_path, artist)
    assert len(artist.calls) == 28
    assert len({seed for _, seed in artist.calls}) == 28, "a prompt that comes twice gets other noise"
    assert all(0 <= seed < 2**48 for _, seed in artist.calls)
    found = find_images(tmp_path)
    assert len(found) == 28
    for path, record in found:
        drawn = Artist()([record["prompt"]], [record["seed"]])[0]

        assert (np.asarray(Image.open(path)) == drawn).all()
        assert {k: record[k] for k in SETTINGS} == SETTINGS
    again = Artist()
    draw(tmp_path, again)
    assert again.calls == []


def test_seeds_do_not_depend_on_the_rest_of_the_list(tmp_path):
    assert image_seed(0, "a", 0, 0) == image_seed(0, "a", 0, 0)
    assert len({image_seed(s, p, r, n) for s in (0, 1) for p in "ab" for r in (0, 1) for n in (0, 1)}) == 16
    whole, part = Artist(), Artist()
    draw(tmp_path / "whole", whole)
    draw(tmp_path / "part", part, prompts=PROMPTS[5:], held_out=(), samples=1)
    assert {c for c in part.calls if c[0][0] == "p"} <= set(whole.calls)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killing_at_random_points_changes_nothing(tmp_path, monkeypatch, seed):
    import sana.run.sidecar as module

    calm = tmp_path / "calm"
    draw(calm, Artist())
    rng, real = random.Random(seed), module.replace_bytes
    shaken, kills, written = tmp_path / "shaken", 0, []

    def maybe(path, data):
        if rng.random() < 0.15:
            raise KeyboardInterrupt
        written.append(path)
        real(path, data)

    monkeypatch.setattr(module, "replace_bytes", maybe)
    while True:
        try:
            draw(shaken, Artist())
            break
        except KeyboardInterrupt:
            kills += 1
            with pytest.raises(ValueError, match=r"no PNG|no images|has neither|of 28 images"):
                find_images(shaken)
    assert kills > 2
    finished = [p for p in written if p.suffix == ".json"]
    assert len(finished) == len(set(finished)) == 28
    assert pixels(shaken) == pixels(calm)
    assert sidecars(shaken) == sidecars(calm)
    metrics = {"geneval_scenes": GenEvalScenes(score, resamples=100)}
    one, other = (score_folder(f, metrics) for f in (calm, shaken))
    assert one | {"files": 0} == other | {"files": 0}


def test_batches_are_cut_alike_when_resumed(tmp_path):
    """The network's rounding depends on the batch, so a resumed batch is drawn whole."""
    batches: list[tuple[str, ...]] = []

    def artist(prompts, seeds):
        batches.append(tuple(prompts))
        return np.full((len(prompts), 8, 8, 3), len(prompts), np.uint8)

    draw(tmp_path, artist, samples=1)
    first = list(batches)
    for k in (0, 1, 5):
        shutil.rmtree(tmp_path / "prompts" / f"{k:05d}")
    batches.clear()
    draw(tmp_path, artist, samples=1)
    assert batches == first[:2]


def test_folders_are_not_mixed(tmp_path):
    draw(tmp_path, Artist())
    for change, message in (
        ({"settings": SETTINGS | {"steps": 10}}, "drawn with steps = 20, now it is 10"),
        ({"settings": SETTINGS | {"checkpoint": "11"}}, "drawn with checkpoint = '00ff'"),
        ({"seed": 5}, "prompts"),
        ({"prompts": PROMPTS[:-1]}, "images = 28"),
        ({"batch_size": 5}, "batch_size = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(tmp_path, Artist(), **change)
    draw(tmp_path, Artist(), settings=SETTINGS | {"commit": "def"})
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(next(tmp_path.rglob("*.png")), other / "x.png")
    with pytest.raises(ValueError, match="unknown origin"):
        draw(other, Artist())


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="settings lack sampler, commit"):
        draw(tmp_path, Artist(), settings={k: v for k, v in SETTINGS.items() if k not in ("sampler", "commit")})
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(tmp_path, Artist(), prompts=[], held_out=[])
    with pytest.raises(ValueError, match="asked for 4 images"):
        draw(tmp_path / "x", lambda p, s: np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="no images in"):
        score_folder(tmp_path, {"geneval_scenes": GenEvalScenes(score)})
    with pytest.raises(ValueError, match="no metric was chosen"):
        score_folder(tmp_path, {})


def test_results_are_the_counts(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 10.0}\n{"step": 900, "time": 130.0}\n')
    reference = Artist()([f"r{i}" for i in range(40)], list(range(40)))
    metrics = {
        "geneval_scenes": GenEvalScenes(score, resamples=200),
        "fid_scenes": Frechet(scene_features, [reference], SCENE_FEATURES, allow_small_n=True),
    }
    drawing = {"images_fn": Artist(), "prompts": PROMPTS, "held_out": HELD_OUT, "settings": SETTINGS, "samples": 2}
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    results = evaluate(tmp_path / "images", metrics, run_dir=run, commit="abc", drawing=drawing, console=console)

    right: dict[str, list[bool]] = {}
    for path, record in find_images(tmp_path / "images"):
        image = Artist()([record["prompt"]], [record["seed"]])[0]
        key = "held_out" if "held_out" in str(path) else record["metadata"]["tag"]
        right.setdefault(key, []).append(score(image, None)[0])
    assert {k: len(v) for k, v in right.items()} == {"colors": 14, "position": 8, "held_out": 6}
    assert results["tasks"] == {k: pytest.approx(np.mean(right[k])) for k in ("colors", "position")}
    assert results["overall"] == pytest.approx((np.mean(right["colors"]) + np.mean(right["position"])) / 2)
    assert results["held_out"] == pytest.approx(np.mean(right["held_out"]))
    assert results["figures"]["fid_scenes"]["n"] == 22, "held-out images are not among those compared"
    assert results["fid_scenes"] == results["figures"]["fid_scenes"]["mean"] > 0
    assert (results["steps"], results["commit"]) == (900, "abc")
    assert results["seconds"] >= 120
    assert results["peak_rss_gib"] > 0.05
    for key, value in (SETTINGS | {"seed": 0, "samples": 2, "n": 22, "size": [12, 8]}).items():
        assert results["settings"][key] == value

    written = json.loads((run / "results.json").read_text())
    assert {"overall", "tasks", "held_out", "steps", "seconds", "peak_rss_gib", "commit", "settings"} <= set(written)
    assert written["overall"] == results["overall"]
    assert (run / "report.html").exists()
    assert "held out" in console.export_text()
    verdicts = [json.loads(v) for v in (tmp_path / "images" / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 28
    for verdict in verdicts:
        record = read_sidecar(tmp_path / "images" / verdict["filename"])
        assert record is not None
        assert verdict["prompt"] == record["prompt"] == verdict["metadata"]["prompt"]
        assert verdict["correct"] == score(Artist()([record["prompt"]], [record["seed"]])[0], None)[0]
        assert (verdict["reason"] == "") == verdict["correct"]


def test_scoring_a_folder_made_elsewhere(tmp_path):
    """GenEval's own layout without sidecars: metadata.jsonl above the samples, a grid.png beside."""

    for k, entry in enumerate(PROMPTS):
        home = tmp_path / f"{k:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(json.dumps(entry))
        for n in range(2):
            image = np.full((8, 8, 3), 2 * n + (k % 2), np.uint8)
            Image.fromarray(image).save(home / "samples" / f"{n:05d}.png")
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(home / "grid.png")
    results = evaluate(tmp_path, {"geneval_scenes": GenEvalScenes(score, resamples=100)})
    assert results["tasks"] == {"colors": pytest.approx(4 / 7), "position": pytest.approx(0.5)}
    assert results["settings"]["n"] == 22
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "report.html").exists()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png has neither"):
        find_images(tmp_path)


def test_changed_pixels_are_not_scored(tmp_path):

    draw(tmp_path, Artist())
    victim = sorted(tmp_path.rglob("*.png"))[3]
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(victim)
    with pytest.raises(ValueError, match="not those of its sidecar"):
        score_folder(tmp_path, {"geneval_scenes": GenEvalScenes(score)})


class Counted(GenEvalScenes):
    """A scorer that says which images it was asked about, and can die."""

    settings = {"scorer": "counted"}  # noqa: RUF012

    def __init__(self, mortal: random.Random | None = None) -> None:
        super().__init__(self.one, resamples=50)
        self.seen: list[bytes] = []
        self.mortal = mortal

    def one(self, image, line):
        if self.mortal is not None and self.mortal.random() < 0.2:
            raise KeyboardInterrupt
        self.seen.append(image.tobytes() + json.dumps(line).encode())
        return score(image, line)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scoring_goes_on_where_it_was_killed(tmp_path, monkeypatch, seed):
    """Scoring dies at random; in the end no image was scored twice, and nothing else is different."""
    import sana.model.journal as journal

    monkeypatch.setattr(journal, "CHUNK", 1)
    draw(tmp_path / "calm", Artist())
    expected = score_folder(tmp_path / "calm", {"geneval": Counted()})
    folder, rng, seen, kills = tmp_path / "shaken", random.Random(seed), [], 0
    draw(folder, Artist())
    while True:
        metric = Counted(rng)
        try:
            results = score_folder(folder, {"geneval": metric})
            break
        except KeyboardInterrupt:
            kills += 1
            with open(folder / "scores" / "geneval" / "0.jsonl", "a") as file:
                file.write('\n{"key": "cut o')
        finally:
            seen += metric.seen
    assert kills > 0
    assert len(seen) == len(set(seen)) == 28
    assert results | {"files": 0} == expected | {"files": 0}
    again = Counted()
    assert score_folder(folder, {"geneval": again})["overall"] == expected["overall"]
    assert again.seen == []
    other = Counted()
    other.settings = {"scorer": "another"}
    score_folder(folder, {"geneval": other})
    assert len(other.seen) == 28, "what was scored otherwise is not taken over"
    elsewhere = Counted()
    score_folder(folder, {"geneval": elsewhere}, about="another commit")
    assert len(elsewhere.seen) == 28


KILLED = """
import os, sys, time
sys.path[:0] = [{tests!r}]
from test_evaluate import Artist, PROMPTS, HELD_OUT, SETTINGS, draw
class Slow(Artist):
    def __call__(self, prompts, seeds):
        time.sleep(0.02)
        return super().__call__(prompts, seeds)
draw(sys.argv[1], Slow(), batch_size=1)
"""


@pytest.mark.slow
def test_a_process_killed_without_warning_leaves_nothing_half_done(tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path

    script = tmp_path / "draw.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    folder, rng, kills = tmp_path / "images", random.Random(0), 0
    command = [sys.executable, str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    written: dict[str, int] = {}
    while True:
        process = subprocess.Popen(command, env=environment)
        wanted = len(list(folder.rglob("samples/*.json"))) + rng.randint(2, 9)
        while process.poll() is None and len(list(folder.rglob("samples/*.json"))) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for path in folder.rglob("samples/*.json"):
            inode = path.stat().st_mtime_ns
            assert written.setdefault(str(path), inode) == inode, "a finished image is never made again"
        if process.returncode == 0:
            break
    assert kills > 1
    draw(tmp_path / "calm", Artist(), batch_size=1)
    assert pixels(folder) == pixels(tmp_path / "calm")
