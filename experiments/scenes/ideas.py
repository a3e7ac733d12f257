"""Trains many recipes of the scenes at once on one CUDA card, judges them, and writes ideas.json beside this file.

An update of a network this small is hundreds of kernels of a few microseconds. Launched one after the other they take
90 ms on an H200; recorded as a CUDA graph and played again, 2.3. An idea is a list of settings of train.py:
experiment=image/scenes under it says what is trained. On a CPU nothing is recorded, which is for trying the script.

PYTHONPATH=. python experiments/scenes/ideas.py [--updates 15000] [--only told ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.data.caption import Caption
from sana.data.synthetic import eval_prompts, example
from sana.metric.scenes import score
from sana.run.build import build
from sana.run.saved import prepare
from sana.scenes import TASKS
from sana.types import Condition

HERE = Path(__file__).resolve().parent
BEFORE = (
    "data.caption.temperature=1.0",
    "data.tasks={single_object:1,colors:1,counting:2,two_object:3,color_attr:3,position:4}",
    "timestep.mean=0.4",
    "optimizer.lr=8e-3",
)
TOLD = (*BEFORE, "data.caption.temperature=0.04")
IDEAS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "before": BEFORE,
    "told": TOLD,
    "told, mean 0.8": (*TOLD, "timestep.mean=0.8"),
    "told, rate 5e-3": (*TOLD, "optimizer.lr=5e-3"),
    "told, rate 1.2e-2": (*TOLD, "optimizer.lr=1.2e-2"),
    "told, deep": (*TOLD, "network.width=128", "network.depth=10", "block.cross.heads=4"),
}
SCENES, PER_TASK, HELD_OUT, SEED = 20_000, 200, 100, 2000  # SCENES: of each task
GUIDANCE = (2.0, 3.0)
SOURCES = ("plain", "photo", "verbose", "terse")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 24


def draw_scenes(job: tuple[str, int, int]) -> tuple[np.ndarray, list[list[dict[str, Any]]]]:
    """Pictures and captions of one task, by a worker."""
    task, first, count = job
    made = [example(0, index, task) for index in range(first, first + count)]
    return np.stack([image for image, _ in made]), [facts["captions"] for _, facts in made]


def judge(pairs: Sequence[tuple[np.ndarray, dict[str, Any]]]) -> list[bool]:
    """Which pictures show their prompts, by a worker."""
    return [bool(score(image, prompt)[0]) for image, prompt in pairs]


class World:
    """Latents and caption features of many scenes, all of them on the device."""

    def __init__(self, config: Any, scenes: int, pool: ProcessPoolExecutor) -> None:
        self.autoencoder = build(config.encoder.autoencoder, "autoencoder").to(DEVICE).eval()
        self.encoder = build(config.encoder.text, "text").to(DEVICE).eval()
        part = min(500, scenes)
        # Far from each other, so that no two tasks share the index of a scene.
        jobs = [(task, 10**7 * (k + 1) + i, part) for k, task in enumerate(TASKS) for i in range(0, scenes, part)]
        latents, self.captions, tasks = [], [], []
        for (task, _, count), (images, captions) in zip(jobs, pool.map(draw_scenes, jobs), strict=True):
            pixels = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                latents.append(self.autoencoder.encode(pixels).float())
            self.captions += captions
            tasks += [TASKS.index(task)] * count
        self.latents, self.tasks = torch.cat(latents), np.array(tasks)
        texts: dict[str, int] = {}
        numbers = [[texts.setdefault(caption["text"], len(texts)) for caption in row] for row in self.captions]
        self.which = torch.tensor(numbers, device=DEVICE)
        self.text, self.mask = self.features(list(texts))
        null, mask = self.features([""])
        self.null, self.null_mask = null[0], mask[0]

    @torch.no_grad()
    def features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(n, TOKENS, c) features and their mask."""
        text = torch.zeros(len(texts), TOKENS, self.encoder.channels, device=DEVICE)
        mask = torch.zeros(len(texts), TOKENS, dtype=torch.bool, device=DEVICE)
        for i in range(0, len(texts), 4096):
            found = self.encoder.encode(texts[i : i + 4096])
            length = found.text.shape[1]
            text[i : i + 4096, :length], mask[i : i + 4096, :length] = found.text, found.mask
        return text, mask


