"""SANA transformer weights between our names and those of diffusers' `SanaTransformer2DModel`, as state dicts.

Both ways only rename, split, join and reshape, so a round trip returns the same bits. `sana.checkpoint.transformer`
does the same tensor by tensor, and knows the original files too.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sana.checkpoint.transformer import from_ours, to_ours


def sana_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `SanaTransformer2DModel` -> state dict of `sana.network.sana.Sana`, as copies.

    Depth, q/k norms and the guidance embedding are read from the names present.

    Raises:
        CheckpointError: naming the keys that are missing or not understood.
    """
    return {name: tensor.clone() for name, tensor in to_ours(state, "diffusers").items()}


def sana_to_diffusers(state: Mapping[str, Tensor], patch: int = 1) -> dict[str, Tensor]:
    """State dict of `sana.network.sana.Sana` -> state dict of `SanaTransformer2DModel`, as copies.

    Args:
        state: of our network.
        patch: as in the network.

    Raises:
        CheckpointError: naming the keys that are missing or that diffusers has no place for.
    """
    return {name: tensor.clone() for name, tensor in from_ours(state, "diffusers", patch)[0].items()}
