"""``dry_run=true`` of sample.py: the memory that drawing would take, on a machine that could not hold it.

Every part is built on the meta device in the precision and quantisation asked for, so bytes of weights are exact. What
the parts allocate while they work is counted by running them on tensors without data. So the plan needs no weights:
`recipe=` alone will do. Not counted are what a process holds besides (on a card the CUDA context) and what a library
allocates inside one call; and some kernels for GPUs need less than the plain operations that are counted here.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.aspect_ratio import drawn_size
from sana.checkpoint.record import read_quantisation
from sana.nn.inference import cast_once
from sana.quant.rebuild import kinds_of, rebuild
from sana.quant.report import arithmetic
from sana.run.build import build
from sana.run.calibration_plan import calibration_peak
from sana.run.compose import Composed
from sana.run.dtype import check_dtypes
from sana.run.error import ConfigError
from sana.run.part_plan import DTYPES, Text, largest_at_once, peak_of, text_of, weight_bytes
from sana.run.prompts import read_prompts
from sana.run.runs import find_weights
from sana.run.saved import training_behind
from sana.types import Condition, Prepared

CARDS = (8, 12, 16, 24, 40, 80)  # GiB
GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """What is on the device while one part works.

    Attributes:
        weights: bytes of parameters and buffers that are there.
        activations: bytes of what the part allocates, at the worst moment, its inputs included.
    """

    weights: int
    activations: int

    @property
    def bytes(self) -> int:
        """Of both."""
        return self.weights + self.activations


@dataclass(frozen=True)
class DrawingPlan:
    """Memory of one drawing.

    Attributes:
        parts: name -> bytes of its weights as they are loaded, quantised where they are.
        stages: name of the part that works -> what is on the device meanwhile; "calibration" is that of a format which
            is fitted to the network's work, before anything is drawn.
        images: drawn at once.
        height, width: pixels that the network draws.
        tile: side in pixels of the autoencoder's largest tile, None where it decodes the whole at once.
        quant: format of the network's weights.
    """

    parts: dict[str, int]
    stages: dict[str, Stage]
    images: int
    height: int
    width: int
    tile: int | None
    quant: str = "none"

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(stage.bytes for stage in self.stages.values())

    @property
    def card(self) -> int | None:
        """Memory in GiB of the smallest common card that holds the peak; None where none does."""
        return next((card for card in CARDS if self.peak < card * GIB), None)


def make_drawing_plan(composed: Composed) -> DrawingPlan:
    """The plan of a composed sampling, which `sana.run.saved.prepare` has filled from its run or recipe.

    Raises:
        ConfigError: no recipe, parts whose sizes are not known here, or a size or precision that cannot be drawn.
    """
    config = composed.config
    check_dtypes(config.precision, config.dtype.autoencoder, config.dtype.text)
    model = training_behind(config).config.model
    autocast = config.precision in ("auto", "bf16-mixed")
    network, autoencoder = _network(config, model), _autoencoder(config, model)
    unquantised = copy.deepcopy(network) if calibrates(config) else None
    network = quantised = _quantised(network, config)
    uncast = weight_bytes(autoencoder)
    inside = autocast and config.dtype.autoencoder == "auto"
    if autocast:
        cast_once(network, autoencoder if inside else None)
    text = text_of(config, model)
    ratio = autoencoder.ratio
    height, width = _size(config, ratio * network.patch)
    images = images_at_once(composed.resolved)
    fake, quant = FakeTensorMode(allow_non_fake_inputs=True), kinds_of(network)
    parts = {"text encoder": text.bytes, "network": weight_bytes(network), "autoencoder": weight_bytes(autoencoder)}
    resident = {
        "text encoder": text.largest,
        "network": largest_at_once(network, config.offload),
        "autoencoder": largest_at_once(autoencoder, config.offload),
    }
    arithmetic(network, torch.device("cpu"))  # some formats try the processor out, which they cannot on fake tensors
    with fake:
        network, autoencoder = network.to_empty(device="cpu"), autoencoder.to_empty(device="cpu")
    latents = (images, autoencoder.channels, height // ratio, width // ratio)
    pairs = _pairs(config, network)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), fake:
        drawing = _denoising(network, latents, pairs, int(config.sampler.steps), text)
    with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
        decoding, tile = _decoding(autoencoder, latents, parts["autoencoder"], fake)
    working = {"text encoder": text.activations, "network": drawing, "autoencoder": decoding}
    everything = sum(parts.values())
    stages = {name: Stage(everything if config.offload == "none" else resident[name], working[name]) for name in parts}
    if unquantised is not None:
        there = parts["text encoder"] + weight_bytes(unquantised) + uncast
        stages["calibration"] = Stage(there, _calibration(config, unquantised, quantised, ratio, autocast, text))
    return DrawingPlan(parts, stages, images, height, width, tile, quant)


def _network(config: DictConfig, model: DictConfig) -> Any:
    if model.get("network") is None:
        raise ConfigError(f"dry_run: {model._target_} has no network that draws")
    with torch.device("meta"):
        network = build(model.network, "network").eval().requires_grad_(False)
        if config.precision == "bf16-true":
            _cast(network, torch.bfloat16)
    return network


def _quantised(network: Any, config: DictConfig) -> Any:
    """The network in the format asked for, or as the checkpoint is."""
    with torch.device("meta"):
        return _as_in_file(network, config) if config.quant is None else build(config.quant, "quant")(network)


def calibrates(config: DictConfig) -> bool:
    """Whether the format asked for is fitted to what the network meets."""
    return config.quant is not None and getattr(build(config.quant, "quant"), "calibrates", False)


def _calibration(config: DictConfig, network: Any, quantised: Any, ratio: int, autocast: bool, text: Text) -> int:
    """Bytes that a calibration allocates, on the prompts and in the batches of `sana.model.quantise`."""
    quant, sampler = build(config.quant, "quant"), config.sampler
    count = quant.prompts if isinstance(quant.prompts, int) else len(quant.prompts)
    images, side = min(count, int(config.batch_size)), int(config.size) // ratio
    latents = (images, network.in_channels, side, side)
    pairs = _pairs(config, network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
    return calibration_peak(
        quant,
        network,
        quantised,
        lambda given: _prepared(given, images, pairs, int(sampler.steps), text),
        lambda given, prepared: _step(given, latents, pairs, prepared),
        batches=-(-count // images),
        calls=int(sampler.steps) * (2 if sampler.get("pag_scale") else 1),
        latents=4 * pairs * math.prod(latents),
        autocast=autocast,
    )


def _pairs(config: DictConfig, network: Any) -> int:
    """Latents that the network is given of each image: two where guidance is by difference."""
    return 2 if config.sampler.guidance != 1 and network.guidance_embed is None else 1


def _as_in_file(network: Any, config: DictConfig) -> Any:
    """The network quantised as the checkpoint is, if it is."""
    if OmegaConf.is_missing(config, "ckpt"):
        return network
    found = find_weights(str(config.ckpt))
    quant = None if found.of_run else read_quantisation(found.path)
    if quant is None:
        return network
    try:
        return rebuild(network, quant["layers"])
    except ValueError as error:
        raise ConfigError(f"{found.path}: the record of its quantisation is wrong: {error}") from None


def _autoencoder(config: DictConfig, model: DictConfig) -> Any:
    try:
        with torch.device("meta"):
            autoencoder = build(model.autoencoder, "encoder.autoencoder").requires_grad_(False)
    except ConfigError as error:
        raise ConfigError(f"dry_run: the autoencoder's size is not known without its file: {error}") from None
    if config.dtype.autoencoder != "auto":
        _cast(autoencoder, DTYPES[config.dtype.autoencoder])
    given = config.autoencoder
    if given.max_memory_gib is not None or given.blending is not None:
        try:
            autoencoder.limit_memory(given.max_memory_gib, None if given.blending is None else list(given.blending))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return autoencoder


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only, as for drawing."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _denoising(network: Any, latents: tuple[int, int, int, int], pairs: int, steps: int, text: Text) -> int:
    """Bytes that drawing allocates, fake tensors given: the caption's keys and values, and one step."""
    return peak_of(lambda: _step(network, latents, pairs, _prepared(network, latents[0], pairs, steps, text)))


