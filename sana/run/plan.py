"""``dry_run=true``: what a run would need, on a machine that could not hold it.

The network and the autoencoder are built on the meta device, so parameter counts are exact and cost no
memory; the optimizer takes one step there, so the bytes of its states are those of the real thing.
Activations are what autograd saves in a forward pass of fake tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from sana.run.activations import Shape, kept_bytes
from sana.run.build import build
from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.tree import print_tree
from sana.types import Grid

GEMMA_2_2B = {
    "vocab_size": 256_000, "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
FLOAT, HALF = 4, 2  # bytes
FRUGAL = ("CAME", "CAME8bit", "AdamW8bit")  # optimizers whose states take less than AdamW's


@dataclass(frozen=True)
class Plan:
    """Numbers of one training run, over all devices where nothing else is said.

    Attributes:
        parameters: by part, exact; None where the part's weights are not on this machine.
        devices: processes that share the work.
        sharded: whether weights, gradients and states are split over them.
        weights, gradients, states, average: bytes of one full copy; the states of the optimizer, the moving average.
        frozen: bytes that the encoders take on a device at a time.
        activations: bytes of one micro-batch on one device, at the deepest point of the backward pass.
        batch, micro: samples per update, and per forward pass on one device.
        tokens, text_tokens: per sample.
        flops: forward and backward of the network per update, recomputation included.
        whole: what `activations` would be without recomputation.
    """

    parameters: dict[str, int | None]
    devices: int
    sharded: bool
    weights: int
    gradients: int
    states: int
    average: int
    frozen: int
    activations: int
    batch: int
    micro: int
    tokens: int
    text_tokens: int
    flops: int
    whole: int = 0

    @property
    def per_device(self) -> int:
        """Bytes on one device: states, sharded if they are, frozen parts, and activations."""
        kept = self.weights + self.gradients + self.states + self.average
        return kept // (self.devices if self.sharded else 1) + self.frozen + self.activations


def make_plan(composed: Composed) -> Plan:
    """The plan of a composed training configuration.

    Raises:
        ConfigError: the recipe has no network, or its parts do not fit together.
    """
    config = composed.config
    if config.get("network") is None or config.get("optimizer") is None:
        raise ConfigError("dry_run: plans recipes with a network and an optimizer; this one has none")
    with torch.device("meta"):
        network: Any = build(config.network, "network")
    autoencoder = _on_meta(config.encoder.get("autoencoder"))
    ratio = _ratio(autoencoder, config)
    text_tokens = int(config.encoder.text.get("max_tokens", 300))
    if config.size % ratio:
        raise ConfigError(f"size: {config.size} is not a multiple of the autoencoder's ratio {ratio}")
    patch = int(config.network.get("patch", 1))
    side = config.size // ratio // patch
    grid = Grid(1, side, side)
    devices = _devices(config)
    batch = int(config.data.batch_size)
    micro = int(config.data.get("micro_batch") or batch // devices)
    if micro < 1 or batch % (devices * micro):
        raise ConfigError(f"data.batch_size: {batch} does not divide by {devices} devices x data.micro_batch={micro}")
    every = int(config.network.get("checkpoint_every", 0))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    text = text_parameters(config.encoder.text)
    low = "bf16" in str(composed.resolved["trainer"].get("precision")) or "16-mixed" in str(config.trainer.precision)
    shape = Shape(micro, int(config.network.in_channels), side * patch, text_tokens, int(config.network.text_channels))
    recomputed = sum(1 for i in range(len(network.blocks)) if every and i % every == 0)
    forward = network.flops(grid, text_tokens)
    share = recomputed / len(network.blocks)
    kept = kept_bytes(partial(_shallow, config.network), len(network.blocks), every, shape, low)
    return Plan(
        parameters={
            "network": trained,
            "autoencoder": None if autoencoder is None else _count(autoencoder),
            "text encoder": text,
        },
        devices=devices,
        sharded="sana.strategy.sharded" in str(config.strategy),
        weights=trained * FLOAT,
        gradients=trained * FLOAT,
        states=state_bytes(build(config.optimizer, "optimizer"), network),
        average=0 if config.model.get("ema_decay") is None else trained * FLOAT,
        frozen=frozen_bytes(0 if autoencoder is None else _count(autoencoder), text or 0, config.model.get("frozen")),
        activations=kept.peak,
        batch=batch,
        micro=micro,
        tokens=grid.tokens,
        text_tokens=text_tokens,
        flops=round(forward * (3 + share)) * batch,
        whole=kept.whole,
    )


def frozen_bytes(autoencoder: int, text: int, place: str | None) -> int:
    """Bytes on a device of encoders with so many parameters, where they stay there, in main memory ("cpu"), or come one
    at a time ("offload")."""
    sizes = (autoencoder * FLOAT, text * HALF)
    return {"cpu": 0, "offload": max(sizes)}.get(place or "device", sum(sizes))


def _shallow(node: DictConfig, depth: int, checkpoint_every: int) -> nn.Module:
    """The network cut to `depth` blocks, on the meta device."""
    changed = OmegaConf.merge(node, {"depth": depth, "checkpoint_every": checkpoint_every})
    changed._set_parent(node._get_parent())  # references to other sections still resolve
    with torch.device("meta"):
        return build(changed, "network")  # type: ignore[arg-type]


def _on_meta(node: DictConfig | None) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return build(node, "encoder.autoencoder")
    except ConfigError:
        return None  # its weights are not here


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _ratio(autoencoder: Any, config: DictConfig) -> int:
    if autoencoder is not None:
        return int(autoencoder.ratio)
    ratio = config.encoder.autoencoder.get("ratio")
    if ratio is None:
        raise ConfigError("encoder.autoencoder: its weights are not here, so the size of the latents is not known")
    return int(ratio)


def _devices(config: DictConfig) -> int:
    """Processes of the run; "auto" counts this machine's accelerators, at least one."""
    devices = config.trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = torch.accelerator.device_count() if devices == "auto" else len(devices.split(","))
    elif not isinstance(devices, int):
        devices = len(devices)
    return max(1, devices) * int(config.trainer.get("num_nodes", 1))


