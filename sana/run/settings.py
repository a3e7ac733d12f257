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
        resume: a checkpoint, or the directory of a run, to go on from in a new run directory; "auto": go on in the
            directory of this very run, in `run.dir` or where the same settings ran before, or start if there is none.
        allow_partial: resume from a checkpoint that lacks something, which then starts anew.
        init: weights to start from: anything that `ckpt` of sample.py takes. With resume=auto they are for the first
            part of the run.
        start: what is made of them: see `sana.model.start`.
        kernels: "auto": Triton's where the tensors are on CUDA; "naive": plain torch; "triton": Triton's or an error.
            How fast a run is, not what it computes: a run may go on with other kernels.
        block: one layer of the network, which `network.blocks` refers to.
        strategy: how the run is spread over devices; "auto" leaves it to Lightning.
        quant: quantisation of products; a training run takes null or fp8_train.
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
    allow_partial: bool = False
    kernels: Literal["auto", "naive", "triton"] = "auto"
    init: str | None = None
    start: Node | None = None
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
class Dtype:
    """Precision of the encoders while drawing; float16 is refused with the reason.

    Attributes:
        autoencoder: "auto": weights as in the recipe, under the network's precision. "float32", "bfloat16": that, and
            not under the network's precision.
        text: "auto": as in the recipe; "float32" or "bfloat16".
    """

    autoencoder: str
    text: str


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
        ckpt: a run (its newest checkpoint), a checkpoint, an original .pth, a safetensors file, a diffusers folder,
            hf://organisation/repository[/file], or the name of a shipped model.
        prompt: what to draw: a text, a list of texts, or a .txt, .json or .jsonl file of prompts.
        negative: what to steer away from; "" is the null embedding.
        negative_mask: which rows of the negative prompt count: its "own", or as many as the "caption" has; null as in
            training.
        n: images of each prompt, at seeds seed, seed + 1, ...; null is 4, or the number of seeds.
        seed: of the first image of each prompt, or a list with one seed per image.
        best_of: candidates per prompt, of which `judge` chooses; null draws without choosing.
        keep: how many are kept, best first; null is 1.
        keep_all: keep all candidates as well, in the folder "pool", where another judge can look at them.
        dry_run: print the memory that drawing would take instead of drawing; needs no prompt (one image is planned)
            and, with `recipe`, no weights.
        size: nominal resolution of the model; null takes the size of training.
        width, height: pixels of the images; null is size.
        bins: draw at the nearest of the published sizes (512, 1024, 2048, 4096 px), then resize and crop.
        out: folder of the images; null is "drawn" in the run's directory.
        layout: how files are named, by prompt ("flat") or as GenEval's scorer reads them ("geneval").
        grid: also write all images as one labelled picture, grid.png.
        preview: show the current batch in .preview.png at every so many steps; 0 for not.
        batch_size: images per call of the network.
        device: "auto", or a torch device.
        kernels: "auto": Triton's where the tensors are on CUDA; "naive": plain torch; "triton": Triton's or an error.
            Images that were drawn with other kernels count as drawn.
        graphs: "auto": CUDA graphs of the network and the autoencoder where they help, on CUDA without offload; false:
            none. Images that were drawn with others count as drawn.
        compile: compile the blocks of the network and of the decoder, which takes half a minute: false, true, or "auto"
            for the shapes where a measurement, kept in the user's cache, says that it is faster. As `graphs`.
        offload: keep parts in main memory while they do not work ("model"), or even single layers ("sequential").
        precision: of the network: "auto", "bf16-mixed", "bf16-true" (weights too) or "32-true".
        dtype: of the encoders.
        weights: the averaged ("ema") or the last ("live") weights of the network.
        recipe: experiment of conf/ that weights without a run were trained like; with dry_run and without weights,
            an experiment or a model.
        allow_missing, allow_extra: names or patterns of tensors that the checkpoint may lack or have over.
        judge: who chooses with `best_of`; null without.
    """

    ckpt: str
    prompt: str | list[str]
    negative: str
    negative_mask: Literal["own", "caption"] | None
    n: int | None
    seed: int | list[int]
    best_of: int | None
    keep: int | None
    keep_all: bool
    dry_run: bool
    size: int | None
    width: int | None
    height: int | None
    bins: bool
    out: str | None
    layout: Literal["flat", "geneval"]
    grid: bool
    preview: int
    batch_size: int
    device: str
    kernels: Literal["auto", "naive", "triton"]
    graphs: Literal["auto", False]
    compile: Literal[False, True, "auto"]
    offload: Literal["none", "model", "sequential"]
    precision: str
    dtype: Dtype
    weights: Literal["ema", "live"]
    recipe: str | None
    allow_missing: list[str]
    allow_extra: list[str]
    timestep: Timestep
    autoencoder: Autoencoder
    sampler: Node
    quant: Node | None = None
    judge: Node | None = None


@dataclass
class Eval:
    """Keys of conf/eval.yaml.

    Attributes:
        ckpt: a run (its newest checkpoint), a checkpoint, an original .pth, a safetensors file, a diffusers folder,
            hf://organisation/repository[/file], or the name of a shipped model; null with `images`.
        images: a folder of images made elsewhere, to score instead of drawing.
        metadata: file of prompts, to draw or that `images` belong to.
        reference: real images, for the metrics that compare with some: folder, shards or ``.npz``.
        features: weights of Inception, for the metrics that use it.
        allow_small_n: let FID take fewer images than features.
        output: file of the results; null is results.json in the run's directory, or in the folder of `images`.
        per_task: prompts of each task.
        held_out: prompts of each task over combinations that training never saw.
        samples: images per prompt.
        seed: of the prompts and of the noise.
        size: pixels of a side; null takes the size of training.
        out: folder of the images; null makes one in the run's directory.
        batch_size: images per call of the network.
        device: "auto", or a torch device.
        kernels: "auto": Triton's where the tensors are on CUDA; "naive": plain torch; "triton": Triton's or an error.
            Images that were drawn with other kernels count as drawn.
        graphs: "auto": CUDA graphs of the network and the autoencoder where they help, on CUDA without offload; false:
            none. Images that were drawn with others count as drawn.
        compile: compile the blocks of the network and of the decoder, which takes half a minute: false, true, or "auto"
            for the shapes where a measurement, kept in the user's cache, says that it is faster. As `graphs`.
        precision: of the network.
        weights: the averaged ("ema") or the last ("live") weights of the network.
        recipe: experiment of conf/ that weights without a run were trained like.
        allow_missing, allow_extra: names or patterns of tensors that the checkpoint may lack or have over.
        metric: what to measure, by name.
    """

    ckpt: str | None
    images: str | None
    metadata: str | None
    reference: str | None
    features: str | None
    allow_small_n: bool
    output: str | None
    per_task: int
    held_out: int
    samples: int
    seed: int
    size: int | None
    out: str | None
    batch_size: int
    device: str
    kernels: Literal["auto", "naive", "triton"]
    graphs: Literal["auto", False]
    compile: Literal[False, True, "auto"]
    precision: Literal["auto", "bf16-mixed", "32-true"]
    weights: Literal["ema", "live"]
    recipe: str | None
    allow_missing: list[str]
    allow_extra: list[str]
    timestep: Timestep
    autoencoder: Autoencoder
    metric: Nodes
    sampler: Node | None = None
    quant: Node | None = None


@dataclass
class Importance:
    """Keys of conf/importance.yaml.

    Attributes:
        ckpt: as for sample.py; averaged weights where there are any, as `init` of train.py takes them.
        prompt: calibration prompts: a list of texts, or a .txt, .json or .jsonl file; null: 100 of the scenes world for
            networks that learnt it, 100 descriptions of photographs for others.
        out: folder of the report; null makes one in the run's directory.
        seed: of the noise of the first prompt; the others have seed + 1, ...
        size: pixels of a side; null takes the size of training.
        batch_size: prompts per call of the network; each process takes a share of the batches.
        device: "auto", or a torch device.
        precision: of the network.
        recipe: experiment of conf/ that weights without a run were trained like.
        allow_missing, allow_extra: names or patterns of tensors that the checkpoint may lack or have over.
    """

    ckpt: str
    prompt: str | list[str] | None
    out: str | None
    seed: int
    size: int | None
    batch_size: int
    device: str
    precision: Literal["auto", "bf16-mixed", "32-true"]
    recipe: str | None
    allow_missing: list[str]
    allow_extra: list[str]
    timestep: Timestep
    sampler: Node


@dataclass
class Quantise:
    """Keys of conf/quantise.yaml.

    Attributes:
        ckpt: as for sample.py, in full precision.
        quant: the quantisation.
        out: the file to write, new; its report goes beside it.
        prompt: what errors are measured on, and what is calibrated on where the quantisation calibrates: a list of
            texts, or a .txt, .json or .jsonl file; null: some of those that scripts/importance.py has.
        seed: of the noise of the first prompt; the others have seed + 1, ...
        size: pixels of a side; null takes the size of training.
        batch_size: prompts per call of the network.
        device: "auto", or a torch device.
        precision: of the network, while errors are measured.
        weights: the averaged ("ema") or the last ("live") weights of the network.
        recipe: experiment of conf/ that weights without a run were trained like.
        allow_missing, allow_extra: names or patterns of tensors that the checkpoint may lack or have over.
    """

    ckpt: str
    quant: Node | None
    out: str
    prompt: str | list[str] | None
    seed: int
    size: int | None
    batch_size: int
    device: str
    precision: Literal["auto", "bf16-mixed", "32-true"]
    weights: Literal["ema", "live"]
    recipe: str | None
    allow_missing: list[str]
    allow_extra: list[str]
    timestep: Timestep
    sampler: Node


@dataclass
class Sweep:
    """Keys of conf/sweep.yaml.

    Attributes:
        sweep: which runs ``-m`` makes, and how they are judged.
    """

    sweep: Node


# Arguments that a node's constructor has but that belong to another key, which is named instead of ignoring
# them.
ELSEWHERE = {
    "trainer.accumulate_grad_batches": "data.micro_batch",
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
