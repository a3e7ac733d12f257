"""Yes or no from a vision-language model of transformers (Qwen2.5-VL, InternVL and others with a chat template)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sana.nn.vision_language import VisionLanguage
from sana.pretrained import Published, locate, place

WEIGHTS = Published(
    "a vision-language model with a chat template, such as Qwen2.5-VL-7B-Instruct",
    "the model's folder",
    "hf://Qwen/Qwen2.5-VL-7B-Instruct",
)
REQUEST = "{question} Answer with yes or no."


class YesNo:
    """Answers "yes" where the next token is likelier "yes" than "no".

    Args:
        weights: folder of the model with its processor, or ``hf://organisation/repository``.
        device: "auto", or a torch device.

    Raises:
        ValueError: for a single file, or a seed: architecture and words come from the folder.
    """

    def __init__(self, weights: str | None = None, device: str = "auto") -> None:
        located = locate(weights, WEIGHTS, "metric.dpg_vlm.answerer.weights")
        if located.path is None or not located.path.is_dir():
            raise ValueError(f"weights={weights}: needs a folder, which says the architecture and the words")
        self.model = VisionLanguage(located.path, place(device))
        self.settings: dict[str, Any] = {"answerer": located.said, "request": REQUEST}
        self.words = [self.model.first_tokens(word) for word in ("yes", "no")]

    def __call__(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        """An answer, "yes" or "no", to each question."""
        answers = []
        for question in questions:
            logits = self.model.logits(image, REQUEST.format(question=question))
            yes, no = (torch.logsumexp(logits[ids], 0) for ids in self.words)
            answers.append("yes" if yes > no else "no")
        return answers
