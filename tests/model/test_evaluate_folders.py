"""Folders of images made elsewhere or by several ranks, and what the report of an evaluation shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import PROMPTS, SETTINGS, Artist, Counted, draw, line, pixels, score

from sana.metric.geneval_scenes import GenEvalScenes
from sana.metric.mean_reward import MeanReward
from sana.model.evaluate import evaluate
from sana.model.found import find_images
from sana.model.score import score_folder
from sana.run.results import read_results


def test_images_made_elsewhere_find_their_lines(tmp_path):
    from PIL import Image

    from sana.model.found import read_lines

    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    lines = [line("colors", f"c{i}") for i in range(3)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    flat.mkdir()
    for name in ("0.png", "00001_0.jpg", "1-1.png"):
        image.save(flat / name)
    for name in ("00000/samples/00000.png", "2/samples/00003.png", "2/grid.png"):
        (nested / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(nested / name)
    known = read_lines(tmp_path / "lines.jsonl")
    assert [(p.name, r["entry"]) for p, r in find_images(flat, known)] == [
        ("0.png", 0),
        ("00001_0.jpg", 1),
        ("1-1.png", 1),
    ]
    assert [r["metadata"]["prompt"] for _, r in find_images(nested, known)] == ["c0", "c2"]
    results = score_folder(nested, {"geneval_scenes": GenEvalScenes(score, resamples=50)}, lines=known)
    assert (results["metric"], results["n"], results["value"]) == ("geneval_scenes", 2, 1.0)
    assert (results["settings"]["prompts"], results["settings"]["prompts_without_image"]) == (3, 1)
    image.save(flat / "3.png")
    with pytest.raises(ValueError, match=r"there is no line 3; the metadata has 3, counted from 0"):
        find_images(flat, known)
    (flat / "3.png").rename(flat / "x.png")
    with pytest.raises(ValueError, match="cannot tell its line"):
        find_images(flat, known)
    assert len(find_images(flat, prompts=False)) == 4
    (tmp_path / "meta.json").write_text(
        json.dumps({"x": {"prompt": "an x", "category": "art"}, "y": {"prompt": "a y"}})
    )
    (flat / "0.png").unlink()
    for name in ("00001_0.jpg", "1-1.png"):
        (flat / name).unlink()
    image.save(flat / "y_1.png")
    found = find_images(flat, read_lines(tmp_path / "meta.json"))
    assert [(r["entry"], r["metadata"]["prompt"]) for _, r in found] == [("x", "an x"), ("y", "a y")]


RANKS = """
import sys
import torch.distributed as dist
sys.path[:0] = [{tests!r}]
from test_evaluate import Artist, Counted, draw
from sana.model.score import score_folder
rank, folder, store = int(sys.argv[1]), *sys.argv[2:4]
dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=2)
artist, metric = Artist(), Counted()
draw(folder, artist)
overall = score_folder(folder, {{"geneval": metric}})["overall"]
print(len(artist.calls), len(metric.seen), overall)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_share_drawing_and_scoring(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(r), str(tmp_path / "images"), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for r in range(2)
    ]
    said = [p.communicate(timeout=240)[0].split() for p in processes]
    draw(tmp_path / "calm", Artist())
    overall = score_folder(tmp_path / "calm", {"geneval": Counted()})["overall"]
    assert [int(drawn) for drawn, _, _ in said] == [16, 12], "batches of 4 in turn, none by both"
    assert sum(int(seen) for _, seen, _ in said) == 28
    assert {float(number) for _, _, number in said} == {overall}
    drawn, calm = (
        {k: v for k, v in pixels(tmp_path / name).items() if k.endswith(".png")} for name in ("images", "calm")
    )
    assert drawn == calm


class Brightness:
    """Scores an image by its mean."""

    def __init__(self) -> None:
        self.settings = {"reward": "brightness"}

    def __call__(self, images, prompts):
        return torch.tensor([image.mean() for image in images])


def test_the_ends_of_a_score_are_named_and_shown(tmp_path):
    draw(tmp_path / "drawn", Artist(), samples=1, prompts=PROMPTS[:7])
    results = evaluate(tmp_path / "drawn", {"brightness": MeanReward(Brightness(), resamples=10)})
    files = [p for p in sorted((tmp_path / "drawn").rglob("*.png")) if "held_out" not in str(p)]
    means = {str(p.relative_to(tmp_path / "drawn")): np.asarray(Image.open(p)).mean() for p in files}
    order = sorted(means, key=means.__getitem__)
    ends = results["extremes"]["brightness"]
    assert [e["filename"] for e in ends["worst"]] == order[:3], "of seven images none is at both ends"
    assert [e["filename"] for e in ends["best"]] == order[:-4:-1]
    assert ends["best"][0]["score"] == pytest.approx(means[order[-1]])
    page = (tmp_path / "drawn" / "report.html").read_text()
    assert "Highest and lowest scores" in page
    for entry in (*ends["best"], *ends["worst"]):
        assert f"<small>{entry['score']:.4g}</small>" in page
    assert read_results(tmp_path / "drawn" / "results.json")["extremes"] == json.loads(json.dumps(results["extremes"]))


def test_weights_without_a_run_have_a_report_of_their_images(tmp_path):
    drawing = {"images_fn": Artist(), "prompts": PROMPTS, "held_out": [], "settings": SETTINGS, "samples": 1}
    metrics = {"geneval_scenes": GenEvalScenes(score, resamples=10)}
    where = {"run_dir": tmp_path / "loaded" / "dots", "output": tmp_path / "own.json"}
    results = evaluate(tmp_path / "images", metrics, drawing=drawing, **where)
    assert read_results(tmp_path / "own.json")["overall"] == results["overall"]
    assert "report" in (tmp_path / "own.html").read_text()
    assert not (tmp_path / "loaded").exists()