class Run:
    """One recipe: its network, optimizer and average, and an update that can be recorded."""

    def __init__(self, idea: Sequence[str], updates: int, world: World) -> None:
        settings = ["experiment=image/scenes", f"trainer.max_steps={updates}", "model.compile=false", *idea]
        config = prepare("train", settings).config
        self.config, self.world, self.updates, self.done = config, world, updates, 0
        torch.manual_seed(config.seed)
        self.network = build(config.network, "network").to(DEVICE)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.timestep, self.sampler = build(config.timestep, "timestep"), config.sampler
        factory = build(config.optimizer, "optimizer")
        self.rate = torch.tensor(0.0, device=DEVICE)
        more = {"capturable": True} if DEVICE.type == "cuda" else {}
        self.optimizer = factory(self.network.parameters(), lr=self.rate, **more)
        schedule = build(config.schedule, "schedule")
        self.rates = [config.optimizer.lr * float(schedule(k)) for k in range(updates)]
        self.batch, self.decay = int(config.data.batch_size), 1 - float(config.model.ema_decay)
        self.order = self._order()
        self.shares = self._shares()
        self.count = torch.zeros((), dtype=torch.long, device=DEVICE)
        self.graph: torch.cuda.CUDAGraph | None = None
        if DEVICE.type == "cuda":
            self._record()

    def _order(self) -> Tensor:
        """(updates, batch) numbers of scenes, drawn by the weights of their tasks."""
        weights = np.array([self.config.data.tasks[task] for task in TASKS], float)
        each = weights[self.world.tasks] / np.bincount(self.world.tasks)[self.world.tasks]
        generator = torch.Generator().manual_seed(int(self.config.seed) + 1)
        drawn = torch.multinomial(torch.tensor(each), self.updates * self.batch, replacement=True, generator=generator)
        return drawn.view(self.updates, self.batch).to(DEVICE)

    def _shares(self) -> Tensor:
        """(scenes, captions) cumulative probabilities by the recipe's rule."""
        rule = build(self.config.data.caption, "caption")
        rows = [[Caption(c["source"], c["text"], c["score"]) for c in row] for row in self.world.captions]
        return torch.tensor([rule.probabilities(row) for row in rows], device=DEVICE).cumsum(1)

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazily made states and workspaces
                self.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._update()
        self.graph = graph

    def step(self) -> None:
        """The next update."""
        self.rate.fill_(self.rates[self.done])
        if self.graph is None:
            self._update()
        else:
            self.graph.replay()
        self.done += 1

    def _update(self) -> None:
        world, b = self.world, self.batch
        scenes = self.order.index_select(0, self.count.view(1))[0]
        chosen = (torch.rand(b, 1, device=DEVICE) >= self.shares[scenes, :-1]).sum(1)
        caption = world.which[scenes].gather(1, chosen[:, None])[:, 0]
        drop = torch.rand(b, device=DEVICE) < self.config.model.caption_dropout
        text = torch.where(drop[:, None, None], world.null, world.text[caption])
        mask = torch.where(drop[:, None], world.null_mask, world.mask[caption])
        # One time in each of b equal parts of [0, 1), as in training.
        u = (torch.rand(b, device=DEVICE) + torch.rand(b, device=DEVICE).argsort()) / b
        t = self.timestep(u.clamp(max=1 - 2**-24)).view(b, 1)
        x0 = world.latents[scenes].unsqueeze(2)
        eps, s = torch.randn_like(x0), t.view(b, 1, 1, 1, 1)
        velocity = self.network((1 - s) * x0 + s * eps, t, Condition(text, mask))
        self.optimizer.zero_grad(set_to_none=self.done == 0)
        (velocity - (eps - x0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.model.clip_norm, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), self.decay)
        self.count.add_(1)

    @torch.no_grad()
    def draw(self, prompts: list[dict[str, Any]], guidance: float) -> np.ndarray:
        """Pictures (n, 64, 64, 3) of the average network."""
        world, n = self.world, len(prompts)
        text, mask = world.features([prompt["prompt"] for prompt in prompts])
        none, none_mask = world.null.expand_as(text), world.null_mask.expand_as(mask)
        alone, both = Condition(text, mask), Condition(torch.cat([text, none]), torch.cat([mask, none_mask]))
        noise = torch.randn(n, *world.latents.shape[1:2], 1, *world.latents.shape[2:], generator=_seeded()).to(DEVICE)
        latents = build(self.sampler, "sampler", guidance=guidance)(
            lambda x, t: self.average(x, t[:, None].float(), alone),
            lambda x, t: self.average(torch.cat([x, x]), torch.cat([t, t])[:, None].float(), both).chunk(2),
            noise,
        )
        pixels = world.autoencoder.decode(latents.squeeze(2)).float().clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def shares(prompts: Iterable[dict[str, Any]], right: Iterable[bool]) -> dict[str, float]:
    """Share of right pictures by task, and their mean as "overall"."""
    found: dict[str, list[bool]] = {}
    for prompt, good in zip(prompts, right, strict=True):
        found.setdefault(prompt["tag"], []).append(good)
    tasks = {task: round(float(np.mean(values)), 3) for task, values in found.items()}
    return {"overall": round(float(np.mean(list(tasks.values()))), 3), **tasks}


