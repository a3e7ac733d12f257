"""The keys at the top of each configuration. A `Node` is what a group of conf/ puts there: a mapping with
`_target_`, whose keys are the arguments of what it names.

These classes are read, not instantiated: `sana.run.schema` finds their fields like those of any constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Node = Mapping[str, Any]
Nodes = Mapping[str, Node | None]


@dataclass
class Run:
    """Where a run keeps its records.

    Attributes:
        name: of the recipe; runs of one name lie side by side.
        folder: where all runs are kept.
        dir: an explicit directory instead of ``folder/name/<date>_<time>_<n>``; new or empty.
    """

    name: str
    folder: str
    dir: str | None = None


@dataclass
class Encoder:
    """The frozen encoders."""

    autoencoder: Node | None = None
    text: Node | None = None


@dataclass
class Train:
    """Keys of conf/train.yaml.

    Attributes:
        seed: of all randomness of the run.
        size: pixels of an image's side.
        dry_run: print the plan of the run (parameters, memory, FLOPs) instead of running.
        resume: a checkpoint, or the directory of a run, to go on from; in a new run directory.
        block: one layer of the network, which `network.blocks` refers to.
        strategy: how the run is spread over devices; "auto" leaves it to Lightning.
        quant: quantisation; a training run takes null only.
        callback, logger: by name; null switches one off.
    """

    seed: int
    size: int
    dry_run: bool
    resume: str | None
    run: Run
    model: Node
    data: Node
    trainer: Node
    strategy: Node | str
    callback: Nodes
    logger: Nodes
    quant: Node | None = None
    network: Node | None = None
    block: Node | None = None
    encoder: Encoder | None = None
    objective: Node | None = None
    timestep: Node | None = None
    sampler: Node | None = None
    optimizer: Node | None = None
    schedule: Node | None = None


@dataclass
class Timestep:
    """What sampling takes over from training: the flow shift, null for that of the run."""

    shift: float | None = None


@dataclass
class Autoencoder:
    """How the autoencoder keeps within the memory there is; null keeps what the run's recipe says.

    Attributes:
        max_memory_gib: what it may take, weights included; beyond it, exact tiles.
        blending: [tile, stride] in pixels of diffusers' cross-faded tiles, for parity only.
    """

    max_memory_gib: float | None = None
    blending: list[int] | None = None


@dataclass
class Sample:
    """Keys of conf/sample.yaml.

    Attributes:
        ckpt: a checkpoint, or the directory of a run, whose newest one is taken.
        prompt: what to draw.
        negative: what to steer away from; "" is the null embedding.
        n: images of the prompt, at seeds seed, seed + 1, ...
        seed: of the first image.
        size: pixels of a side; null takes the size of training.
        out: folder of the images; null is "drawn" in the run's directory.
        batch_size: images per call of the network.
        device: "auto", or a torch device.
        precision: of the network.
        weights: the averaged ("ema") or the last ("live") weights of the network.
    """

    ckpt: str
    prompt: str
    negative: str
    n: int
    seed: int
    size: int | None
    out: str | None
    batch_size: int
    device: str
    precision: Literal["auto", "bf16-mixed", "32-true"]
    weights: Literal["ema", "live"]
    timestep: Timestep
    autoencoder: Autoencoder
    sampler: Node
    quant: Node | None = None


@dataclass
class Eval:
    """Keys of conf/eval.yaml.

    Attributes:
        ckpt: a checkpoint, or the directory of a run, whose newest one is taken.
        per_task: prompts of each task.
        held_out: prompts of each task over combinations that training never saw.
        samples: images per prompt.
        seed: of the prompts and of the noise.
        size: pixels of a side; null takes the size of training.
        out: folder of the images; null makes one in the run's directory.
        batch_size: images per call of the network.
        device: "auto", or a torch device.
        precision: of the network.
        weights: the averaged ("ema") or the last ("live") weights of the network.
        metric: what to measure, by name.
    """

    ckpt: str
    per_task: int
    held_out: int
    samples: int
    seed: int
    size: int | None
    out: str | None
    batch_size: int
    device: str
    precision: Literal["auto", "bf16-mixed", "32-true"]
    weights: Literal["ema", "live"]
    timestep: Timestep
    autoencoder: Autoencoder
    sampler: Node
    metric: Nodes
    quant: Node | None = None


# Arguments that a node's constructor has but that belong to another key, which is named instead of ignoring
# them.
ELSEWHERE = {
    "trainer.accumulate_grad_batches": "model.accumulate",
    "trainer.callbacks": "callback",
    "trainer.default_root_dir": "run.dir",
    "trainer.enable_checkpointing": "callback.checkpoints",
    "trainer.enable_progress_bar": "callback.progress",
    "trainer.gradient_clip_algorithm": "model.clip_norm",
    "trainer.gradient_clip_val": "model.clip_norm",
    "trainer.log_every_n_steps": "callback.records.every",
    "trainer.logger": "logger",
    "trainer.strategy": "strategy",
}
