"""Random damage to shards that we wrote: training ends, each damaged sample is in the report, the others come once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from memory_source import Pictures
from test_module import CHOICE, Brightness, fit

from sana.data.bucket import by_area
from sana.data.formats.open import open_source
from sana.data.module import ShardsData
from sana.data.write_shards import write_shards

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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_training_survives_random_damage(tmp_path: Path, seed: int) -> None:
    plain = Pictures(COUNT, [(16, 16), (12, 20), (20, 12)], seed=seed).write(tmp_path / "plain", 3)
    write_shards(open_source(plain), tmp_path / "shards", shard_size=300, workers=1, progress=False)
    spoilt = damage(tmp_path / "shards", np.random.default_rng(seed))
    assert len(spoilt) == SPOILT
    # 667, 667 and 666 samples of three sizes: within two epochs every bucket has filled its batches but the last one.
    table = by_area(256, 4, 0.5, 2.0)
    data = ShardsData(str(tmp_path / "shards"), BATCH, CHOICE, buckets=table, max_bad_fraction=0.1, seed=seed)
    steps = data.planner().before(1)
    recipe = fit(data, tmp_path / "run", steps)
    assert isinstance(recipe, Brightness)
    assert recipe.samples_seen == steps * BATCH > COUNT - 3 * BATCH
    report = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    seen = Counter(key.rsplit("/", 1)[1] for key, _ in recipe.seen)
    good = Counter(key.rsplit("/", 1)[1] for key, weight in recipe.seen if weight)
    assert set(seen.values()) == {1}
    assert {line["key"] for line in report} == spoilt & set(seen)
    assert len(report) == len(spoilt & set(seen)) > 80
    assert set(good) == set(seen) - spoilt
    assert set(good.values()) == {1}
    assert {line["reason"].split(":")[0] for line in report} == {"checksum"}
