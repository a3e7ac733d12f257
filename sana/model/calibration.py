"""Prompts that networks are watched under while they draw: for the importance of blocks, and for quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.prompts import read_prompts
from sana.scenes import eval_prompts

PHOTOGRAPHS = Path(__file__).with_name("calibration.txt")
COUNT = 100  # of the prompts that come along
OF_SCENES = "sana.data.module.ScenesData"


def prompts_of(composed: Composed, trained: Any) -> list[str]:
    """The calibration prompts: those that are given, or 100 of the kind that the network learnt.

    Args:
        composed: whose `prompt` counts.
        trained: the configuration that the network was trained with.

    Raises:
        ConfigError: they cannot be read, or say what is not used here.
    """
    given = composed.resolved["prompt"]
    if given is None:
        return default_prompts(trained)
    requests = read_prompts(given)
    for request in requests:
        for name in ("seed", "negative", "width", "height"):
            if getattr(request, name) is not None:
                raise ConfigError(f"prompt: {request.prompt[:40]!r} has {name}, which has no effect here; leave it out")
    return [request.prompt for request in requests]


def default_prompts(trained: Any) -> list[str]:
    """100 prompts of the kind that a network learnt, by the configuration that it was trained with."""
    if trained.data.get("_target_") == OF_SCENES:
        return [line["prompt"] for line in eval_prompts(-(-COUNT // 6), 0)][:COUNT]
    return PHOTOGRAPHS.read_text(encoding="utf-8").splitlines()
