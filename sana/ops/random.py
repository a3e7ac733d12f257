"""Random numbers as a pure function of (seed, purpose, sample index, position): no generator, no state.

Every draw that concerns a sample (timestep, noise, dropout, caption, flip) is computed from the sample's
position in the global stream of the run, never from who computes it. So results do not depend on ranks,
workers, batch size or order, and a resumed run draws what the uninterrupted one would have drawn.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
counter-based generator that passes BigCrush, written in integer tensor operations: the same integers on every
device. Element i of a sample is word i mod 4 of block i div 4, so a shape only says how the stream of the
sample is folded: ``(4, 5)``, ``(20,)`` and the first 20 of ``(100,)`` are the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# 2^64 / golden ratio, odd, as a signed 64-bit number: the step of the Kronecker sequence in `spread`.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def philox(
    counter: tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]],
    key: tuple[int, int],
) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]]:
    """Philox4x32-10: four counter words and two key words to four random words.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap in int64 and keep their bits; c1 and c3 carry them whole, because only
        # their low words reach the result: shift, exclusive or, and one mask.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = (p1 >> 32).bitwise_xor(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (p0 >> 32).bitwise_xor(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    """Two key words from any integer seed and any purpose, by SHA-256, so that near seeds share nothing."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _words(
    seed: int, index: Int[Tensor, " b"], purpose: str, count: int
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b k"], Int[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The first ceil(count / 4) blocks of each sample: four words per block, as four tensors (b, blocks)."""
    if index.dtype != torch.int64:
        raise ValueError(f"index must be int64 (position of each sample in the global stream), got {index.dtype}")
    blocks = max(1, -(-count // 4))
    if blocks > _WORD:
        raise ValueError(f"{count} numbers per sample is more than a stream holds (2^34)")
    position = index[:, None]
    block = torch.arange(blocks, device=index.device)[None]
    counter = (block, position & _WORD, (position >> 32) & _WORD, torch.zeros_like(position))
    return philox(counter, _key(seed, purpose))


def _fold(parts: list[Tensor], shape: tuple[int, ...], count: int) -> Tensor:
    """Interleave words (b, blocks) x 4 into (b, *shape), dropping the unused tail of the last block."""
    flat = torch.stack(parts, dim=-1).flatten(1)[:, :count]
    return flat.reshape(flat.shape[0], *shape)


def uniform(
    seed: int, index: Int[Tensor, " b"], purpose: str, shape: tuple[int, ...] = ()
) -> Float[Tensor, "b *shape"]:
    """Uniform numbers in [0, 1), multiples of 2^-24, float32.

    Args:
        seed: seed of the run, any integer.
        index: (b,) int64, position of each sample in the global stream.
        purpose: name of the draw, such as "timestep"; different purposes are independent.
        shape: shape per sample; () gives (b,).

    Raises:
        ValueError: index is not int64.
    """
    count = math.prod(shape)
    words = _words(seed, index, purpose, count)
    return _fold([(word >> 8).to(torch.float32) * 2.0**-24 for word in words], shape, count)


def normal(seed: int, index: Int[Tensor, " b"], purpose: str, shape: tuple[int, ...] = ()) -> Float[Tensor, "b *shape"]:
    """Standard normal numbers, float32, |z| < 6.67; arguments and errors as in `uniform`.

    Box-Muller over pairs of words, in float64: the radius uses all 32 bits, so that the tails are right, is
    never infinite, and the float32 result hardly depends on the device's logarithm.
    """
    count = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, index, purpose, count)
    return _fold([*_box_muller(w0, w1), *_box_muller(w2, w3)], shape, count)


def _box_muller(
    radius_word: Int[Tensor, "b k"], angle_word: Int[Tensor, "b k"]
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Two words to two independent normals; the radius word is read as (w + 1) 2^-32 in (0, 1]."""
    u: Float64[Tensor, "b k"] = (radius_word.to(torch.float64) + 1.0) * 2.0**-32
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = angle_word.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return (radius * angle.cos()).to(torch.float32), (radius * angle.sin_()).to(torch.float32)


def spread(seed: int, index: Int[Tensor, " b"], purpose: str) -> Float[Tensor, " b"]:
    """Uniform numbers in [0, 1) that are evenly spread over any run of consecutive indices, float32.

    A Kronecker sequence, frac(offset + index / golden ratio), with an offset drawn from (seed, purpose). Each
    number is uniform over seeds as from `uniform`, but n consecutive samples fall into n strata almost
    evenly, so that the timesteps of a batch cover [0, 1) and the variance of its loss drops. Like every draw
    here it depends on the sample's index only. Arguments and errors as in `uniform`.
    """
    if index.dtype != torch.int64:
        raise ValueError(f"index must be int64 (position of each sample in the global stream), got {index.dtype}")
    low, high = _key(seed, purpose)
    offset = (high << 32 | low) - (1 << 63)
    turned = index * _GOLDEN + offset
    return ((turned >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
