"""Mask2Former (Cheng et al. 2022) of Hugging Face as GenEval's detector, with the post-processing of the detector that
the published numbers come from.

Hugging Face's own post-processing scores masks at 384 x 384 pixels whatever the aspect and enlarges them by nearest
neighbours; here masks are brought to the padded input, cropped, and brought to the image's own size before anything is
decided, as mmdet does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sana.metric.coco import CLASSES
from sana.metric.geneval_rules import Found
from sana.pretrained import Published, locate, place, seeded

SHORT, LONG, DIVISOR = 800, 1333, 32  # pixels of the input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOP = 100  # pairs of query and class per image
LEAST = 0.2  # scores below it are under every threshold of the rules
WEIGHTS = Published(
    "Mask2Former Swin-S, COCO instances",
    "the folder of facebook/mask2former-swin-small-coco-instance",
    "hf://facebook/mask2former-swin-small-coco-instance",
)


class Mask2Former:
    """Detector of the 80 COCO classes under GenEval's names.

    Args:
        weights: folder of a model with config.json, ``hf://organisation/repository``, or ``random:SEED``.
        device: "auto", or a torch device.

    Raises:
        MissingWeightsError: see `sana.pretrained.locate`.
    """

    def __init__(self, weights: str | None = None, device: str = "auto") -> None:
        located = locate(weights, WEIGHTS, "metric.geneval.detector.weights")
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

        if located.path is None:
            assert located.seed is not None
            with seeded(located.seed):
                config = Mask2FormerConfig(num_labels=len(CLASSES))  # type: ignore[call-arg]
                self.network: Any = Mask2FormerForUniversalSegmentation(config)
        else:
            self.network = Mask2FormerForUniversalSegmentation.from_pretrained(located.path)
        labels = self.network.config.num_labels
        if labels != len(CLASSES):
            raise ValueError(f"geneval: {located.said} has {labels} classes, expected COCO's {len(CLASSES)} instances")
        self.device = place(device)
        self.network = self.network.to(self.device).eval().requires_grad_(False)
        self.settings: dict[str, Any] = {"detector": "Mask2Former (transformers)", "detector_weights": located.said}

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> dict[str, list[Found]]:
        """Objects of a uint8 (h, w, 3) image by class, with masks at its own size."""
        x, resized = prepare(image)
        with torch.autocast(self.device.type, enabled=False):
            out = self.network(pixel_values=x.to(self.device))
        return instances(
            out.class_queries_logits[0].float().cpu(),
            out.masks_queries_logits[0].float().cpu(),
            tuple(x.shape[2:]),  # type: ignore[arg-type]
            resized,
            image.shape[:2],
        )


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the input: shorter side 800 unless the longer one would exceed 1333."""
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(image: NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (h, w, 3) -> normalised (1, 3, H, W), padded below and right to multiples of 32, and its size before that.

    Bilinear without antialiasing, as OpenCV has it.
    """
    size = input_size(*image.shape[:2])
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size, mode="bilinear", align_corners=False) / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return F.pad(x, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size


def instances(
    logits: Tensor, masks: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, ...]
) -> dict[str, list[Found]]:
    """Objects from the network's output.

    A score is the probability of the class times the mean probability of the mask where it is above one half; the 100
    likeliest pairs of query and class are objects.

    Args:
        logits: (q, 81), the last for nothing.
        masks: (q, h, w) logits at some resolution of the padded input.
        padded, resized, original: (height, width) of the input, of the image in it, and of the image itself.
    """
    chances = logits.softmax(-1)[:, :-1].flatten()
    best, places = chances.topk(min(TOP, len(chances)))
    full: dict[int, tuple[NDArray[np.bool_], float]] = {}
    objects: dict[str, list[Found]] = {}
    for chance, where in zip(best.tolist(), places.tolist(), strict=True):
        query, label = divmod(where, logits.shape[1] - 1)
        if chance <= LEAST:
            continue
        if query not in full:
            x = F.interpolate(masks[query][None, None], padded, mode="bilinear", align_corners=False)
            x = x[:, :, : resized[0], : resized[1]]
            x = F.interpolate(x, original[:2], mode="bilinear", align_corners=False)[0, 0]
            inside = x > 0
            full[query] = inside.numpy(), float(x[inside].sigmoid().sum() / (inside.sum() + 1e-6))
        mask, sure = full[query]
        score = chance * sure
        if score > LEAST:
            objects.setdefault(CLASSES[label], []).append(Found(_box(mask), score, mask))
    return objects


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