def _prepared(network: Any, images: int, pairs: int, steps: int, text: Text) -> Prepared:
    """What all steps share, fake."""
    prompts = Condition(torch.empty(images + pairs - 1, text.rows, text.channels, dtype=text.dtype))
    guidance = None if network.guidance_embed is None else torch.empty(images)
    kv = network.prepare(prompts).text_kv
    kv = tuple(layer[torch.zeros(pairs * images, dtype=torch.long)] for layer in kv) if pairs > 1 else kv
    times = network.prepare_times(torch.empty(steps), guidance)
    mask = torch.ones(pairs * images, text.rows, dtype=torch.bool)
    return Prepared(kv, mask, guidance, times)


def _step(network: Any, latents: tuple[int, int, int, int], pairs: int, prepared: Prepared) -> None:
    """One call of the network, fake."""
    b, c, h, w = latents
    x = torch.empty(b, c, 1, h, w)
    both = torch.cat([x] * pairs)
    network(both, torch.zeros(pairs * b, 1), prepared)


def _decoding(autoencoder: Any, latents: tuple[int, ...], weights: int, fake: FakeTensorMode) -> tuple[int, int | None]:
    """Bytes that decoding allocates, and the side in pixels of the largest tile; None: the whole at once."""
    dtype = next(autoencoder.parameters()).dtype
    with fake:
        like = torch.empty(latents, dtype=dtype)
    try:
        if autoencoder.blending is not None:
            return _blended(autoencoder, like, fake), autoencoder.blending[0]
        plan = autoencoder.plan("decode", like)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    pitches = [(s.tile, latents[2] * autoencoder.ratio // s.sizes[-1][0]) for s in plan.segments if s.tile is not None]
    return plan.bytes - weights, max((tile * pitch for tile, pitch in pitches), default=None)


def _blended(autoencoder: Any, like: Tensor, fake: FakeTensorMode) -> int:
    with fake:
        return peak_of(lambda: autoencoder.decode(like))


def _size(config: DictConfig, multiple: int) -> tuple[int, int]:
    height, width = config.height or config.width or config.size, config.width or config.height or config.size
    try:
        return drawn_size(height, width, config.size, multiple, config.bins)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def images_at_once(settings: dict[str, Any]) -> int:
    """Images per call of the network: of the prompts that are given, or one where none is."""
    if settings["prompt"] == "???":
        return min(settings["batch_size"], settings["n"] or 1)
    seeds = settings["seed"]
    each = settings["best_of"] or settings["n"] or (4 if isinstance(seeds, int) else len(seeds))
    return min(settings["batch_size"], each * len(read_prompts(settings["prompt"])))


def advice(composed: Composed, plan: DrawingPlan) -> str | None:
    """What would lower the peak without changing an image, in one line; None where nothing would."""
    decoding = plan.stages["autoencoder"]
    others = max(stage.bytes for name, stage in plan.stages.items() if name != "autoencoder")
    if decoding.bytes <= others or plan.tile is not None:
        return None
    budget = max(others - decoding.weights, GIB // 4) + plan.parts["autoencoder"]
    gib = max(1, -(-budget * 4 // GIB)) / 4  # in quarters
    config = composed.config.copy()
    config.autoencoder.max_memory_gib = gib
    try:
        tiled = make_drawing_plan(Composed(composed.entry, config, composed.overrides))
    except ConfigError:
        return None
    if tiled.peak >= plan.peak:
        return None
    return f"autoencoder.max_memory_gib={gib:g} decodes in exact tiles: a peak of {tiled.peak / GIB:.2f} GiB"


def print_drawing_plan(composed: Composed, console: Console | None = None) -> None:
    """Print the plan."""
    console = console or Console()
    plan, config = make_drawing_plan(composed), composed.config
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    what: dict[str, str] = {
        "network": _how(config, plan),
        "autoencoder": f"dtype.autoencoder={config.dtype.autoencoder}",
    }
    for name, size in plan.parts.items():
        table.add_row(f"weights, {name}", _gib(size), escape(what.get(name, f"dtype.text={config.dtype.text}")))
    for name, stage in plan.stages.items():
        there = "all parts" if config.offload == "none" else "alone"
        if name == "calibration":
            there = "all parts, the network in full precision"
        note = f"{there} {_gib(stage.weights)} + {_gib(stage.activations)} at work"
        if name == "autoencoder" and plan.tile is not None:
            note += f", in tiles of up to {plan.tile} px"
        during = "during calibration" if name == "calibration" else f"while the {name} works"
        table.add_row(during, _gib(stage.bytes), escape(note))
    card = (
        f"fits a card of {plan.card} GB, without its CUDA context"
        if plan.card
        else f"more than a card of {CARDS[-1]} GB has"
    )
    size = f"{plan.images} image(s) of {plan.width}x{plan.height} px at once, offload={config.offload}"
    table.add_row("peak", _gib(plan.peak), escape(f"{card}; {size}"))
    console.print(table)
    if (line := advice(composed, plan)) is not None:
        console.print(escape(line))


def _how(config: DictConfig, plan: DrawingPlan) -> str:
    """Precision and quantisation of the network, in words."""
    precision = "bf16-mixed, as a card has it" if config.precision == "auto" else config.precision
    stored = ", as in the file" if plan.quant != "none" and config.quant is None else ""
    return f"precision={precision}, quant={plan.quant}{stored}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
