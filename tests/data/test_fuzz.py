"""Random damage to shards that we wrote: training ends, each damaged sample is in the report, the others come once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from memory_source import Pictures

from sana.data.formats.open import open_source
from sana.data.write_shards import write_shards

ROOT = Path(__file__).resolve().parents[2]
COUNT, SPOILT, BATCH = 2000, 100, 40


def damage(folder: Path, rng: np.random.Generator) -> set[str]:
    """Change 1 to 20 random bytes of a random member of 5 % of the samples; returns their keys."""
    source = open_source(folder)
    chosen = rng.choice(len(source), SPOILT, replace=False).tolist()
    for i in chosen:
        member = ("image", "meta")[int(rng.integers(2))]
        offset, size = (int(source.index.column(f"{member}_{what}")[i]) for what in ("offset", "size"))
        path = folder / source.shard(i)
        data = bytearray(path.read_bytes())
        for place in rng.choice(size, min(size, int(rng.integers(1, 21))), replace=False).tolist():
            data[offset + place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
    return {source.index.key(i) for i in chosen}


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_training_survives_random_damage(tmp_path: Path, seed: int) -> None:
    """`train.py` as a user calls it, on as small a network as there is, over one epoch."""
    plain = Pictures(COUNT, [(16, 16), (12, 20), (20, 12)], seed=seed).write(tmp_path / "plain", 3)
    write_shards(open_source(plain), tmp_path / "shards", shard_size=300, workers=1, progress=False)
    spoilt = damage(tmp_path / "shards", np.random.default_rng(seed))
    assert len(spoilt) == SPOILT
    words = [
        "data=shards",
        f"data.folder={tmp_path / 'shards'}",
        f"data.batch_size={BATCH}",
        "data.max_bad_fraction=0.1",
        "data.num_workers=2",
        f"seed={seed}",
        "size=16",
        "network.width=32",
        "network.depth=1",
        "block.cross.heads=1",
        f"trainer.max_steps={COUNT // BATCH}",
        "trainer.precision=32-true",
        "callback.validation=null",
        "callback.samples=null",
        f"run.dir={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    watched = [sys.executable, str(Path(__file__).with_name("seen.py")), str(tmp_path / "seen.jsonl")]
    done = subprocess.run([*watched, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    seen = [entry for line in (tmp_path / "seen.jsonl").read_text().splitlines() for entry in json.loads(line)]
    weights = {key.rsplit("/", 1)[1]: weight for key, weight in seen}
    assert len(seen) == len(weights) == COUNT
    assert {key for key, weight in weights.items() if not weight} == spoilt
    report = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(report) == SPOILT
    assert {line["key"] for line in report} == spoilt
    assert {line["reason"].split(":")[0] for line in report} == {"checksum"}
