"""Yes or no from a vision-language model of transformers (Qwen2.5-VL, InternVL and others with a chat template)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

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
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = place(device)
        self.processor: Any = AutoProcessor.from_pretrained(located.path)
        network: Any = AutoModelForImageTextToText.from_pretrained(located.path, dtype="auto")
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.settings: dict[str, Any] = {"answerer": located.said, "request": REQUEST}
        self.words = [self._first_tokens(word) for word in ("yes", "no")]

    def _first_tokens(self, word: str) -> list[int]:
        texts = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return sorted({self.processor.tokenizer.encode(t, add_special_tokens=False)[0] for t in texts})

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        """An answer, "yes" or "no", to each question."""
        answers = []
        for question in questions:
            content = [
                {"type": "image", "image": Image.fromarray(image)},
                {"type": "text", "text": REQUEST.format(question=question)},
            ]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.device)
            logits = self.network(**inputs).logits[0, -1].float()
            yes, no = (torch.logsumexp(logits[ids], 0) for ids in self.words)
            answers.append("yes" if yes > no else "no")
        return answers
