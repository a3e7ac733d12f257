"""From a checkpoint to something that draws."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import list_names
from sana.checkpoint.record import EXTRA, check_unquantised, parse_record, read_quantisation
from sana.checkpoint.run_file import Weights, read_run_file
from sana.checkpoint.source import open_source
from sana.checkpoint.tensors import Tensors, check_finite, read_safetensors
from sana.model.generate import Painter
from sana.model.text_to_image import TextToImage
from sana.nn.inference import for_inference
from sana.quant.rebuild import rebuild


def load_weights(
    module: TextToImage,
    checkpoint: str | Path,
    weights: Weights = "ema",
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> int | None:
    """Put the weights of a checkpoint into a recipe built for it.

    Args:
        module: its network is overwritten; it may be on the meta device. Where the checkpoint is quantised, the
            network's layers become quantised ones.
        checkpoint: a ``.ckpt`` that a run wrote (file or directory of shards), a consolidated or other
            ``.safetensors``, an original ``.pth``, a diffusers folder, or shards of another origin. No code in it is
            run.
        weights: of a ``.ckpt`` or ``.pth``: the averaged ones (the last ones where no average was kept) or the last
            ones. Other files hold one set.
        allow_missing: names, or patterns such as "blocks.*.q_norm.*", that the checkpoint may lack; what the network
            was built with stays.
        allow_extra: names or patterns that the checkpoint may have over.

    Returns:
        The number of updates that the weights have seen, None where nobody wrote it down.

    Raises:
        CheckpointError: keys are missing, left over or of another shape, with their names; numbers that are not
            finite; or it is no checkpoint of this recipe.
    """
    quant = read_quantisation(checkpoint)
    if quant is not None:
        try:
            module.network = rebuild(module.network, quant["layers"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint}: the record of its quantisation is wrong: {error}") from None
    state, updates = read_weights(checkpoint, weights, quantised=quant is not None)
    fill(module.network, state, checkpoint, allow_missing, allow_extra)
    return updates


def read_weights(
    checkpoint: str | Path, weights: Weights = "ema", quantised: bool = False
) -> tuple[Tensors, int | None]:
    """Tensors of a network by this project's names, read when they are asked for, and the number of updates they have
    seen; arguments and errors as of `load_weights`. Quantised ones are refused unless `quantised` says that they are
    known to be."""
    path, updates = Path(checkpoint), None
    if path.suffix == ".ckpt":
        state, _, updates = read_run_file(path, weights)
    else:
        record = None
        if path.suffix == ".safetensors":
            state, metadata = read_safetensors(path)
            record = parse_record(metadata, path)
        if record is None:
            source = open_source(path, weights)
            state = source.tensors
        else:
            if not quantised:
                check_unquantised(record, path)
            updates = record.updates
            if weights == "live" and record.weights == "ema":
                raise CheckpointError(f"{path}: holds the averaged weights only; leave out weights=live")
        state = state.renamed(lambda name: None if name.startswith(EXTRA) else name)
    return state, updates


def make_painter(module: TextToImage, device: str | torch.device) -> Painter:
    """A painter with the recipe's parts in eval mode on a device."""
    painter = bare_painter(module, device)
    painter.network = for_inference(painter.network)
    return painter


def bare_painter(module: TextToImage, device: str | torch.device) -> Painter:
    """The same whose network keeps its plain layers, for quantisations to find."""
    module.frozen.place = "device"  # of a run that draws, not of the one that trained
    module.frozen.to(device)
    network = module.network.to(device).eval().requires_grad_(False)
    return Painter(network, module.frozen.autoencoder, module.frozen.text_encoder, module.null_like)


def fill(
    network: nn.Module,
    state: Tensors,
    source: str | Path,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> None:
    """Put tensors into a module, in its own types and one at a time; it may be on the meta device.

    Args:
        network: overwritten.
        state: by the module's names.
        source: where they come from, for messages.
        allow_missing, allow_extra: names or patterns for which `state` may differ from the module.

    Raises:
        CheckpointError: every key that is missing, left over or of another shape; or numbers that are not finite.
    """
    own = network.state_dict()
    missing = sorted(name for name in own.keys() - state.keys() if not named(name, allow_missing))
    extra = sorted(name for name in state.keys() - own.keys() if not named(name, allow_extra))
    reshaped = sorted(k for k in own.keys() & state.keys() if not _fits(own[k], state.like[k]))
    shapes = [f"{k} {_shape(state.like[k])}, not {_shape(own[k])}" for k in reshaped]
    if missing or extra or reshaped:
        parts = [("missing", missing), ("extra", extra), ("of another shape", shapes)]
        said = "; ".join(f"{what}: {list_names(keys)} ({len(keys)})" for what, keys in parts if keys)
        raise CheckpointError(f"{source}: weights do not fit the network: {said}")
    empty = [name for name in own.keys() - state.keys() if own[name].is_meta]
    if empty:
        raise CheckpointError(f"{source}: lacks {list_names(sorted(empty))}, and nothing else gives it a value")
    with torch.no_grad():
        for name in filter(state.__contains__, own):
            value, target = check_finite(name, state[name], source), own[name]
            if target.is_meta:
                target = torch.empty_like(target, device="cpu")  # in its own type and memory format
                _place(network, name, target)
            target.copy_(value)


def _fits(own: Tensor, given: Tensor) -> bool:
    """Whether shapes agree, and types where one of them holds codes."""
    codes = any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in (own, given))
    return own.shape == given.shape and (own.dtype == given.dtype or not codes)


def _shape(tensor: Tensor) -> str:
    wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return f"{tuple(tensor.shape)}" if wide else f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def _place(network: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by one with memory."""
    path, _, leaf = name.rpartition(".")
    owner = network.get_submodule(path)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, leaf, value)


def named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is among names and patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
