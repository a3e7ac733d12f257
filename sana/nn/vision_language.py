"""What a vision-language model is about to say of an image, for metrics and rewards: any model of transformers with a
chat template, such as LLaVA, Qwen2.5-VL and InternVL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class VisionLanguage:
    """A frozen model with its processor.

    Args:
        folder: of both, as transformers saves them.
        device: where it works.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = device
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        network: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, image: NDArray[np.uint8], text: str) -> Tensor:
        """Logits (v,) float32 of the first token of the answer to a uint8 (h, w, 3) image and a text."""
        content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        return self.network(**inputs).logits[0, -1].float()

    def first_tokens(self, word: str) -> list[int]:
        """Tokens that an answer can begin with if it is this word: lower case or capitalised, after a space or not."""
        return first_tokens(self.processor.tokenizer, word)


def first_tokens(tokenizer: Any, word: str) -> list[int]:
    """See `VisionLanguage.first_tokens`; of any tokenizer of transformers."""
    texts = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return sorted({tokenizer.encode(text, add_special_tokens=False)[0] for text in texts})
