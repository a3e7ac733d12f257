"""sample.py best_of=N on the scenes model that ships: what is kept, going on after a kill, refusals, and the curve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from sana.metric.scenes import oracle
from sana.model.candidates import read_pool, read_rows
from sana.model.found import find_images
from sana.run.sidecar import read_image, read_sidecar
from sana.scenes import eval_prompts

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["ckpt=scenes", "sampler.steps=4", "batch_size=3", "precision=32-true", "device=cpu"]


@pytest.fixture(scope="module")
def choose(sample):
    """sample.py with `COMMON`."""
    return lambda *arguments: sample(*COMMON, *arguments)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Two prompts of each of three tasks; every prompt has seeds of its own."""
    lines = [line for line in eval_prompts(2, 5) if line["tag"] in ("two_object", "colors", "color_attr")]
    path = tmp_path_factory.mktemp("prompts") / "scenes.jsonl"
    path.write_text("".join(json.dumps(line | {"seed": 100 * i}) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def plain(choose, prompts, tmp_path_factory) -> Path:
    """What plain drawing gives for the same seeds."""
    out = tmp_path_factory.mktemp("plain")
    for i, line in enumerate(map(json.loads, prompts.read_text().splitlines())):
        (out / "one.jsonl").write_text(json.dumps(line))
        code, _, err = choose(f"prompt={out / 'one.jsonl'}", "n=5", f"out={out / str(i)}")
        assert code == 0, err
    return out


def verdicts(plain: Path) -> list[dict[int, float]]:
    """For each prompt the oracle's word on each seed."""
    found: list[dict[int, float]] = []
    for folder in sorted(p for p in plain.iterdir() if p.is_dir()):
        records = {path: read_sidecar(path) for path in folder.glob("*.png")}
        found.append({r["seed"]: float(oracle(read_image(p), r["metadata"])[0]) for p, r in records.items()})
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_best_are_kept_and_the_rest_goes(choose, prompts, plain, tmp_path):
    arguments = [f"prompt={prompts}", "best_of=5", "keep=2", "judge=oracle", f"out={tmp_path / 'out'}", "grid=true"]
    code, out, err = choose(*arguments)
    assert code == 0, err
    paths = [Path(line) for line in out.split()]
    assert paths.pop().name == "grid.png"
    want = verdicts(plain)
    assert {v for scores in want for v in scores.values()} == {0, 1}, "the seed should show both"
    assert len(paths) == 2 * len(want)
    for entry, scores in enumerate(want):
        order = sorted(scores, key=lambda seed: (scores[seed], seed), reverse=True)
        for rank in (1, 2):
            path = paths[2 * entry + rank - 1]
            record = read_sidecar(path)
            assert path.name.startswith(f"{entry:05d}_")
            assert path.name.endswith(f"_rank{rank}.png")
            assert (record["seed"], record["score"]) == (order[rank - 1], scores[order[rank - 1]])
            assert (record["rank"], record["best_of"]) == (rank, 5)
            assert record["judge"] == {"name": "oracle", "scorer": "sana.metric.scenes.oracle"}
            (same,) = (plain / str(entry)).glob(f"*_{record['seed']}.png")
            assert (read_image(path, record) == read_image(same)).all(), "the candidate is the plain image of its seed"
        first = scores[min(scores)]
        assert read_sidecar(paths[2 * entry])["score"] >= first, "at least as good as the one plain image"
    assert not (tmp_path / "out" / "pool").exists()
    rows = read_rows(tmp_path / "out" / "scores.jsonl")
    assert {(r["entry"], r["seed"]): r["score"] for r in rows} == {
        (entry, seed): score for entry, scores in enumerate(want) for seed, score in scores.items()
    }
    before = {p: p.stat().st_mtime_ns for p in paths}
    assert choose(*arguments) == [0, out, ""]
    assert {p: p.stat().st_mtime_ns for p in paths} == before
    assert len(read_rows(tmp_path / "out" / "scores.jsonl")) == len(rows)


def test_a_larger_pool_draws_only_what_is_new(choose, plain, tmp_path):
    (line,) = (plain / "one.jsonl").read_text().splitlines()
    common = [f"prompt={plain / 'one.jsonl'}", "judge=oracle", "keep_all=true", "layout=geneval"]
    code, out, err = choose(*common, "best_of=3", f"out={tmp_path}")
    assert code == 0, err
    assert out.split() == [str(tmp_path / "00000" / "samples" / "00000.png")]
    assert json.loads((tmp_path / "00000" / "metadata.jsonl").read_text())["prompt"] == json.loads(line)["prompt"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "pool").iterdir()}
    assert len(before) == 6, "three images, each with its sidecar"
    code, _, err = choose(*common, "best_of=5", "keep=2", f"out={tmp_path}")
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list((tmp_path / "pool").glob("*.png"))) == 5
    assert [path.name for path, _ in find_images(tmp_path)] == ["00000.png", "00001.png"], "the pool is not scored"
    assert len(find_images(tmp_path / "pool")) == 5


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "sample.py", *COMMON, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_going_on_after_a_kill_gives_the_choice_of_one_go(choose, prompts, tmp_path):
    """A mix, whose scores depend on all candidates of a prompt."""
    common = [f"prompt={prompts}", "best_of=5", "keep=2", "judge=mix_scenes"]
    code, out, err = choose(*common, f"out={tmp_path / 'whole'}")
    assert code == 0, err
    parts = tmp_path / "parts"
    process = start([*common, f"out={parts}"])
    deadline = time.monotonic() + 240
    while not (rows := read_rows(parts / "scores.jsonl")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_rows(parts / "scores.jsonl")
    assert 0 < len(rows) < 6 * 5 * 3, "killed on the way"
    with open(parts / "scores.jsonl", "a") as file:
        file.write('{"entry": 0, "ima')  # as a kill within a write leaves it
    code, again, err = choose(*common, f"out={parts}")
    assert code == 0, err
    assert again == out.replace(str(tmp_path / "whole"), str(parts))
    one, two = contents(tmp_path / "whole"), contents(parts)
    one_rows, two_rows = (read_rows(tmp_path / name / "scores.jsonl") for name in ("whole", "parts"))
    del one["scores.jsonl"], two["scores.jsonl"]
    assert one == two, "pixels, ranks and sidecars"
    assert sorted(map(str, one_rows)) == sorted(map(str, two_rows)), "nothing was judged twice"
    assert {row["judge"] for row in one_rows} == {"colours", "second", "mix_scenes"}


@pytest.mark.slow
def test_the_curve_is_that_of_all_subsets(choose, prompts, tmp_path):
    out = tmp_path / "out"
    code, _, err = choose(f"prompt={prompts}", "best_of=5", "judge=colours", "keep_all=true", f"out={out}")
    assert code == 0, err
    assert list(read_pool(out).scores) == ["colours"]
    line = [sys.executable, "scripts/best_of_curve.py", str(out), "--judge", "colours", "--value", "oracle"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out_curve_colours.json").read_text())
    assert (tmp_path / "out_curve_colours.png").stat().st_size > 10_000
    pool = read_pool(out)
    assert (found["prompts"], found["pool"]) == pool.scores["oracle"].shape == (6, 5)
    for key, judge in (("curve", "colours"), ("ceiling", "oracle")):
        assert [row["best_of"] for row in found[key]] == [1, 2, 4, 5]
        for row in found[key]:
            each = []
            for scores, values in zip(pool.scores[judge], pool.scores["oracle"], strict=True):
                tops = []
                for subset in combinations(range(5), row["best_of"]):
                    best = max(scores[i] for i in subset)
                    tops.append(np.mean([values[i] for i in subset if scores[i] == best]))
                each.append(np.mean(tops))
            # Two prompts of each task, so the mean of task means is the mean.
            assert row["mean"] == pytest.approx(np.mean(each))
    assert found["correlation"]["of"] == 6
    assert set(found["tasks"]) == {"two_object", "colors", "color_attr"}
    next((out / "pool").glob("*.png")).unlink()
    done = subprocess.run([*line[:-1], "second"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "was not kept" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("best_of=4", "best_of: nobody chooses; give judge= one of clip_score, colours,"),
        ("judge=oracle", "judge: there is nothing to choose from; give best_of=N"),
        ("keep=2", "keep: there is nothing to choose from"),
        ("keep_all=true", "keep_all: there is nothing to choose from"),
        ("best_of=4 judge=oracle n=2", "n: has no effect with best_of=4"),
        ("best_of=4 judge=oracle keep=5", "keep: 5 of best_of=4 images cannot be kept"),
        ("best_of=0 judge=oracle", "keep: 1 of best_of=0"),
        ("best_of=2 judge=oracel", "judge=oracel: no such option; did you mean oracle?"),
        ("best_of=2 judge=verifier", "judge: this needs the folder of NVILA-Lite-2B-Verifier"),
        ("best_of=2 judge=pick_score", "judge: this needs the folder of yuvalkirstain/PickScore_v1"),
        ("best_of=2 judge=oracle prompt=cats", "judge: oracle knows only prompts of the scenes world"),
        ("best_of=2 judge=oracle batch_size=0", "batch_size: 0"),
    ],
)
def test_refusals(choose, tmp_path, settings, said):
    code, out, err = choose("prompt=a star", f"out={tmp_path / 'out'}", *settings.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"sample.py: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