def state_bytes(factory: Callable[..., torch.optim.Optimizer], network: nn.Module) -> int:
    """Bytes of an optimizer's states after its first step, taken by one parameter of each shape, without data where
    the optimizer can."""
    shapes = Counter(tuple(p.shape) for p in network.parameters() if p.requires_grad)
    total = 0
    for shape, count in shapes.items():
        with torch.compiler.set_stance("force_eager"):
            try:
                states = _step(factory, shape, "meta")
            except RuntimeError:  # fused kernels exist for real devices only
                states = _step(factory, shape, "cpu")
        total += count * sum(t.numel() * t.element_size() for t in states)
    return total


def _step(factory: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    parameter = nn.Parameter(torch.zeros(shape, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = factory([parameter])
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    # Some are wrappers of what they are made of, such as codes and scales.
    return [part for state in states for part in _parts(state)]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in _parts(getattr(tensor, name))]


def text_parameters(node: DictConfig) -> int | None:
    """Parameters of the text encoder from the numbers of its configuration, or None where they are not
    here."""
    numbers = text_numbers(node)
    return None if numbers is None else gemma2_parameters(numbers)


def text_numbers(node: DictConfig) -> dict[str, Any] | None:
    """The numbers of the text encoder's configuration, by the names of transformers' Gemma2Config; None where they are
    not here."""
    path = node.get("path")
    if path is None:
        with torch.device("meta"):
            return build(node, "encoder.text").model.config.to_dict()
    folder = Path(__file__).resolve().parents[2] / path
    for file in (Path(path) / "config.json", folder / "config.json", folder / "text_encoder" / "config.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return GEMMA_2_2B if "gemma-2-2b" in str(path).lower() else None


def gemma2_parameters(numbers: dict[str, Any]) -> int:
    """Parameters of a Gemma-2 decoder without language-model head: embedding, per layer attention, gated MLP
    and four norms, and the final norm. 2,614,341,888 for gemma-2-2b."""
    d, layers = numbers["hidden_size"], numbers["num_hidden_layers"]
    queries = numbers["num_attention_heads"] * numbers["head_dim"]
    keys = numbers["num_key_value_heads"] * numbers["head_dim"]
    layer = 2 * d * queries + 2 * d * keys + 3 * d * numbers["intermediate_size"] + 4 * d
    return numbers["vocab_size"] * d + layers * layer + d


def print_plan(composed: Composed, console: Console | None = None) -> None:
    """Print the settings and the plan."""
    console = console or Console()
    print_tree(composed, console)
    plan = make_plan(composed)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for part, count in plan.parameters.items():
        node = composed.resolved["network"] if part == "network" else composed.resolved["encoder"]
        target = node.get("_target_") or node["autoencoder" if part == "autoencoder" else "text"]["_target_"]
        shown = "not known: its weights are not on this machine" if count is None else f"{count:,}"
        table.add_row(f"parameters, {part}", shown, escape(str(target)))
    for name, size, note in (
        ("weights", plan.weights, "fp32, one full copy"),
        ("gradients", plan.gradients, "fp32"),
        ("optimizer states", plan.states, str(composed.resolved["optimizer"]["_target_"])),
        ("moving average", plan.average, "model.ema_decay"),
        ("frozen encoders", plan.frozen, "on a device: autoencoder fp32, text encoder bf16"),
        ("activations", plan.activations, f"{plan.micro} samples on one device"),
        ("per device", plan.per_device, _sharing(plan)),
    ):
        table.add_row(name, f"{size / 2**30:,.3f} GiB", escape(note))
    table.add_row("samples per update", f"{plan.batch:,}", f"{plan.devices} device(s) x {plan.micro} x accumulation")
    table.add_row("tokens per update", f"{plan.batch * plan.tokens:,}", f"{plan.tokens:,} per image")
    table.add_row("text tokens per update", f"{plan.batch * plan.text_tokens:,}", f"{plan.text_tokens} per caption")
    table.add_row("FLOPs per update", f"{plan.flops:.4g}", "network, forward, backward and recomputation")
    console.print(table)
    for line in switches(composed, plan):
        console.print(escape(line))


def switches(composed: Composed, plan: Plan | None = None) -> list[str]:
    """A line for each way of saving memory that is on: what it saves, by the plan. [] where none is.

    Args:
        composed: a checked training configuration.
        plan: its plan, made here if need be.
    """
    values, lines = composed.resolved, []
    network, model, data = values["network"], values["model"], values["data"]
    if network is None or values["optimizer"] is None:
        return []
    target = str(values["optimizer"]["_target_"]).rpartition(".")[2]
    every = int(network.get("checkpoint_every", 0))
    frugal = target in FRUGAL
    place = model.get("frozen", "device")
    if every or frugal or place != "device":
        try:
            plan = plan or make_plan(composed)
        except ConfigError as error:  # not known here; what is wrong with a run, its own parts say when they are built
            lines.append(f"memory: {error}; what is saved cannot be said")
    if every and plan is not None:
        whole = plan.whole
        kept = network.get("checkpoint_keep", "input")
        lines.append(
            f"recomputation: on for every {every}. block, which keeps its {kept}: {_gib(plan.activations)} of "
            f"activations instead of {_gib(whole)} per micro-batch, {_gib(whole - plan.activations)} less"
        )
    if frugal and plan is not None:
        plain = 2 * plan.weights
        lines.append(
            f"optimizer states: {target} keeps {_gib(plan.states)}, {_gib(plain - plan.states)} less than AdamW"
        )
    if place != "device" and plan is not None:
        count = {name: plan.parameters.get(name) or 0 for name in ("autoencoder", "text encoder")}
        all_of_it = frozen_bytes(count["autoencoder"], count["text encoder"], None)
        lines.append(f"frozen encoders: {place}, {_gib(all_of_it - plan.frozen)} less on each device")
    if model.get("compile"):
        lines.append("compile: on, block by block; what it fuses is not kept (not predicted here)")
    for key, part in (("cache_latents", "autoencoder"), ("cache_text", "text encoder")):
        if data.get(key):
            lines.append(f"data.{key}: on, the {part} does not run in the step: neither its time nor its activations")
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f} GiB"


def _sharing(plan: Plan) -> str:
    if not plan.sharded:
        return "every device has all of it"
    return f"weights, gradients, states and average shared by {plan.devices}"
