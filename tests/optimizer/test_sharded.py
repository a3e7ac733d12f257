"""CAME and EMA over parameters sharded by FSDP2 on two CPU processes equal those of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

from sana.optimizer.came import CAME
from sana.optimizer.came_8bit import CAME8bit
from sana.optimizer.ema import EMA

STEPS = 4
# Blocks of 4 elements: rows of 6 and 4 have two, the last one shorter, and one.
OPTIMIZERS = {"came": CAME, "came_8bit": partial(CAME8bit, block=4, min_size=10)}


class Network(nn.Module):
    """Matrices with even, odd and single rows, a 1x1 and a depthwise kernel, and vectors."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 5)
        self.pointwise = nn.Conv2d(5, 3, 1)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.c = nn.Linear(3, 1)

    def forward(self, x):
        x = self.b(self.a(x).relu()).movedim(-1, 1)
        return self.c(self.depthwise(self.pointwise(x)).movedim(1, -1)).square().mean()


def train(network: nn.Module, optimizer: CAME, ema: EMA, steps: range, rank: int, world: int) -> None:
    for step in steps:
        batch = torch.randn(4, 3, 3, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(batch[rank::world]).backward()
        optimizer.step()
        ema.update()


def build() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def worker(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded() -> tuple[nn.Module, CAME, EMA]:
        network = fully_shard(build(), mesh=init_device_mesh("cpu", (2,)))
        return network, OPTIMIZERS[name](network.parameters(), lr=1e-3), EMA(network)

    network, optimizer, ema = sharded()
    train(network, optimizer, ema, range(STEPS), rank, 2)
    # Momentum and row statistics take the memory of the shard only.
    state = optimizer.state[network.a.weight]
    momentum = state["momentum" if name == "came" else "momentum_codes"]
    assert isinstance(momentum, DTensor)
    assert momentum.to_local().shape == (3, 4)
    if name == "came_8bit":
        assert momentum.dtype == torch.int8
        assert state["momentum_scale"].to_local().shape == (3, 1)
        assert optimizer.state[network.b.weight]["momentum_scale"].to_local().shape == ((3, 2) if rank == 0 else (2, 2))
    assert state["row"].to_local().shape == (3,)
    assert ema.shadow["a.weight"].to_local().shape == (3, 4)

    # Through torch's distributed state dict into a second copy, then both go on alike.
    other, resumed, other_ema = sharded()
    other.load_state_dict(network.state_dict())
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(network, optimizer))
    other_ema.load_state_dict(ema.state_dict())
    # After a forward without backward FSDP2 leaves the root gathered; the swap must not leave stale copies.
    x = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = network(x)
        with ema.applied():
            inside = network(x)
        after = network(x)
    plain = build()
    plain.load_state_dict({name: full(p) for name, p in ema.shadow.items()})
    torch.testing.assert_close(inside, plain(x).detach())
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)
    with ema.applied():
        averaged = {name: full(p).clone() for name, p in network.named_parameters()}
    result = {
        "parameters": {name: full(p).detach().clone() for name, p in network.named_parameters()},
        "shadow": {name: full(p).clone() for name, p in ema.shadow.items()},
        "averaged": averaged,
        "state": {
            name: {key: full(value).clone() for key, value in optimizer.state[p].items()}
            for name, p in network.named_parameters()
        },
    }
    train(network, optimizer, ema, range(STEPS, STEPS + 2), rank, 2)
    train(other, resumed, other_ema, range(STEPS, STEPS + 2), rank, 2)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
    for name, value in ema.shadow.items():
        assert torch.equal(value.to_local(), other_ema.shadow[name].to_local())
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_equal_one(tmp_path, name):
    network = build()
    optimizer, ema = OPTIMIZERS[name](network.parameters(), lr=1e-3), EMA(network)
    train(network, optimizer, ema, range(STEPS), 0, 1)

    mp.spawn(worker, (str(tmp_path), name), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    for name, p in network.named_parameters():
        torch.testing.assert_close(result["parameters"][name], p.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["shadow"][name], ema.shadow[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(result["averaged"][name], result["shadow"][name])
        for key, value in optimizer.state[p].items():
            # A momentum between two codes may be rounded to either.
            atol = 1.0 if key == "momentum_codes" else 1e-7
            torch.testing.assert_close(result["state"][name][key].float(), value.float(), rtol=1e-3, atol=atol)


def test_shards_over_another_dimension_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(1)]))
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="dimension 0"):
            CAME([p]).step()
    finally:
        dist.destroy_process_group()
