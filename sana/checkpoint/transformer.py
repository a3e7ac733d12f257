"""SANA transformer weights between our names, those of the original files, and diffusers'; all ways exact to the bit.

Nothing is computed when a function here is called: a result makes each tensor when it is asked for, so a file is
converted with one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.names import EXTRAS, Rule, list_names, rules, shape_of
from sana.checkpoint.record import EXTRA
from sana.checkpoint.tensors import Tensors, from_dict

Layout = Literal["sana", "native", "diffusers"]
WHAT = {
    "sana": "SANA network of this project",
    "native": "SANA transformer of the original code",
    "diffusers": "diffusers SANA transformer",
}


def to_ours(state: Mapping[str, Tensor], layout: Layout) -> Tensors:
    """The network's tensors under our names; what original files hold beside it under ``extra.`` and its own name.

    Args:
        state: the tensors of one transformer.
        layout: of the names in state.

    Raises:
        CheckpointError: naming the keys that are missing or not understood.
    """
    source = from_dict(state)
    extras = [name for name in source if name.startswith(EXTRA) or (layout == "native" and name in EXTRAS)]
    network = [name for name in source if name not in extras]
    table = _rules(network, layout)
    check_names(network, (name for rule in table for name in _theirs(rule, layout)), WHAT[layout])

    def make(get: Mapping[str, Tensor], rule: Rule) -> Tensor:
        parts = [get[name] for name in _theirs(rule, layout)]
        if rule.kernel and layout != "sana":
            parts = [part.flatten(1) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    by_name = {rule.ours: rule for rule in table}
    kept = {EXTRA + name.removeprefix(EXTRA): name for name in extras}
    try:
        like = {name: make(source.like, rule) for name, rule in by_name.items()}
    except RuntimeError as error:
        raise CheckpointError(f"parts of one matrix do not fit together: {error}") from None
    like |= {new: source.like[name] for new, name in kept.items()}
    return Tensors(like, lambda name: source[kept[name]] if name in kept else make(source, by_name[name]))


def from_ours(state: Mapping[str, Tensor], layout: Layout, patch: int = 1) -> tuple[Tensors, Tensors]:
    """The tensors in another layout, and what that layout has no place for, under the original names.

    Args:
        state: as `to_ours` gives it.
        layout: to write.
        patch: latent pixels per token side; our linear patch embedding does not show it.

    Raises:
        CheckpointError: naming the keys that are missing, not understood, or without a place in diffusers.
    """
    source = from_dict(state)
    kept = {name.removeprefix(EXTRA): name for name in source if name.startswith(EXTRA)}
    network = [name for name in source if not name.startswith(EXTRA)]
    table = _rules(network, "sana")
    check_names(network, (rule.ours for rule in table), WHAT["sana"])
    shape = shape_of(network, "sana")
    if layout == "diffusers" and (shape.self_norm != shape.cross_norm or not shape.text_norm):
        raise CheckpointError(
            "diffusers has no place for this network: it has one switch for the q/k norms of both attentions, and "
            f"always a norm of the caption; here: {shape}"
        )

    def make(get: Mapping[str, Tensor], rule: Rule, part: int) -> Tensor:
        names, tensor = _theirs(rule, layout), get[rule.ours]
        if len(names) > 1:
            tensor = tensor.chunk(len(names))[part]
        if not rule.kernel or layout == "sana":
            return tensor
        side = patch if rule.patch else 1
        if tensor.shape[1] % side**2:
            raise CheckpointError(f"{rule.ours}: {tensor.shape[1]} inputs are no patches of {side}x{side}")
        return tensor.unflatten(1, (-1, side, side))

    places = {name: (rule, i) for rule in table for i, name in enumerate(_theirs(rule, layout))}
    main = Tensors(
        {name: make(source.like, *place) for name, place in places.items()},
        lambda name: make(source, *places[name]),
    )
    extra = Tensors({n: source.like[name] for n, name in kept.items()}, lambda n: source[kept[n]])
    return main, extra


def sana_from_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an original ``.pth`` -> ours, as copies; other tensors of the file under ``extra.``.

    Raises:
        CheckpointError: naming the keys that are missing or not understood.
    """
    return {name: tensor.clone() for name, tensor in to_ours(state, "native").items()}


def sana_to_native(state: Mapping[str, Tensor], patch: int = 1) -> dict[str, Tensor]:
    """Ours, with what is under ``extra.`` -> state dict of an original ``.pth``, as copies.

    Raises:
        CheckpointError: naming the keys that are missing or not understood.
    """
    main, extra = from_ours(state, "native", patch)
    return {name: tensor.clone() for name, tensor in {**main, **extra}.items()}


def check_names(names: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse names that are not exactly the expected ones.

    Raises:
        CheckpointError: naming those that are missing and those that are left over.
    """
    have, wanted = set(names), set(expected)
    missing, extra = sorted(wanted - have), sorted(have - wanted)
    if missing or extra:
        raise CheckpointError(
            f"state dict is not that of a {what}: missing {list_names(missing)}, unexpected {list_names(extra)}"
        )


def _rules(names: list[str], layout: Layout) -> list[Rule]:
    try:
        return rules(shape_of(names, layout))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _theirs(rule: Rule, layout: Layout) -> tuple[str, ...]:
    return rule.diffusers if layout == "diffusers" else (rule.native if layout == "native" else rule.ours,)
