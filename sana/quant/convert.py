"""One walk over a network for all formats: which layers are converted, which are not, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sana.quant.conv_linear import ConvLinear, as_linear, is_pointwise
from sana.quant.layer import QuantisedLinear
from sana.quant.report import Report, arithmetic, relative_error

Make = Callable[[str, nn.Linear], nn.Module | None]


class NotConverted(Exception):
    """Raised by a `make` with the reason why a layer stays as it is."""


def convert(
    module: nn.Module,
    make: Make,
    *,
    kind: str,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> nn.Module:
    """Replace linear layers and 1x1 convolutions by quantised ones, in place.

    The module is returned (a bare layer is replaced); its attribute `quantization` is the `Report`. Layers are named
    as in `named_modules`. A 1x1 convolution becomes a `ConvLinear` around the quantised layer. A layer that occurs
    several times stays one layer; a weight that other modules use too is left alone. Nothing is changed on an error.

    Args:
        module: any module; on the meta device errors are NaN and all else is as it would be.
        make: (name, layer) -> its quantised copy, a `QuantisedLinear` unless it keeps the weight as it is. None, or
            `NotConverted` raised with a reason, leaves the layer alone. For a 1x1 convolution it gets an equal linear.
        kind: name of the format, for the report.
        include: patterns as of `fnmatch` of the layers to convert.
        exclude: patterns of layers to leave alone; they win over `include`.

    Raises:
        ValueError: a pattern matches no module, no layer is left to convert, or a weight is not finite.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, child in module.named_modules(remove_duplicate=False):
        names[child].append(name)
    known = [name for several in names.values() for name in several]
    for which, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not _matches(pattern, known):
                raise ValueError(f"{which}: the pattern {pattern!r} matches no layer of {type(module).__name__}")

    owners: dict[Tensor, set[str]] = defaultdict(set)
    for child, aliases in names.items():
        for parameter in child.parameters(recurse=False):
            owners[parameter].add(aliases[0])

    report = Report(kind=kind, bytes_before=_bytes(module))
    replacement: dict[nn.Module, nn.Module] = {}
    for child, aliases in names.items():
        if all(p.ndim < 2 for p in child.parameters(recurse=False)):
            continue
        name = aliases[0]
        try:
            layer = _layer(child, aliases, include, exclude, owners, make)
        except NotConverted as reason:
            report.skipped[name] = str(reason)
            continue
        same = not isinstance(layer, QuantisedLinear)  # it keeps the weight itself and rounds in its products
        report.converted[name] = 0.0 if same else relative_error(layer.dequantise(), _linear(child).weight)
        replacement[child] = ConvLinear(layer).train(layer.training) if isinstance(child, nn.Conv2d) else layer
    if not replacement:
        raise ValueError(f"{type(module).__name__} has no layer to convert: {report.skipped or 'no matrices'}")

    home = next(iter(replacement)).get_parameter("weight").device
    for child, layer in replacement.items():
        for name in names[child]:
            if name == "":
                module = layer
            else:
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, layer)
    report.bytes_after, report.arithmetic = _bytes(module), arithmetic(module, home)
    setattr(module, "quantization", report)  # noqa: B010 (typed as tensors and modules only)
    return module


def convert_to(
    kind: type[QuantisedLinear],
    module: nn.Module,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    **settings: Any,
) -> nn.Module:
    """`convert` to layers of one kind, each made of its own weight alone.

    Args:
        kind: of the layers.
        module, include, exclude: as of `convert`, and errors too.
        settings: of every layer.
    """

    def make(_: str, linear: nn.Linear) -> QuantisedLinear:
        return kind.from_linear(linear, **settings)

    return convert(module, make, kind=kind.kind, include=include, exclude=exclude)


def _layer(
    child: nn.Module,
    aliases: list[str],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    owners: dict[Tensor, set[str]],
    make: Make,
) -> nn.Module:
    """The quantised copy of a module with a matrix, or `NotConverted` with the reason."""
    reason = _reason_to_skip(child, aliases, include, exclude, owners)
    if reason is not None:
        raise NotConverted(reason)
    name, linear = aliases[0], _linear(child)
    if not linear.weight.is_meta and not linear.weight.isfinite().all():
        raise ValueError(f"the weight of {name or type(child).__name__} is not finite; it cannot be quantised")
    with torch.no_grad():
        layer = make(name, linear)
    if layer is None:
        raise NotConverted("the format does not take it")
    return layer


def _linear(child: nn.Module) -> nn.Linear:
    if isinstance(child, nn.Conv2d):
        return as_linear(child)
    assert isinstance(child, nn.Linear)
    return child


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _reason_to_skip(
    child: nn.Module,
    aliases: list[str],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    owners: dict[Tensor, set[str]],
) -> str | None:
    """Why a module with a matrix stays as it is, or None to convert it."""
    if type(child) is nn.Conv2d and not is_pointwise(child):
        return f"Conv2d with kernel {child.kernel_size} and {child.groups} groups is not pointwise"
    if type(child) is not nn.Linear and not is_pointwise(child):
        return f"{type(child).__name__} is not a plain nn.Linear or 1x1 nn.Conv2d"
    shared = owners[child.get_parameter("weight")] - {aliases[0]}
    if shared:
        return f"its weight is shared with {', '.join(sorted(shared))}"
    for pattern in exclude:
        if _matches(pattern, aliases):
            return f"excluded by {pattern!r}"
    if not any(_matches(pattern, aliases) for pattern in include):
        return f"not included by {', '.join(map(repr, include))}"
    return None


def _bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
