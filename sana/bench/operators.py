"""``bench.py operators``: each op of ours against the peer's expression, eager and compiled, and our naive way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sana.bench import peers
from sana.bench.counts import H200, LAUNCH
from sana.bench.measure import Bench, Case, captured, measure, one_line, relative
from sana.bench.rows import Row

Function = Callable[..., Tensor]


def cases(tiny: bool) -> list[Case]:
    """All rows, the ones with a bar first."""
    return [*attention_cases(tiny), *other_cases(tiny)]


def attention_cases(tiny: bool, compiled: bool = True) -> list[Case]:
    """Linear attention at the width of 1.6B: batches of 1024 px, one image of 2048 px, one of 1024."""
    shapes = [(2, 12, 2), (1, 20, 4)] if tiny else [(16, 1024, 70), (1, 4096, 70), (1, 1024, 70)]
    found = []
    for shape in shapes:
        b, n, heads = shape
        text = f"b{b} n{n} heads{heads} dh32"
        for way in ("fwd+bwd", "fwd"):
            found.append(Case("operators", f"linear attention {way}", text, _Attention(shape, way, False), 8))
            if compiled:
                found.append(
                    Case("operators", f"linear attention {way}", text, _Attention(shape, way, True), 25, "compiled")
                )
    return found


def other_cases(tiny: bool) -> list[Case]:
    """The other ops, forward and backward."""
    b, side, d = (1, 4, 64) if tiny else (16, 32, 2240)
    n = side * side
    tokens = f"b{b} n{n} d{d}"
    pixels = (1, 64, 16) if tiny else (1, 256 * 256, 256)
    found = []
    for way in ("fwd", "fwd+bwd"):
        found += [
            Case("operators", f"depthwise gate {way}", f"b{b} {side}x{side} c{5 * d // 2}", _Gate(b, side, d, way)),
            Case("operators", f"modulated norm {way}", tokens, _Norm(b, n, d, way)),
            Case("operators", f"gated residual {way}", tokens, _Residual(b, n, d, way)),
            Case("operators", f"rms norm {way}", "b{} n{} d{}".format(*pixels), _Rms(*pixels, way)),
        ]
    return found


class _Op:
    """One row: inputs, the forms of the op, and what it must move.

    Args:
        way: "fwd" or "fwd+bwd".
        compiled: hold ours against the compiled peer instead of the eager one.
    """

    def __init__(self, way: str, compiled: bool = False) -> None:
        self.way, self.compiled = way, compiled
        self.bars: dict[str, float] = {}

    def inputs(self, bench: Bench) -> list[Tensor]:
        """Leaves on the device."""
        raise NotImplementedError

    def forms(self) -> tuple[Function, Function, Function]:
        """Ours, our naive one, and the peer's."""
        raise NotImplementedError

    def values(self, inputs: Sequence[Tensor]) -> float:
        """That a forward reads and writes at least."""
        raise NotImplementedError

    def theirs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as the peer has them; differentiable."""
        return list(inputs)

    def back(self, out: Tensor) -> Tensor:
        """The peer's result as ours is; differentiable."""
        return out

    def forecast(self, bench: Bench, row: Row) -> None:
        """Floor: inputs read and the result written once, twice as much backwards. Predicted: and the launches."""
        backward = self.way == "fwd+bwd"
        moved = self.values(self.inputs(bench)) * bench.dtype.itemsize * (3 if backward else 1)
        row.floor_ms = moved / H200.bytes * 1e3
        row.predicted_ms = row.floor_ms + LAUNCH * 1e3 * (5 if backward else 2)
        row.bars |= self.bars

    def __call__(self, bench: Bench, row: Row) -> None:
        inputs, backward = self.inputs(bench), self.way == "fwd+bwd"
        ours, naive, peer = self.forms()
        with torch.no_grad():
            given = [_leaf(x.contiguous()) for x in self.theirs(inputs)]
            gradient, other = torch.randn_like(ours(*inputs)), torch.randn_like(peer(*given))
        run = _step if backward else _plain
        inner = 1 if bench.device.type == "cpu" else 10
        sides = {"ours": run(ours, inputs, gradient)}
        if self.compiled:
            fast = torch.compile(peer, fullgraph=True, dynamic=False)
            measure(bench, row, sides | {"compiled": run(fast, given, other)}, inner=inner)
            return
        expected = _results(naive, [x.detach().double() for x in inputs], gradient.double(), backward)
        forms = {"ours": ours, "naive": naive, "eager": lambda *x: self.back(peer(*self.theirs(x)))}
        for side, form in forms.items():
            row.error[side] = _worst(_results(form, inputs, gradient, backward), expected)
        self.forecast(bench, row)
        sides |= {"eager": run(peer, given, other), "naive": run(naive, inputs, gradient)}
        measure(bench, row, sides, inner=inner)
        if bench.device.type == "cuda":  # what the kernels take without the time of launching them
            try:
                graphs = Row("", "", "", "")
                recorded = {side: captured(sides[side], bench.device) for side in ("ours", "eager")}
                measure(bench, graphs, recorded, inner=inner)
                row.facts |= {f"{side}_in_graph_ms": one["median"] for side, one in graphs.ms.items()}
            except Exception as error:
                row.failed["graph"] = one_line(error)


