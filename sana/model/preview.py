"""What a picture is going to be, while it is drawn: a small image per step for the price of a small decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.model.generate import Painter, to_pixels
from sana.run.sidecar import replace_bytes
from sana.sampler.guided import Step

PATCH = 8  # latent pixels per side that are decoded
RIDGE = 1e-3  # of the fit, relative to the mean square of the latent
SIDE = 256  # pixels that the longer side of a preview has at least


class Preview:
    """Writes the pictures of the current batch, side by side, at every n-th step.

    The decoder decodes one patch of the predicted sample; the linear map from latent channels to the mean colour of a
    latent pixel that fits this patch best then colours all of them. So a preview costs a decode of 8 x 8 latent pixels
    and follows any autoencoder.

    Args:
        painter: whose autoencoder decodes.
        path: of the PNG, replaced each time.
        every: steps between pictures; there is one at the last step too.
    """

    def __init__(self, painter: Painter, path: str | Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"preview: every {every} steps; expected a positive number, or preview=0 for none")
        self.painter, self.path, self.every = painter, Path(path), every

    def __call__(self, step: Step) -> None:
        """Draw when due."""
        if (step.index + 1) % self.every and step.index + 1 != step.steps:
            return
        images = to_pixels(self.colours(step.x0))
        picture = np.concatenate(list(images), axis=1)
        scale = max(1, SIDE // max(images.shape[1:3]))
        picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        data = io.BytesIO()
        Image.fromarray(picture).save(data, format="PNG", compress_level=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(self.path, data.getvalue())

    @torch.no_grad()
    def colours(self, x0: Tensor) -> Tensor:
        """(b, c, 1, h, w) latents -> (b, 3, h, w) colours in about [-1, 1]."""
        latent = x0.squeeze(2).float()
        h, w = (min(PATCH, side) for side in latent.shape[2:])
        top, left = (latent.shape[2] - h) // 2, (latent.shape[3] - w) // 2
        patch = latent[:1, :, top : top + h, left : left + w]
        image = self.painter.decode(patch.unsqueeze(2))
        target = torch.from_numpy(image).to(patch).permute(0, 3, 1, 2) / 127.5 - 1
        target = F.adaptive_avg_pool2d(target, (h, w)).flatten(2)[0].T
        inputs = _with_one(patch).flatten(2)[0].T
        penalty = RIDGE * inputs.square().mean() * torch.eye(inputs.shape[1], device=inputs.device)
        map = torch.linalg.solve(inputs.T @ inputs / len(inputs) + penalty, inputs.T @ target / len(inputs))
        return torch.einsum("bchw,cd->bdhw", _with_one(latent), map)

    def close(self) -> None:
        """The pictures are drawn: their previews go."""
        self.path.unlink(missing_ok=True)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
