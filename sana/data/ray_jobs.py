"""Work over the shards of a source as a Ray Data job: for what outgrows one machine.

Caching, captioning, scoring or deduplicating: whatever is a function of one shard that leaves its result beside it. The
same functions run without Ray; it is an extra (``pip install sana-lab[ray]``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Work = Callable[[str], int]


class _Actor:
    """Keeps what is dear to set up (a model on a device) from shard to shard."""

    def __init__(self, make: Callable[..., Work], arguments: tuple[Any, ...], folder: str) -> None:
        os.chdir(folder)
        self._work = make(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        counts = [self._work(str(shard)) for shard in batch["shard"]]
        return {"shard": np.asarray(batch["shard"]), "count": np.array(counts, np.int64)}


def over_shards(
    shards: Sequence[str],
    make: Callable[..., Work],
    arguments: tuple[Any, ...] = (),
    *,
    actors: int = 1,
    gpus: float = 0.0,
) -> Iterator[tuple[str, int]]:
    """Do a function over shards, on the cluster that RAY_ADDRESS names or on this machine.

    Args:
        shards: their names; each is given to one actor.
        make: called once in every actor; gives the function from a shard's name to a count of samples. What it did
            already it must find done when it is called again: a lost actor's shards are given to another.
        arguments: of `make`; they have to pickle.
        actors: how many work at the same time.
        gpus: per actor.

    Yields:
        (shard, count) as they are finished, in any order.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("engine=ray needs Ray: pip install 'ray[data]'") from None
    if not shards:
        return
    if not ray.is_initialized():
        paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        there = os.environ.get("RAY_ADDRESS")
        # On this machine: as many CPUs as actors, plus one for reading; without the dashboard's processes.
        here: dict[str, Any] = {} if there else {"num_cpus": actors + 1, "include_dashboard": False}
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}
        ray.init(runtime_env=environment, log_to_driver=False, **here)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    done = rows.map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(shards))),
        fn_constructor_args=(make, arguments, os.getcwd()),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        yield str(row["shard"]), int(row["count"])
