"""One rank of a data-only run: loads its share of some steps with real workers, and tells rank 0 what it got.

python ranks.py FOLDER RANK WORLD WORKERS STORE START STEPS
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import torch.distributed as dist
from test_ranks import BATCH, choice, planned, sizes

from sana.data.formats.open import open_source
from sana.data.loader import MicroBatches, Samples, loader


def main(folder: str, rank: int, world: int, workers: int, store: str, start: int, steps: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    source = open_source(folder)
    batches = MicroBatches(planned(source), sizes(), start, rank, world)
    mine = [
        [batch.index.tolist(), batch.key, list(batch.image.shape), batch.caption]
        for batch in islice(loader(Samples([source], choice(), 0), batches, workers), steps)
    ]
    every: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(every, mine)
    if rank == 0:
        assert start % BATCH == 0
        print(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, rank, world, workers, store, start, steps = sys.argv[1:]
    main(folder, int(rank), int(world), int(workers), store, int(start), int(steps))
