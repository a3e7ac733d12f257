"""Inception-v3 as FID uses it: the network of the TensorFlow weights of 2015-12-05, up to its 2048 pooled features.

It differs from the network of the paper (Szegedy et al. 2016) in three places, which the weights were made with:
average pooling in the mixed layers does not count the padding, the last mixed layer takes the maximum instead of the
average, and there are 1008 classes. Parameters have the names of torchvision's network and of the published PyTorch
port (pt_inception-2015-12-05-6726825d.pth), so that file loads as it is; its classifier is left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.pretrained import Located, MissingWeightsError, Published, seeded

DIM = 2048
SIDE = 299  # pixels of the input
WEIGHTS = Published(
    "Inception-v3 of the TensorFlow FID, ported to PyTorch",
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
)

Size = int | tuple[int, int]


class Unit(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU; padding keeps the side unless told otherwise."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, outputs, h', w')."""
        return F.relu(self.bn(self.conv(x)))


Step = tuple[str, int, Size, int, Size]
"""Name, outputs, kernel, stride, padding."""


class Mixed(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        inputs: channels.
        branches: chains of steps; two steps in a tuple of their own both take what comes before, and end the chain.
        pool: last branch. "average" (without the padding) or "max", each followed by a 1x1 unit of `pooled` outputs,
            or "reduce": maximum at stride 2 and nothing more.
        pooled: outputs of the last branch's unit.
    """

    def __init__(
        self,
        inputs: int,
        branches: list[list[Step | tuple[Step, Step]]],
        pool: Literal["average", "max", "reduce"],
        pooled: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[tuple[str, ...]]] = []
        for branch in branches:
            chain, width = [], inputs
            for step in branch:
                steps: tuple[Step, ...] = step if isinstance(step[0], tuple) else (step,)  # type: ignore[assignment]
                for name, outputs, kernel, stride, padding in steps:
                    self.add_module(name, Unit(width, outputs, kernel, stride, padding))
                width = steps[0][1]
                chain.append(tuple(s[0] for s in steps))
            self.chains.append(chain)
        if pool != "reduce":
            self.branch_pool = Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> all branches side by side."""
        outputs: list[Tensor] = []
        for chain in self.chains:
            y = [x]
            for names in chain:
                y = [self.get_submodule(name)(y[0]) for name in names]
            outputs += y
        if self.pool == "reduce":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _a(inputs: int, pooled: int) -> Mixed:
    five: list[Step | tuple[Step, Step]] = [("branch5x5_1", 48, 1, 1, 0), ("branch5x5_2", 64, 5, 1, 2)]
    three: list[Step | tuple[Step, Step]] = [
        ("branch3x3dbl_1", 64, 1, 1, 0),
        ("branch3x3dbl_2", 96, 3, 1, 1),
        ("branch3x3dbl_3", 96, 3, 1, 1),
    ]
    return Mixed(inputs, [[("branch1x1", 64, 1, 1, 0)], five, three], "average", pooled)


def _b(inputs: int) -> Mixed:
    double: list[Step | tuple[Step, Step]] = [
        ("branch3x3dbl_1", 64, 1, 1, 0),
        ("branch3x3dbl_2", 96, 3, 1, 1),
        ("branch3x3dbl_3", 96, 3, 2, 0),
    ]
    return Mixed(inputs, [[("branch3x3", 384, 3, 2, 0)], double], "reduce")


def _c(inputs: int, c: int) -> Mixed:
    row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
    seven: list[Step | tuple[Step, Step]] = [
        ("branch7x7_1", c, 1, 1, 0),
        ("branch7x7_2", c, row[0], 1, row[1]),
        ("branch7x7_3", 192, column[0], 1, column[1]),
    ]
    double: list[Step | tuple[Step, Step]] = [
        ("branch7x7dbl_1", c, 1, 1, 0),
        ("branch7x7dbl_2", c, column[0], 1, column[1]),
        ("branch7x7dbl_3", c, row[0], 1, row[1]),
        ("branch7x7dbl_4", c, column[0], 1, column[1]),
        ("branch7x7dbl_5", 192, row[0], 1, row[1]),
    ]
    return Mixed(inputs, [[("branch1x1", 192, 1, 1, 0)], seven, double], "average", 192)


def _d(inputs: int) -> Mixed:
    three: list[Step | tuple[Step, Step]] = [("branch3x3_1", 192, 1, 1, 0), ("branch3x3_2", 320, 3, 2, 0)]
    seven: list[Step | tuple[Step, Step]] = [
        ("branch7x7x3_1", 192, 1, 1, 0),
        ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
        ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
        ("branch7x7x3_4", 192, 3, 2, 0),
    ]
    return Mixed(inputs, [three, seven], "reduce")


def _e(inputs: int, pool: Literal["average", "max"]) -> Mixed:
    def fork(name: str) -> tuple[Step, Step]:
        return (f"{name}a", 384, (1, 3), 1, (0, 1)), (f"{name}b", 384, (3, 1), 1, (1, 0))

    three: list[Step | tuple[Step, Step]] = [("branch3x3_1", 384, 1, 1, 0), fork("branch3x3_2")]
    double: list[Step | tuple[Step, Step]] = [
        ("branch3x3dbl_1", 448, 1, 1, 0),
        ("branch3x3dbl_2", 384, 3, 1, 1),
        fork("branch3x3dbl_3"),
    ]
    return Mixed(inputs, [[("branch1x1", 320, 1, 1, 0)], three, double], pool, 192)


class Inception(nn.Module):
    """The network without its classifier; always in eval mode, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _c(768, 128),
            _c(768, 160),
            _c(768, 160),
            _c(768, 192),
        )
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "max")
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images.

        Args:
            x: (b, 3, 299, 299) in [-1, 1].

        Returns:
            (b, 2048), not negative.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, module in self.named_children():
            if name.startswith("Mixed"):
                x = module(x)
        return x.mean((2, 3))


def load_inception(weights: Located) -> nn.Module:
    """The network with its weights: (b, 3, 299, 299) in [-1, 1] -> (b, 2048).

    Args:
        weights: the PyTorch port, or NVIDIA's TorchScript file (inception-2015-12-05.pt, clean-fid's own), or random.

    Raises:
        MissingWeightsError: a file that holds another network.
    """
    if weights.path is None:
        assert weights.seed is not None
        with seeded(weights.seed):
            net = Inception()
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return net
    if weights.path.suffix == ".pt":
        return _Scripted(torch.jit.load(weights.path, map_location="cpu").eval())
    state = torch.load(weights.path, map_location="cpu", weights_only=True)
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "AuxLogits."))}
    net = Inception()
    missing = net.load_state_dict(state, strict=False)
    lacking = [k for k in missing.missing_keys if not k.endswith("num_batches_tracked")]
    if lacking or missing.unexpected_keys:
        key = (lacking or missing.unexpected_keys)[0]
        raise MissingWeightsError(
            f"features={weights.given}: not the Inception of FID ({'lacks' if lacking else 'has'} {key}); "
            f"expected {WEIGHTS.file} from {WEIGHTS.source}"
        )
    return net


class _Scripted(nn.Module):
    """The layers of the TorchScript file, which take what `Inception` takes."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.layers = script.layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).view(len(x), DIM)  # type: ignore[operator]
