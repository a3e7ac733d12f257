"""FSDP2 sharding of a network: block by block, then the rest."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

# Public methods that run parameters without going through forward; FSDP2 must gather for them too.
METHODS = ("prepare", "prepare_times", "stream", "features", "encode", "decode")
# Those of a block that others than its forward call: a block is given back at their end, so forward must not use them.
OF_BLOCK = ("prepare", "modulate")


def shard(
    module: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy | None = None, *, offload: bool = False
) -> nn.Module:
    """Shard the parameters of `module`, in place.

    Each of ``module.blocks`` is a unit of its own, so that at most one block is gathered at a time; what is outside
    the blocks is one unit.

    Args:
        module: a network.
        mesh: of one dimension (shards over all of it), or of two (replicas of shards).
        precision: types of gathered parameters and of reduced gradients; None: as they are. What is stored, and the
            optimizer's states, keep their types.
        offload: keep the shards, their gradients and states in main memory.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    precision = precision or MixedPrecisionPolicy()
    for block in getattr(module, "blocks", []):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=policy)
        _register(block, OF_BLOCK)
    fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=policy)
    _register(module, METHODS)
    return module


def _register(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
