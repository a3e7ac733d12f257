"""The nearest matrix of a low rank."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 512  # matrices whose shorter side is longer are decomposed by random projections
OVER, ROUNDS = 16, 4  # directions more than asked for, and power iterations


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, k) with B A the nearest matrix of rank r in the Frobenius norm (Eckart and Young).

    Exact up to rounding for small matrices; for large ones by randomised subspace iteration (Halko et al. 2011,
    algorithm 4.4) with fixed directions, whose error in the norm of the rest is far below what 4 bits leave.

    Args:
        matrix: (m, k) float32.
        rank: r; at most min(m, k) are given.
    """
    rank = min(rank, *matrix.shape)
    if rank == 0:
        return matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1])
    if min(matrix.shape) <= max(EXACT, rank + OVER):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank]
    start = torch.randn(matrix.shape[1], rank + OVER, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(ROUNDS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return (q @ u[:, :rank]) * s[:rank], vh[:rank]
