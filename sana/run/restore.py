"""The parts that a checkpoint belongs to, built again for drawing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from sana.checkpoint.record import read_quantisation
from sana.ops.choice import set_kernels
from sana.run.build import build
from sana.run.compose import Composed
from sana.run.environment import describe_git, fast_precision
from sana.run.error import ConfigError
from sana.run.runs import find_weights
from sana.run.saved import training
from sana.run.sidecar import file_digest

OF_TRAINING = ("teacher", "discriminator")  # parts of recipes that are not needed to draw


@dataclass(frozen=True)
class Restored:
    """A recipe with fresh weights, and what drawing with its checkpoint depends on.

    Attributes:
        module: the recipe, built as it was for training.
        training: the configuration that the weights were trained with.
        checkpoint: file or folder of the weights.
        run: the directory of their run, or one under runs/loaded for weights that come without a run.
        device: where to draw.
        bf16: whether autocast to bf16 is on while drawing.
        quant: how the checkpoint is quantised, as its record says it; None where it is not.
    """

    module: Any
    training: DictConfig
    checkpoint: Path
    run: Path
    device: torch.device
    bf16: bool
    quant: dict[str, Any] | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of drawing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def facts(self, composed: Composed) -> dict[str, Any]:
        """What an image depends on besides prompt and seed, for its sidecar."""
        sampler = composed.resolved["sampler"]
        return {
            "steps": sampler["steps"],
            "guidance": sampler["guidance"],
            "sampler": sampler,
            "weights": composed.config.weights,
            "quant": composed.resolved["quant"] or (self.quant or {}).get("quant"),
            "precision": "bf16" if self.bf16 else "fp32",
            "checkpoint": file_digest(self.checkpoint),
            "commit": (describe_git()[0] or {}).get("commit"),
        }


def restore(composed: Composed) -> Restored:
    """Build the recipe that belongs to what `ckpt` leads to; its weights are for `sana.model.load` to put in.

    Args:
        composed: a sampling or evaluation that passed the check.

    Raises:
        ConfigError: no such checkpoint or device, or a part of the recipe is not on this machine.
    """
    config = composed.config
    set_kernels(config.get("kernels", "auto"))
    found = find_weights(config.ckpt)
    recipe = training(found, config.get("recipe")).config
    device = choose_device(config.device)
    precision = fast_precision() if config.precision == "auto" else config.precision
    parts: dict[str, Any] = {} if config.get("allow_missing") else {"network": empty_network(recipe.model)}
    if recipe.model.get("compile"):  # a minute, and a C++ compiler on CPUs: what training pays back, drawing does not
        parts["compile"] = False
    parts = {name: part for name, part in parts.items() if part is not None}
    parts |= {name: None for name in OF_TRAINING if recipe.model.get(name) is not None}
    module = build(recipe.model, "model", **parts)
    bf16 = precision == "bf16-mixed"
    if "autoencoder" in config:
        _limit_memory(module.frozen.autoencoder, config, bf16)
    return Restored(module, recipe, found.path, found.home, device, bf16, read_quantisation(found.path))


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto": a CUDA card, else Apple's GPU, else the CPU.

    Raises:
        ConfigError: no such device, or none on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not a device; write cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not cuda:
        raise ConfigError(f"device: {name} is not here; this machine has no CUDA device")
    if device.type == "mps" and not mps:
        raise ConfigError(f"device: {name} is not here; it needs a Mac with Apple silicon")
    return device


def empty_network(model: DictConfig) -> Any:
    """The network on the meta device, as its weights come from the checkpoint; None where some of it would not."""
    if model.get("network") is None:
        return None
    with torch.device("meta"):
        network = build(model.network, "model.network")
    stored = network.state_dict().keys()
    return network if all(name in stored for name, _ in network.named_buffers()) else None


def _limit_memory(autoencoder: Any, config: DictConfig, bf16: bool) -> None:
    """Set what `autoencoder` says of memory, and refuse what does not hold an image of the size asked for."""
    given = config.autoencoder
    try:
        if given.max_memory_gib is not None or given.blending is not None:
            autoencoder.limit_memory(given.max_memory_gib, None if given.blending is None else list(given.blending))
        if getattr(autoencoder, "max_memory_gib", None) is not None:
            side = int(config.size) // autoencoder.ratio
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                autoencoder.plan("decode", torch.empty(1, autoencoder.channels, side, side))
    except ValueError as error:
        raise ConfigError(str(error)) from None
