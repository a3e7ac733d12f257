"""Quantising the network of a checkpoint: for a drawing, or into a file of its own."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.checkpoint.record import Record, check_unquantised, read_record
from sana.checkpoint.run_file import read_run_file
from sana.checkpoint.write import write_consolidated, write_text
from sana.metric.ranks import rank
from sana.model.calibration import default_prompts, prompts_of
from sana.model.generate import Painter
from sana.model.load import bare_painter, load_weights
from sana.model.probe import Probe
from sana.quant.rebuild import describe, kinds_of
from sana.quant.report import Report, arithmetic, measure_errors, report_of
from sana.run.build import build
from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.recipe import recipe_of, training_of
from sana.run.records import to_json
from sana.run.restore import Restored, restore
from sana.run.runs import find_weights, read_overrides
from sana.run.saved import training

MEASURED = 8  # prompts that errors are measured on where none are given


def quantise(composed: Composed, restored: Restored) -> None:
    """Quantise the network of a recipe with its weights, in place, as the configuration's `quant` says, if it says
    anything; and tell on stderr what was done, or how the weights of the file are quantised.

    Args:
        composed: of sample.py or eval.py.
        restored: the recipe; on return its network is where it was.

    Raises:
        ValueError: a layer or pattern that does not fit the network.
    """
    if composed.config.quant is not None:
        said = _quantised(composed, restored).summary()
    elif restored.quant is not None:
        said = f"{kinds_of(restored.module.network)}, as in the file; {_arithmetic(restored)}"
    else:
        return
    if rank() == 0:
        print(said, file=sys.stderr, flush=True)


def _quantised(composed: Composed, restored: Restored) -> Report:
    """Quantise the network; the report.

    A quantisation that calibrates (its attribute `calibrates`) is given what the network meets while it draws some
    prompts: `quant.prompts` of those that come along, or these prompts themselves. Their noise is always the same, so
    that a network does not depend on what is drawn with it.
    """
    quant, module = build(composed.config.quant, "quant"), restored.module
    if getattr(quant, "calibrates", False):
        prompts = quant.prompts
        if isinstance(prompts, int):
            prompts = default_prompts(restored.training)[:prompts]
        painter = bare_painter(module, restored.device)
        with restored.autocast():
            module.network = quant(module.network, _probe(composed, painter, prompts, seed=0))
    else:
        module.network = quant(module.network)
    report = report_of(module.network)
    report.arithmetic = _arithmetic(restored)
    return report


def _arithmetic(restored: Restored) -> str:
    """How products are computed where the network will draw, which need not be where it is quantised."""
    return arithmetic(restored.module.network, restored.device)


def quantise_to_file(composed: Composed) -> tuple[Report, Path, Path]:
    """Write a quantised checkpoint and its report.

    Args:
        composed: of conf/quantise.yaml, checked.

    Returns:
        The report, and the paths of both files.

    Raises:
        ConfigError: nothing to quantise with, or no place to write to.
        CheckpointError: the checkpoint is damaged or quantised already, or the file exists.
    """
    config, path = composed.config, Path(composed.config.out)
    if config.quant is None:
        raise ConfigError("quant: there is nothing to do; choose a quantisation")
    if path.suffix != ".safetensors" or path.exists():
        raise ConfigError(f"out: {path} {'exists already' if path.exists() else 'has to end in .safetensors'}")
    restored = restore(composed)
    record = _record(composed, restored)
    module = restored.module
    allowed = list(config.allow_missing), list(config.allow_extra)
    updates = load_weights(module, restored.checkpoint, config.weights, *allowed)
    painter = bare_painter(module, restored.device)
    before = copy.deepcopy(module.network)
    report = _quantised(composed, restored)
    given = config.prompt is not None
    prompts = prompts_of(composed, restored.training) if given else default_prompts(restored.training)[-MEASURED:]
    with restored.autocast():
        measure_errors(before, module.network, _probe(composed, painter, prompts, config.seed))
    quant = {"quant": composed.resolved["quant"], "layers": describe(module.network)}
    tensors = {name: narrowed(tensor) for name, tensor in module.network.state_dict().items()}
    write_consolidated(path, tensors, replace(record, updates=updates, quant=quant))
    report_path = path.with_suffix(".report.json")
    said = {"checkpoint": str(restored.checkpoint), **quant, "prompts": prompts, "seed": config.seed}
    said |= {"size": config.size, "sampler": composed.resolved["sampler"], "file_bytes": path.stat().st_size}
    write_text(report_path, to_json(_plain(report.as_dict() | said), indent=1) + "\n")
    return report, path, report_path


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 where that keeps every bit of it, as it does with weights that came in bfloat16."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.bfloat16()
    return half if torch.equal(half.float(), tensor) else tensor


def _probe(composed: Composed, painter: Painter, prompts: list[str], seed: int) -> Callable[[nn.Module], Tensor]:
    config, seeds = composed.config, range(seed, seed + len(prompts))
    return Probe(painter, build(config.sampler, "sampler"), prompts, seeds, int(config.size), int(config.batch_size))


def _record(composed: Composed, restored: Restored) -> Record:
    """What the header of the full-precision weights says or would say.

    Raises:
        CheckpointError: they are quantised.
        ConfigError: a recipe that others could not build.
    """
    config, found = composed.config, find_weights(composed.config.ckpt)
    if not found.of_run and found.path.suffix == ".safetensors":
        record = read_record(found.path)
        check_unquantised(record, found.path)
        if record is not None and record.recipe is not None:
            return record
    trained = training(found, config.recipe).resolved
    recipe = recipe_of(trained, read_overrides(found.home) if found.of_run else [])
    facts = {"flow_shift": (recipe.get("timestep") or {}).get("shift"), "size": recipe["size"]}
    used = read_run_file(found.path, config.weights)[1] if found.of_run else None
    record = Record(recipe, facts, used)
    training_of(record, Path(config.out))  # what is written can be read
    return record


def _plain(value: Any) -> Any:
    """Without numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
