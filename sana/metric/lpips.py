"""LPIPS (Zhang et al. 2018): distance of unit features of VGG-16, weighted by what people found different.

Two files make it: torchvision's VGG-16 of ImageNet and the paper's five linear weights (lpips' weights/v0.1/vgg.pth).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sana.pretrained import Published, locate, place, seeded

BACKBONE = Published(
    "VGG-16 of ImageNet",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af",
)
LINEAR = Published(
    "the linear weights of LPIPS 0.1 for VGG-16",
    "vgg.pth",
    "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1",
)
ENDS = (4, 9, 16, 23, 30)  # of VGG's slices: relu1_2, 2_2, 3_3, 4_3, 5_3
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distances of image pairs (b, 3, h, w) in [-1, 1] -> (b,), at the images' own size.

    Args:
        backbone, linear: weights, see `sana.pretrained`.
        device: "auto", or a torch device.
    """

    def __init__(self, backbone: str | None = None, linear: str | None = None, device: str = "auto") -> None:
        super().__init__()
        from torchvision.models import vgg16

        body = locate(backbone, BACKBONE, "metric.lpips.measure.backbone")
        heads = locate(linear, LINEAR, "metric.lpips.measure.linear")
        with seeded(body.seed or 0):
            self.layers: Any = vgg16(weights=None).features
        with seeded(heads.seed or 0):
            weights = [torch.rand(1, w, 1, 1) for w in WIDTHS]
        if body.path is not None:
            state = torch.load(body.path, map_location="cpu", weights_only=True)
            self.layers.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("features.")})
        if heads.path is not None:
            state = torch.load(heads.path, map_location="cpu", weights_only=True)
            weights = [state[f"lin{i}.model.1.weight"] for i in range(len(WIDTHS))]
        self.weights = nn.ParameterList([nn.Parameter(w.view(1, -1, 1, 1)) for w in weights])
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.settings = {"lpips": "VGG-16, version 0.1", "backbone": body.said, "linear": heads.said}
        self.to(place(device)).eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of the five slices, each of unit length along the channels."""
        x, maps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i + 1 in ENDS:
                maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if i + 1 == ENDS[-1]:
                break
        return maps

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(b,) distances; 0 for equal images."""
        device = self.weights[0].device
        total = torch.zeros(len(x), device=device)
        for a, b, weight in zip(self.features(x.to(device)), self.features(y.to(device)), self.weights, strict=True):
            total = total + ((a - b).square() * weight).sum(1).mean((1, 2))
        return total.cpu()
