"""Weight-only int8: linear layers keep one byte per weight and one scale per output channel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer with symmetric int8 weights; activations and arithmetic stay in the dtype of the input.

    ``scale[o] = max |W[o]| / 127`` and ``weight[o] = round(W[o] / scale[o])``; a row of zeros has scale 1.

    Attributes:
        weight: (out, in) int8 in [-127, 127].
        scale: (out, 1) float32.
        bias: (out,) in the dtype of the original, or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        full = linear.weight.detach().float()
        largest = full.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        self.register_buffer("weight", (full / scale).round_().clamp_(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), dtype of x (or that of autocast)."""
        # Scaled before the product: in float16 the sums of unscaled integers could overflow.
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass
class Report:
    """What a quantisation changed.

    Attributes:
        converted: name of a layer -> relative error of its weight, |W - W'| / |W| in the Frobenius norm.
        skipped: name of a module with a matrix or kernel that stayed as it was -> why.
        bytes_before, bytes_after: of all parameters and buffers of the module.
    """

    converted: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"int8 weights in {len(self.converted)} layers, {len(self.skipped)} skipped; "
            f"{self.bytes_before / 2**20:.2f} MiB before, {self.bytes_after / 2**20:.2f} MiB after",
            *(f"  {name}: relative error {error:.2%}" for name, error in self.converted.items()),
            *(f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()),
        ]
        return "\n".join(lines)


def int8_weight(module: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()) -> nn.Module:
    """Replace linear layers by `Int8Linear`, for inference: rounding to nearest, without calibration.

    The module is changed in place and returned (a bare `nn.Linear` is replaced); its attribute `quantization`
    is the `Report`. Input gradients still flow, weights get none. Layers are named as in `named_modules`.

    Args:
        module: any module.
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
    for pattern in (*include, *exclude):
        if not _matches(pattern, known):
            raise ValueError(f"the pattern {pattern!r} matches no layer of {type(module).__name__}")

    owners: dict[Tensor, set[str]] = defaultdict(set)
    for child, aliases in names.items():
        for parameter in child.parameters(recurse=False):
            owners[parameter].add(aliases[0])

    report = Report(bytes_before=_bytes(module))
    replacement: dict[nn.Module, nn.Module] = {}
    for child, aliases in names.items():
        if all(p.ndim < 2 for p in child.parameters(recurse=False)):
            continue
        name = aliases[0]
        reason = _reason_to_skip(child, aliases, include, exclude, owners)
        if reason is not None:
            report.skipped[name] = reason
            continue
        assert isinstance(child, nn.Linear)
        if not child.weight.isfinite().all():
            raise ValueError(f"the weight of {name or type(child).__name__} is not finite; it cannot be quantised")
        layer = Int8Linear(child).train(child.training)
        report.converted[name] = _relative_error(child.weight.detach(), layer)
        replacement[child] = layer
    if not replacement:
        raise ValueError(f"{type(module).__name__} has no layer to convert: {report.skipped or 'no matrices'}")

    for child, layer in replacement.items():
        for name in names[child]:
            if name == "":
                module = layer
            else:
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, layer)
    report.bytes_after = _bytes(module)
    setattr(module, "quantization", report)  # noqa: B010 (typed as tensors and modules only)
    return module


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
    if type(child) is not nn.Linear:
        return f"{type(child).__name__} is not a plain nn.Linear"
    shared = owners[child.weight] - {aliases[0]}
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


def _relative_error(weight: Tensor, layer: Int8Linear) -> float:
    full = weight.double()
    norm = full.norm()
    if norm == 0:
        return 0.0
    return float((layer.weight.double() * layer.scale.double() - full).norm() / norm)
