"""How much each block of a network changes its tokens, seen while it works.

Block importance of SANA-1.5 (arXiv:2501.18427, section 3.2), after Men et al. 2024 (arXiv:2403.03853)::

    BI_i = 1 - E[cos(X_i, X_i+1)],

X_i the tokens before and X_i+1 those after block i, over tokens, prompts and all times of sampling. One pass through
the network gives the numbers of all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@runtime_checkable
class HasBlocks(Protocol):
    """A network with a list of blocks that map (tokens, ...) to (tokens, ...)."""

    blocks: Sequence[nn.Module]


class BlockImportance:
    """Watches the blocks of a network between ``with`` and its end; may be entered again and goes on counting.

    Every token of every pass has the same weight, those of an unconditional branch included. Compiled blocks run
    uncompiled meanwhile, because a compiled graph does not see who watches.

    Args:
        network: anything with `blocks`, such as `sana.network.sana.Sana`.
    """

    def __init__(self, network: HasBlocks) -> None:
        self._blocks = list(network.blocks)
        self._total = torch.zeros(len(self._blocks), dtype=torch.float64)  # of cosines
        self._tokens = [0] * len(self._blocks)  # a list: adding to a tensor's element is dearer than small blocks bear
        self._hooks: list[Any] = []
        self._stance: Any = None
        self._pending: dict[torch.device, Tensor] = {}  # sums on the devices of the blocks: adding waits for nothing

    def __enter__(self) -> BlockImportance:
        for i, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_hook(self._watch(i)))
        if any(block._compiled_call_impl is not None for block in self._blocks):
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._stance is not None:
            self._stance.__exit__(kind, error, trace)
            self._stance = None

    def _watch(self, i: int) -> Any:
        def watch(block: nn.Module, given: tuple[Any, ...], found: tuple[Any, ...]) -> None:
            before, after = given[0].detach(), found[0].detach()
            x, y = before.float(), after.float()
            cosines = _dot(x, y) * (_dot(x, x) * _dot(y, y)).clamp(min=1e-30).rsqrt()
            if before.device not in self._pending:
                self._pending[before.device] = torch.zeros(
                    len(self._blocks), dtype=self._dtype(before.device), device=before.device
                )
            self._pending[before.device][i] += cosines.sum()
            self._tokens[i] += cosines.numel()

        return watch

    @staticmethod
    def _dtype(device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "mps" else torch.float64

    def sums(self) -> Tensor:
        """(2, blocks) float64: sums of cosines, and how many, that this process has seen."""
        for sums in self._pending.values():
            self._total += sums.double().cpu()
        self._pending.clear()
        return torch.stack([self._total, torch.tensor(self._tokens, dtype=torch.float64)])

    def values(self) -> list[float]:
        """BI of each block, in [0, 2]; over all processes where there are several, which must all call this.

        Raises:
            ValueError: some block has seen no tokens.
        """
        both = self.sums()
        if dist.is_available() and dist.is_initialized():
            both = both.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(both)
            both = both.cpu()
        return values_of(both)


def values_of(sums: Tensor) -> list[float]:
    """BI of each block from `BlockImportance.sums`, or from a sum of several.

    Raises:
        ValueError: some block has seen no tokens.
    """
    if not (sums[1] > 0).all():
        idle = int((sums[1] == 0).nonzero()[0])
        raise ValueError(f"importance: block {idle} has seen no tokens; draw within `with`, then ask")
    return (1 - sums[0] / sums[1]).tolist()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def most_important(values: Sequence[float], depth: int) -> list[int]:
    """The `depth` blocks of greatest importance, ascending: what `sana.network.growth.prune_depth` takes.

    Of equal ones the earlier stay.

    Raises:
        ValueError: depth is not in 1 ... number of blocks.
    """
    if not 1 <= depth <= len(values):
        raise ValueError(f"importance: {depth} blocks are to stay of {len(values)}")
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return sorted(order[:depth])
