"""How the kernels of ReLU linear attention are cut for a card."""

from __future__ import annotations

from typing import NamedTuple

import torch

PROGRAMS = 264
"""Programs that fill a card: two on each of the 132 multiprocessors of an H100."""
TOKENS = 1024
"""Tokens that a program gets at least; fewer are not worth a second launch."""


SPLITS = 32
"""Most programs per head: each adds up the sums of all."""
STAGES = 3
"""Tiles that loops over tokens have under way."""


ROWS = {
    "forward": {torch.bfloat16: (128, 128, 64), torch.float16: (128, 128, 32), torch.float32: (64, 64, 32)},
    "backward": {torch.bfloat16: (64, 64, 32), torch.float16: (32, 32, 16), torch.float32: (32, 16, 16)},
    "derivative": {torch.bfloat16: (64, 64, 32), torch.float16: (32, 32, 16), torch.float32: (32, 32, 16)},
}
"""Tokens of a tile by kernel and type, for heads of up to 16, 32 and 64 channels: the most without spills."""
WIDEST = 64
"""Channels per head that the kernels hold in registers."""


class Plan(NamedTuple):
    """How a launch cuts tokens: `splits` programs per head with `per_split` tokens each, in tiles of block_n."""

    splits: int
    per_split: int
    block_n: int
    block_d: int

    @property
    def stages(self) -> tuple[int, ...]:
        """Of the kernels to launch one after the other."""
        return (0,) if self.splits == 1 else (1, 2)

    def options(self, dh: int) -> dict[str, int]:
        """Of a launch for heads of dh channels."""
        sizes = {"DH": dh, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        return sizes | {"num_warps": 8 if self.block_d == 64 else 4, "num_stages": STAGES}


def plan(kernel: str, b: int, n: int, heads: int, dh: int, dtype: torch.dtype) -> Plan:
    """The shape of a launch, from a small table: nothing is measured at run time."""
    block_d = max(16, 1 << (dh - 1).bit_length())
    block_n = ROWS[kernel][dtype][block_d.bit_length() - 5]
    splits = max(1, min(-(-PROGRAMS // (b * heads)), -(-n // TOKENS), SPLITS))
    per_split = -(-n // (splits * block_n)) * block_n
    return Plan(-(-n // per_split), per_split, block_n, block_d)