def assess(run: Run, per_task: int, held_out: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Scores at each guidance: of plain and of held-out prompts."""
    plain, held = eval_prompts(per_task, SEED), eval_prompts(held_out, SEED, held_out=True)
    result = {}
    for guidance in GUIDANCE:
        pairs = list(zip(run.draw(plain + held, guidance), plain + held, strict=True))
        parts = [pairs[i : i + 32] for i in range(0, len(pairs), 32)]
        right = [good for part in pool.map(judge, parts) for good in part]
        result[str(guidance)] = {
            "prompts": shares(plain, right[: len(plain)]),
            "held_out": shares(held, right[len(plain) :]),
        }
    return result


def main() -> None:
    """Train all side by side, judge each, write after each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--updates", type=int, default=15_000)
    options.add_argument("--only", nargs="*", choices=list(IDEAS), default=list(IDEAS))
    options.add_argument("--scenes", type=int, default=SCENES, help="of each task")
    options.add_argument("--per-task", type=int, default=PER_TASK, help="prompts")
    options.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts of each task that has them")
    options.add_argument("--json", type=Path, default=HERE / "ideas.json")
    given = options.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 where there is such
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        began = time.perf_counter()
        world = World(prepare("train", ["experiment=image/scenes"]).config, given.scenes, pool)
        runs = {name: Run(IDEAS[name], given.updates, world) for name in given.only}
        print(f"{len(world.tasks)} scenes, {len(runs)} recipes after {time.perf_counter() - began:.0f} s", flush=True)
        began = time.perf_counter()
        for k in range(given.updates):
            for run in runs.values():
                if run.done <= k:
                    run.step()
            if (k + 1) % 500 == 0:
                each = (time.perf_counter() - began) / (k + 1)
                print(f"{k + 1}/{given.updates}, {(given.updates - k - 1) * each:.0f} s to go", flush=True)
        card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        result: dict[str, Any] = {"card": card, "torch": torch.__version__, "updates": given.updates, "ideas": {}}
        for name, run in runs.items():
            result["ideas"][name] = {"settings": IDEAS[name]} | assess(run, given.per_task, given.held_out, pool)
            print(name, json.dumps(result["ideas"][name]), flush=True)
            given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
