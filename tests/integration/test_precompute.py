"""scripts/precompute.py: what it makes is what training reads, whoever made it; and nothing stale is read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = 24


def run(script: str, *settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    environment.pop("RAY_ADDRESS")
    return subprocess.run(
        [sys.executable, script, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sana.data.scene_shards import write_scene_shards

    folder = tmp_path_factory.mktemp("scenes")
    write_scene_shards(folder, COUNT, 0, "train", shard_size=7, workers=1, progress=False)
    write_scene_shards(folder, 4, 1, "val", workers=1, progress=False)
    return folder


def settings(shards: Path, cache: Path, *more: str) -> list[str]:
    data = ["data=shards", f"data.folder={shards}", f"data.cache={cache}", "size=64", "data.batch_size=4"]
    return [*data, "data.num_workers=0", "data.validation=4", *more]


def digests(cache: Path) -> dict[str, str]:
    paths = [path for path in sorted(cache.rglob("*")) if path.is_file()]
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def train(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    brief = ["trainer.max_steps=3", "trainer.precision=32-true"]
    brief += ["callback.records.every=1", "callback.samples=null", "callback.validation=null"]
    return run("train.py", *words, *brief, f"run.dir={out}")


@pytest.mark.long
def test_caches_of_any_making_are_the_same_and_train_the_same(shards: Path, tmp_path: Path) -> None:
    alone = run("scripts/precompute.py", "cache=[latents,text]", *settings(shards, tmp_path / "a"))
    assert alone.returncode == 0, alone.stderr
    assert f"{2 * COUNT} samples in 8 shards cached, 0 were there" in alone.stdout
    made = digests(tmp_path / "a")
    assert len(made) == 2 * (1 + 2 * 4)

    for part in ("part=0/2", "part=1/2"):  # two machines of two processes each
        done = run(
            "scripts/precompute.py", "cache=[latents,text]", "workers=2", part, *settings(shards, tmp_path / "b")
        )
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "b") == made
    again = run("scripts/precompute.py", "cache=text", *settings(shards, tmp_path / "b"))
    assert "0 shards cached, 4 were there" in again.stdout

    plain = train(tmp_path / "plain", *settings(shards, tmp_path / "none"))
    assert plain.returncode == 0, plain.stderr
    required = ["data.cache_latents=required", "data.cache_text=required", "data.cache_dtype=float32"]
    stale = train(tmp_path / "stale", *settings(shards, tmp_path / "a", *required))
    assert stale.returncode != 0
    assert "dtype is float16 there, float32 here" in stale.stderr
    exact = ["data.cache_dtype=float32", "trainer.precision=32-true"]
    run("scripts/precompute.py", "cache=[latents,text]", *settings(shards, tmp_path / "a", *exact))
    cached = train(tmp_path / "cached", *settings(shards, tmp_path / "a", *required))
    assert cached.returncode == 0, cached.stderr
    assert len(losses(tmp_path / "plain")) == 3
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.long
def test_ray_makes_the_same(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = run("scripts/precompute.py", "cache=latents", *settings(shards, tmp_path / "a"))
    assert alone.returncode == 0, alone.stderr
    ray = run("scripts/precompute.py", "cache=latents", "engine=ray", *settings(shards, tmp_path / "b"))
    assert ray.returncode == 0, ray.stderr
    assert f"{COUNT} samples in 4 shards cached" in ray.stdout
    assert digests(tmp_path / "b") == digests(tmp_path / "a")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("engine=spark", "engine=spark: expected local or ray"),
        ("part=4/4", "part=4/4: expected I/M"),
        ("workers=0", "workers=0: expected a number of processes"),
        ("cache=pixels", "cache=pixels: expected latents, text or"),
    ],
)
def test_bad_settings_are_refused_in_one_line(word: str, message: str) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import precompute  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    with pytest.raises(ValueError, match=message):
        precompute.read_options([word, "model=tiny"])
    options = precompute.read_options(["cache=[latents,text]", "part=1/3", "model=tiny", "workers=2"])
    assert options.settings == ("model=tiny",)
    assert (options.kinds, options.part, options.parts, options.workers) == (("latents", "text"), 1, 3, 2)
