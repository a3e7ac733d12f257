"""The order of nunchaku's tensors: equal to the published packer's to the bit, to the fragments of the PTX manual at
single places, and undone by its inverse.

The digests are of what `NunchakuWeightPacker(bits=4)` returned for the numbers below, run once on a CPU: `pack_weight`,
`pack_scale` (group_size 64, -1, 16) and `pack_lowrank_weight` of nunchaku/lora/flux/packer.py in
nunchaku-ai/nunchaku at 92e46957cdb8; those of deepcompressor/backend/nunchaku/utils.py in mit-han-lab/deepcompressor at
69f3473f5e1c were the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sana.checkpoint import nunchaku_order as order

SHAPES = [(128, 128), (256, 384), (384, 256), (896, 640)]
PUBLISHED = {
    "codes": ("5966ae4c174285afbd3ca8a414bae3c3", "bc328468ad310bde02ead2e397c01862",
              "af2abec40a9980c48a070cb60ccf48aa", "1532b9c34dddfaa5bc43e77d249489e3"),
    "columns": ("62ace03d9f7c5ed981d0cc0c7dda8c76", "acd6b5ec4c360903172f4f5d858fa227",
                "6e9983481f5dc4e148d82f62b4f1571d", "e1d3668202740f8d8d5c07bc22b1188e"),
    "vector": ("b93c62c9d5448a6f59f68fe1448dde1d", "da3eb4386acb8ff8585bf6c874aa92b7",
               "0f09b1452e5d06d13377abf46d5e1369", "f9dde2246f2cfc04fcb9286458139215"),
    "micro_scales": ("fbc6f3ad47b635cbb7236b5232bf9eff", "b8375eb2d01ac33f09a173407143adaf",
                     "927098b1cb8d9400d8dfdfd32d76cd7a", "808b8717dc5011ada8152a2525f437a5"),
    "up": ("514c269bae71992d942ca7d7275cb084", "135e97525d94a4a8cd85a99a17caf17a",
           "cefa43ae97d713cb4220aa4aff3ba246", "5b08592a7d0621d27fb4bcc8565cc378"),
    "down": ("8945a1ee529723ed83204577d1c7e3c9", "11c06f60eb0d4f3e487ce48206b2d370",
             "7157181d1687b68f645b9a2e0a13a300", "1f517d3ef5f527a1389cdfab123f2f71"),
}  # fmt: skip


def numbers(rows: int, columns: int, seed: int, below: int) -> Tensor:
    """Integers in [0, below) that hardly repeat, by a formula that needs no generator."""
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    return ((i * 40503 + j * 30011 + seed * 7919) ^ (i * j + seed)) % 65521 % below


def signed(rows: int, columns: int, seed: int) -> Tensor:
    return (numbers(rows, columns, seed, 255) - 127).bfloat16()


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def given(what: str, n: int, k: int, seed: int) -> Tensor:
    return {
        "codes": lambda: numbers(n, k, seed, 16).to(torch.uint8),
        "columns": lambda: signed(n, k // 64, seed),
        "vector": lambda: signed(n, 1, seed).flatten(),
        "micro_scales": lambda: (numbers(n, k // 16, seed, 126) + 1).to(torch.uint8).view(torch.float8_e4m3fn),
        "up": lambda: signed(n, 16 * (seed + 1), seed),
        "down": lambda: signed(k, 16 * (seed + 1), seed),
    }[what]()


def both(what: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return getattr(order, f"pack_{what}"), getattr(order, f"unpack_{what}")


@pytest.mark.parametrize("what", PUBLISHED)
@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_equal_to_the_published_packer_and_undone(what: str, seed: int) -> None:
    (n, k), (pack, unpack) = SHAPES[seed], both(what)
    x = given(what, n, k, seed)
    packed = pack(x)
    assert digest(packed) == PUBLISHED[what][seed]
    back = unpack(packed)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert digest(back) == digest(x)


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_lie_where_the_instruction_looks(seed: int) -> None:
    """PTX, mma.m16n8k64 with 4-bit B: of the 64 x 8 matrix (inputs x outputs) thread t holds two registers; nibble i of
    register c is row 32 c + 8 (t % 4) + i, column t / 4. A thread reads 16 bytes at once: both registers of outputs
    16 a ... 16 a + 7, then both of the 8 outputs after them."""
    n, k = 256, 384
    words = order.pack_codes(codes := numbers(n, k, seed, 16).to(torch.uint8)).view(torch.int32).flatten().tolist()
    draw = random.Random(seed)
    for _ in range(500):
        tile, step, a, b, thread, c, i = (draw.randrange(m) for m in (n // 128, k // 64, 8, 2, 32, 2, 8))
        row, column = 32 * c + 8 * (thread % 4) + i, thread // 4
        warp = (tile * (k // 64) + step) * 8 + a  # each of which is 32 threads of 4 words
        word = words[(warp * 32 + thread) * 4 + 2 * b + c] & 0xFFFFFFFF
        assert word >> (4 * i) & 15 == codes[128 * tile + 16 * a + 8 * b + column, 64 * step + row]


@pytest.mark.parametrize("seed", [0, 1])
def test_scales_lie_where_their_sums_are(seed: int) -> None:
    """PTX, mma.m16n8k64: of a row of 8 sums, thread t has columns 2 (t % 4) and 2 (t % 4) + 1. Thread 4 a + l loads
    those of outputs 16 a ... 16 a + 15, two and two."""
    n, groups = 384, 3
    flat = order.pack_columns(scales := signed(n, groups, seed)).flatten()
    draw = random.Random(seed)
    for _ in range(300):
        tile, group, a, thread, b, i = (draw.randrange(m) for m in (n // 128, groups, 8, 4, 2, 2))
        place = (tile * groups + group) * 128 + (4 * a + thread) * 4 + 2 * b + i
        assert flat[place] == scales[128 * tile + 16 * a + 8 * b + 2 * thread + i, group]


@pytest.mark.parametrize("seed", [0, 1])
def test_block_scales_lie_where_the_instruction_looks(seed: int) -> None:
    """PTX, block scaling 4X of B: of 8 outputs, thread 4 l + selector gives output l's four scales of 64 inputs as one
    word. Here the selector q goes with outputs 8 q ... 8 q + 7 of 32, and a thread loads those of four times 32."""
    n, k = 256, 256
    scales = (numbers(n, k // 16, seed, 126) + 1).to(torch.uint8)
    flat = order.pack_micro_scales(scales.view(torch.float8_e4m3fn)).view(torch.uint8).flatten()
    draw = random.Random(seed)
    for _ in range(300):
        tile, step, p, q, column, j = (draw.randrange(m) for m in (n // 128, k // 64, 4, 4, 8, 4))
        place = (((tile * (k // 64) + step) * 32 + 4 * column + q) * 4 + p) * 4 + j
        assert flat[place] == scales[128 * tile + 32 * p + 8 * q + column, 4 * step + j]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_branch_lies_where_the_instruction_looks(seed: int) -> None:
    """PTX, mma.m16n8k16 with 16-bit B: thread t holds rows 8 c + 2 (t % 4) + i of column t / 4. Rows are what is summed
    over: the inputs of D, the directions of U."""
    size, rank = 256, 48
    up, down = signed(size, rank, seed), signed(size, rank, seed + 7)
    flat_up, flat_down = order.pack_up(up).flatten(), order.pack_down(down).flatten()
    draw = random.Random(seed)
    for _ in range(300):
        outer, inner, thread, b, c, i = (draw.randrange(m) for m in (size // 16, rank // 16, 32, 2, 2, 2))
        place = ((outer * (rank // 16) + inner) * 32 + thread) * 8 + 4 * b + 2 * c + i
        row, column = 8 * c + 2 * (thread % 4) + i, 8 * b + thread // 4
        assert flat_up[place] == up[16 * outer + column, 16 * inner + row]
        assert flat_down[place] == down[16 * outer + row, 16 * inner + column]
