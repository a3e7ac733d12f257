"""FSDP2 sharding of a network: block by block, then the rest."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

# Public methods that run parameters without going through forward; FSDP2 must gather for them too.
METHODS = ("prepare", "stream", "features")


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard parameters of `module` over a one-dimensional mesh, in place.

    Each of ``module.blocks`` is a unit of its own, so that at most one block is gathered at a time; what is outside
    the blocks is one unit. Mixed precision is left to autocast, so parameters, gradients and optimizer states keep
    their dtype and results equal those of the other strategies.
    """
    for block in getattr(module, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in METHODS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
    return module
