"""``strategy=auto``: the simplest strategy that fits, by the plan of ``dry_run``, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sana.run.compose import Composed, parse_override
from sana.run.error import ConfigError

if TYPE_CHECKING:
    from sana.run.plan import Plan

GIB = 2**30


@dataclass(frozen=True)
class Auto:
    """Settings of strategy=auto.

    Attributes:
        headroom: part of a device's memory that a plan may fill; what the plan leaves out (buffers, fragmentation,
            other processes) needs the rest.
    """

    headroom: float = 0.8


TARGET = f"{Auto.__module__}.{Auto.__name__}"


def chosen(composed: Composed) -> tuple[Composed, str | None]:
    """A training configuration with its strategy chosen, and a line that says why; as it was, and None, where the
    strategy is not to be chosen.

    Raises:
        ConfigError: headroom is not in (0, 1].
    """
    node = composed.config.strategy
    if not isinstance(node, Mapping) or node.get("_target_") != TARGET:
        return composed, None
    headroom = float(node.get("headroom", Auto.headroom))
    if not 0 < headroom <= 1:
        raise ConfigError(f"strategy.headroom: is in (0, 1], got {headroom}")
    from sana.run.plan import _devices, make_plan
    from sana.run.saved import prepare

    nodes = int(composed.config.trainer.get("num_nodes", 1))
    try:
        name, why = choose(make_plan(composed), nodes, memory_per_device(composed), headroom)
    except ConfigError as error:  # recipes that have no plan are small
        name = "single" if _devices(composed.config) == 1 else "ddp"
        why = f"{_devices(composed.config)} device(s); there is no plan of this recipe ({error})"
    mine = [text for text in composed.overrides if parse_override(text).key_or_group.split(".")[0] != "strategy"]
    own = ["trainer.devices=auto"] if not any(t.startswith("trainer.devices=") for t in mine) else []
    extra = ["strategy.offload=true"] if name == "offload" else []
    strategy = "fsdp" if name == "offload" else name
    again = prepare("train", [*mine, *(own if name != "single" else []), f"strategy={strategy}", *extra])
    return Composed(again.entry, again.config, composed.overrides), f"strategy={' '.join([strategy, *extra])}: {why}"


def choose(plan: Plan, nodes: int, memory: int, headroom: float) -> tuple[str, str]:
    """single, ddp, hsdp, fsdp or offload, and why.

    Args:
        plan: of the run.
        nodes: machines; devices are evenly spread over them.
        memory: bytes of one device.
        headroom: part of it that may be used.
    """
    kept = plan.weights + plan.gradients + plan.states + plan.average
    rest = plan.frozen + plan.activations
    room, per_node = int(memory * headroom), max(plan.devices // nodes, 1)

    def said(size: int) -> str:
        return f"{size / GIB:.2f} GiB per device of {room / GIB:.2f} GiB to be used"

    if plan.devices == 1:
        if kept + rest <= room:
            return "single", f"one device, {said(kept + rest)}"
        return "offload", f"one device, whose memory does not hold {said(kept + rest)}"
    if kept + rest <= room:
        return "ddp", f"{plan.devices} devices, a full copy fits: {said(kept + rest)}"
    if nodes > 1 and kept // per_node + rest <= room:
        return "hsdp", f"a full copy takes {said(kept + rest)}, shards within a node {said(kept // per_node + rest)}"
    if kept // plan.devices + rest <= room:
        return "fsdp", f"a full copy takes {said(kept + rest)}, shards {said(kept // plan.devices + rest)}"
    return "offload", f"even shards take {said(kept // plan.devices + rest)}"


def memory_per_device(composed: Composed) -> int:
    """Bytes of one accelerator, or of this machine's memory for each of its processes."""
    import torch

    from sana.run.environment import memory_gib
    from sana.run.plan import _devices

    if torch.cuda.is_available() and composed.config.trainer.get("accelerator") != "cpu":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    local = max(_devices(composed.config) // int(composed.config.trainer.get("num_nodes", 1)), 1)
    return int((memory_gib() or 1.0) * GIB) // local
