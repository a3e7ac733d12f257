"""What a quantisation changed: layers, sizes, and errors against the network as it was."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sana.quant.layer import QuantisedLinear


@dataclass
class Report:
    """What a quantisation changed; the attribute `quantization` of the network that it returned.

    Errors are relative, |y' - y| / |y| in the Frobenius norm.

    Attributes:
        kind: name of the format.
        arithmetic: how products are computed where the network lies; "emulated ..." where not in the format itself,
            and then its time says nothing about the format.
        converted: name of a layer -> error of its weight.
        skipped: name of a module with a matrix or kernel that stayed as it was -> why.
        bytes_before, bytes_after: of all parameters and buffers of the module.
        outputs: name of a converted layer -> error of its output, each given what the unquantised network gives it;
            filled by `measure_errors`.
        output: error of the output of the whole network; filled by `measure_errors`.
    """

    kind: str = ""
    arithmetic: str = ""
    converted: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    outputs: dict[str, float] = field(default_factory=dict)
    output: float | None = None

    def summary(self) -> str:
        """One line."""
        whole = "" if self.output is None else f"; output error {self.output:.2%}"
        return (
            f"{self.kind} in {len(self.converted)} layers, {len(self.skipped)} skipped; "
            f"{self.bytes_before / 2**20:.2f} MiB before, {self.bytes_after / 2**20:.2f} MiB after{whole}"
            f"; {self.arithmetic}"
        )

    def __str__(self) -> str:
        lines = [self.summary()]
        for name, error in self.converted.items():
            output = f", output {self.outputs[name]:.2%}" if name in self.outputs else ""
            lines.append(f"  {name}: relative error of weight {error:.2%}{output}")
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def report_of(network: nn.Module) -> Report:
    """The report of a quantised network.

    Raises:
        ValueError: the network was not quantised.
    """
    report = getattr(network, "quantization", None)
    if not isinstance(report, Report):
        raise ValueError(f"{type(network).__name__} was not quantised: it has no report")
    return report


def arithmetic(network: nn.Module, device: torch.device) -> str:
    """How the quantised layers of a network compute on a device, in words; each way once."""
    layers = (module for module in network.modules() if isinstance(module, QuantisedLinear))
    return "; ".join(dict.fromkeys(layer.arithmetic(device) for layer in layers))


def measure_errors(
    before: nn.Module, after: nn.Module, run: Callable[[nn.Module], Tensor] | Sequence[Any] | Tensor
) -> Report:
    """Errors of outputs, of each converted layer and of the whole network; entered into the report of `after`.

    Each layer is given what the unquantised network gives it, over all its calls, so that its error is its own. The
    error of the whole includes all that adds up on the way.

    Args:
        before: the network as it was, in bf16 or fp32, such as a deep copy made before the conversion.
        after: the quantised one, on the same device.
        run: (network) -> its output; or positional arguments of the network; or its only argument.

    Raises:
        ValueError: `after` has no report, or a layer of it is not in `before`.
    """
    report = report_of(after)
    originals, layers = dict(before.named_modules()), dict(after.named_modules())
    missing = [name for name in report.converted if name not in originals]
    if missing:
        raise ValueError(f"measure_errors: {missing[0]!r} is no layer of the unquantised {type(before).__name__}")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            error, norm = _squares(layers[name](*given), output)
            sums[name][0] += error
            sums[name][1] += norm

        return hook

    def output_of(network: nn.Module) -> Tensor:
        if isinstance(run, Tensor):
            return network(run)
        return run(network) if callable(run) else network(*run)

    hooks = [originals[name].register_forward_hook(watch(name)) for name in report.converted]
    try:
        with torch.no_grad():
            expected = output_of(before)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        error, norm = _squares(output_of(after), expected)
    report.outputs = {name: _relative(*sums[name]) for name in report.converted if name in sums}
    report.output = _relative(error, norm)
    return report


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm, in float64; 0 where both are zero, NaN of meta tensors."""
    if expected.is_meta:
        return math.nan
    return _relative(*_squares(found, expected))


def _squares(found: Tensor, expected: Tensor) -> tuple[float, float]:
    exact = expected.detach().double()
    return float((found.detach().double() - exact).square().sum()), float(exact.square().sum())


def _relative(error: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return (error / norm) ** 0.5
