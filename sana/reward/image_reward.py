"""ImageReward (Xu et al. 2023): how much people prefer an image for its prompt, in standard deviations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.pretrained import MissingWeightsError, Published, locate, place, seeded
from sana.reward.blip import Blip, Sizes
from sana.reward.mlp import read_tensors
from sana.reward.protocol import paired

WEIGHTS = Published("ImageReward 1.0", "ImageReward.pt", "hf://THUDM/ImageReward/ImageReward.pt")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
AVERAGE, SPREAD = 0.16717362830052426, 1.0333394966054072  # of raw scores over the training prompts
LENGTH = 35  # tokens


class ImageReward:
    """The published reward.

    Args:
        weights: ImageReward.pt, see `sana.pretrained`.
        tokenizer: folder of bert-base-uncased's words, or a repository of the hub.
        device: "auto", or a torch device.
        batch_size: images per call of the network.
        sizes: of the network.
        key: of the node that this is, for messages.
    """

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str = "auto",
        batch_size: int = 16,
        sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
        key: str = "metric.image_reward.reward",
    ) -> None:
        located = locate(weights, WEIGHTS, f"{key}.weights")
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer.removeprefix("hf://"))
        except (OSError, ValueError) as error:
            raise MissingWeightsError(
                f"{key}.tokenizer={tokenizer}: not to be had ({str(error).splitlines()[0][:99]}); "
                "give the folder of google-bert/bert-base-uncased's tokenizer"
            ) from None
        self.device, self.batch_size, self.side = place(device), batch_size, sizes.side
        with seeded(located.seed or 0):
            self.network = Blip(sizes)
        if located.path is not None:
            self.network.fill(read_tensors(str(located.path)), located.given)
        self.network.to(self.device)
        self.settings: dict[str, Any] = {"reward": "ImageReward", "weights": located.said}

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(n,) scores, of mean 0 and standard deviation 1 over the prompts that it was trained with."""
        paired(images, prompts)
        scores = []
        for start in range(0, len(images), self.batch_size):
            one = slice(start, start + self.batch_size)
            words = self.tokenizer(
                list(prompts[one]), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            pixels = torch.stack([self._pixels(np.asarray(x)) for x in images[one]]).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                raw = self.network(pixels, words.input_ids.to(self.device), words.attention_mask.to(self.device))
            scores.append((raw.float().cpu() - AVERAGE) / SPREAD)
        return torch.cat(scores)

    def _pixels(self, image: np.ndarray) -> Tensor:
        """Shorter side to the network's by PIL's bicubic filter, centre crop, CLIP's normalisation."""
        h, w = image.shape[:2]
        scale = self.side / min(h, w)
        across, down = (self.side if side == min(h, w) else int(side * scale) for side in (w, h))
        size = (across, down)
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - self.side) / 2), round((size[1] - self.side) / 2)
        x = torch.from_numpy(np.array(picture.crop((left, top, left + self.side, top + self.side))))
        x = x.permute(2, 0, 1).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
