"""Metrics while training: the same prompts at the same seeds every so many updates, on averaged and on raw weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from sana.callback.due import Due
from sana.callback.records import log_row
from sana.metric.ranks import alone, rank, world
from sana.model.evaluate import image_seed
from sana.model.found import read_lines
from sana.model.generate import Painter
from sana.model.score import Metric
from sana.sampler.guided import Sampler
from sana.scenes import eval_prompts

Weights = Literal["ema", "live"]


class Evaluation(Due):
    """Draws prompts and scores them, and logs ``eval/<weights>/<metric>`` (tasks as ``.../<task>``).

    All ranks draw in step, each its share of the batches, so sharded networks work; the first rank scores while the
    others wait for its answer, whatever becomes of it. Nothing that training draws at random is touched. A metric that
    refuses (too few images, nothing right) is reported as a warning; training goes on.

    Args:
        metrics: name -> metric, such as those of conf/metric; one that is given without its real images compares with
            the validation images of the run's data, and one that is None is left out.
        sampler: how images are drawn.
        prompts: file of prompts, see `sana.model.found.read_lines`; None: those of the scenes world.
        per_task: prompts of each task, of the scenes world.
        samples: images per prompt.
        every: updates between evaluations; there is one at the end too.
        seed: of the prompts and of the noise.
        size: pixels of a side.
        batch_size: images per call of the network, on each rank.
        weights: which weights; "ema" is left out where no average is kept.
    """

    def __init__(
        self,
        metrics: dict[str, Metric | None],
        sampler: Sampler,
        prompts: str | None = None,
        per_task: int = 4,
        samples: int = 1,
        every: int = 1000,
        seed: int = 0,
        size: int = 64,
        batch_size: int = 32,
        weights: Sequence[Weights] = ("ema", "live"),
    ) -> None:
        if min(every, samples, batch_size) < 1:
            raise ValueError("callback.evaluation: every, samples and batch_size must be at least 1")
        if not set(weights) <= {"ema", "live"} or not weights:
            raise ValueError(f"callback.evaluation.weights: {list(weights)}; expected some of ema, live")
        self.metrics = {name: metric for name, metric in metrics.items() if metric is not None}
        super().__init__(every)
        self.sampler, self.size = sampler, size
        self.batch_size, self.weights = batch_size, list(weights)
        lines = eval_prompts(per_task, seed) if prompts is None else read_lines(prompts)
        found = list(lines.values() if isinstance(lines, Mapping) else lines)
        self.lines = [line for line in found for _ in range(samples)]
        self.clusters = [k for k in range(len(found)) for _ in range(samples)]
        self.seeds = [image_seed(seed, line["prompt"], k, s) for k, line in enumerate(found) for s in range(samples)]

    def act(self, trainer: Trainer, recipe: Any) -> None:
        for name, metric in self.metrics.items():
            if isinstance(metric, partial):
                self.metrics[name] = metric(reference=trainer.datamodule.validation_images)  # type: ignore[attr-defined]
        row: dict[str, float] = {}
        with isolate_rng():
            for which in self.weights:
                if which == "ema" and "network" not in recipe.ema:
                    continue
                with _network(recipe, which) as network, trainer.precision_plugin.forward_context():
                    painter = Painter(network, recipe.frozen.autoencoder, recipe.frozen.text_encoder, recipe.null_like)
                    images = self._draw(painter)
                numbers = from_first_rank(partial(self._score, images))
                row |= {f"eval/{which}/{key}": value for key, value in numbers.items()}
        log_row(trainer, row)

    def _draw(self, painter: Painter) -> list[np.ndarray]:
        """All images on every rank; each draws its share of the batches, all of them equally many."""
        starts = range(0, len(self.lines), self.batch_size)
        mine: dict[int, np.ndarray] = {}
        for first in range(0, len(starts), world()):
            # Sharded weights are gathered by all ranks together, so one without a batch of its own repeats the last.
            number = min(first + rank(), len(starts) - 1)
            part = slice(starts[number], starts[number] + self.batch_size)
            prompts = [line["prompt"] for line in self.lines[part]]
            mine[number] = painter.draw(prompts, self.seeds[part], self.sampler, self.size, self.size)
        parts = [mine]
        if world() > 1:
            parts = [{} for _ in range(world())]
            dist.all_gather_object(parts, mine)
        batches = {number: batch for part in parts for number, batch in part.items()}
        return [image for number in range(len(starts)) for image in batches[number]]

    def _score(self, images: list[np.ndarray]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, metric in self.metrics.items():
            try:
                answer = metric(images, self.lines, self.clusters)
            except ValueError as error:
                warnings.warn(f"evaluation: {error}", stacklevel=2)
                continue
            figures = answer.get("several", {name: answer.get("overall", answer)})
            numbers |= {key: figure["mean"] for key, figure in figures.items()}
            numbers |= {f"{name}/{task}": figure["mean"] for task, figure in answer.get("tasks", {}).items()}
        return numbers


def from_first_rank(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `work` gives on the first rank, on every rank; an error there is raised everywhere.

    Raises:
        RuntimeError: on the other ranks, with the first one's message.
    """
    if world() == 1:
        return work()
    answer: list[Any] = [None, None]
    kept: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                answer[0] = work()
        except Exception as error:
            kept, answer[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0)
    if kept is not None:
        raise kept
    if answer[1] is not None:
        raise RuntimeError(f"evaluation failed on rank 0: {answer[1]}")
    return answer[0]


@contextmanager
def _network(recipe: Any, which: Weights) -> Iterator[Any]:
    """The network in eval mode with the averaged or its own weights."""
    if which == "ema":
        with recipe.averaged("network") as network:
            yield network
        return
    network = recipe.trainables()["network"]
    training = network.training
    network.eval()
    try:
        yield network
    finally:
        network.train(training)