class _Attention(_Op):
    def __init__(self, shape: tuple[int, int, int], way: str, compiled: bool) -> None:
        super().__init__(way, compiled)
        self.shape = shape
        self.bars = {"eager": 3.0, "compiled": 1.2} if way == "fwd+bwd" else {}

    def inputs(self, bench: Bench) -> list[Tensor]:
        b, n, heads = self.shape  # views of one fused product, as the module has them
        return [_leaf(x.unflatten(-1, (heads, -1))) for x in _draw(bench, b, n, 3 * heads * 32).chunk(3, dim=-1)]

    def forms(self) -> tuple[Function, Function, Function]:
        from sana.ops.linear_attention import naive
        from sana.ops.linear_attention.op import relu_linear_attention

        heads = self.shape[2]
        return (
            relu_linear_attention,
            naive.relu_linear_attention,
            lambda q, k, v: peers.linear_attention(q, k, v, heads),
        )

    def theirs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [x.flatten(2) for x in inputs]

    def back(self, out: Tensor) -> Tensor:
        return out.unflatten(2, (self.shape[2], -1))

    def values(self, inputs: Sequence[Tensor]) -> float:
        return inputs[0].numel() * 4


class _Gate(_Op):
    def __init__(self, b: int, side: int, d: int, way: str) -> None:
        super().__init__(way)
        self.shape = (b, side, d)

    def inputs(self, bench: Bench) -> list[Tensor]:
        b, side, d = self.shape
        u, w, bias = _draw(bench, b, side * side, 5 * d), _draw(bench, 5 * d, 1, 3, 3), _draw(bench, 5 * d)
        return [u, _leaf(w * 0.3), _leaf(bias * 0.1)]

    def forms(self) -> tuple[Function, Function, Function]:
        from sana.ops.depthwise_gate import naive
        from sana.ops.depthwise_gate.op import depthwise_gate

        side = self.shape[1]
        return (
            lambda u, w, bias: depthwise_gate(u, w, bias, side, side),
            lambda u, w, bias: naive.depthwise_gate(u, w, bias, side, side),
            peers.depthwise_gate,
        )

    def theirs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        side = self.shape[1]
        return [inputs[0].mT.unflatten(2, (side, side)), *inputs[1:]]

    def back(self, out: Tensor) -> Tensor:
        return out.flatten(2).mT

    def values(self, inputs: Sequence[Tensor]) -> float:
        return inputs[0].numel() * 1.5


class _Norm(_Op):
    def __init__(self, b: int, n: int, d: int, way: str) -> None:
        super().__init__(way)
        self.shape = (b, n, d)

    def inputs(self, bench: Bench) -> list[Tensor]:
        b, n, d = self.shape
        return [_draw(bench, b, n, d), _draw(bench, b, 1, d), _draw(bench, b, 1, d)]

    def forms(self) -> tuple[Function, Function, Function]:
        from sana.ops.adaln import naive
        from sana.ops.adaln.op import modulated_layer_norm

        return modulated_layer_norm, naive.modulated_layer_norm, peers.modulated_layer_norm

    def values(self, inputs: Sequence[Tensor]) -> float:
        return inputs[0].numel() * 2


class _Residual(_Norm):
    def inputs(self, bench: Bench) -> list[Tensor]:
        b, n, d = self.shape
        return [_draw(bench, b, n, d), _draw(bench, b, 1, d), _draw(bench, b, n, d)]

    def forms(self) -> tuple[Function, Function, Function]:
        from sana.ops.adaln import naive
        from sana.ops.adaln.op import gated_residual

        return gated_residual, naive.gated_residual, peers.gated_residual

    def values(self, inputs: Sequence[Tensor]) -> float:
        return inputs[0].numel() * 3


class _Rms(_Norm):
    def inputs(self, bench: Bench) -> list[Tensor]:
        b, n, d = self.shape
        return [_draw(bench, b, n, d), _draw(bench, d), _draw(bench, d)]

    def forms(self) -> tuple[Function, Function, Function]:
        from sana.ops.rms_norm import naive
        from sana.ops.rms_norm.op import rms_norm

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return rms_norm(x, weight, 1e-5, bias=bias)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return naive.rms_norm(x, weight, 1e-5, bias=bias)

        return ours, plain, peers.rms_norm


def _draw(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype).requires_grad_()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _plain(function: Function, inputs: list[Tensor], gradient: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def _step(function: Function, inputs: list[Tensor], gradient: Tensor) -> Callable[[], Any]:
    leaves = [_leaf(x) for x in inputs]

    def run() -> Any:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    return run


def _results(function: Function, inputs: Sequence[Tensor], gradient: Tensor, backward: bool) -> list[Tensor]:
    """The value, and the gradients of all inputs."""
    leaves = [_leaf(x) for x in inputs]
    out = function(*leaves)
    return [out.detach(), *(torch.autograd.grad(out, leaves, gradient) if backward else [])]


def _worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))
