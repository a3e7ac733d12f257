"""FSDP2 under Lightning: shards over all processes, or over groups of them that hold replicas (hybrid)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from sana.strategy.launcher import Launcher
from sana.strategy.sharding import shard


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer states in shards; runs on GPUs, and on CPUs over gloo.

    Args:
        shard_size: processes that share one copy; None: all of them. With fewer, each group of so many holds a replica
            and gradients are averaged between groups. "node": the processes of one node.
        low_precision: gather parameters in bfloat16 and reduce gradients in float32: half the traffic of leaving the
            rounding to autocast. Parameters that autocast would leave in float32 (norms, tables) are rounded too.
        offload: keep shards, gradients and optimizer states in main memory.
        timeout: minutes that a process waits for the others before it gives up.

    Raises:
        ValueError: shard_size does not divide the number of processes.
    """

    def __init__(
        self,
        shard_size: int | str | None = None,
        *,
        low_precision: bool = False,
        offload: bool = False,
        timeout: float = 30.0,
    ) -> None:
        if isinstance(shard_size, str) and shard_size != "node":
            raise ValueError(f"strategy.shard_size is a number, 'node' or null, got {shard_size!r}")
        # What is offloaded is reduced on CPUs, which NCCL cannot.
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(1, 1, process_group_backend=backend, timeout=timedelta(minutes=timeout))
        self.shard_size, self.low_precision, self.offload = shard_size, low_precision, offload

    def setup_environment(self) -> None:
        """Start the process group and make the mesh."""
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        world = self.world_size
        size = world if self.shard_size is None else self.num_processes
        if isinstance(self.shard_size, int):
            size = self.shard_size
        if not 1 <= size <= world or world % size:
            raise ValueError(f"strategy.shard_size: {size} does not divide the {world} processes")
        device = self.root_device.type
        if size == world:
            self._device_mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        else:
            shape = (world // size, size)
            self._device_mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def shard(self, module: nn.Module) -> None:
        """Shard a trained module as the settings say; the recipe calls it for each."""
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        shard(module, self.device_mesh, precision if self.low_precision else None, offload=self.offload)

    def model_to_device(self) -> None:
        """Move the recipe to its device, but for shards that are offloaded."""
        if not self.offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for buffer in self.lightning_module.buffers():
            buffer.data = buffer.data.to(self.root_device)
        self.lightning_module._device = self.root_device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher.of(self.cluster_environment, self.num_processes, self.num_nodes)
