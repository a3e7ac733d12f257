"""The yes-no verifier of SANA-1.5 (arXiv:2501.18427, section 4): does the image show the prompt?

The published one, NVILA-Lite-2B-Verifier, brings code of its own, which transformers runs where it is told to; any
vision-language model that transformers knows works without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from sana.nn.vision_language import VisionLanguage, first_tokens
from sana.pretrained import CODE_FILES, FOLDER_FILES, MissingWeightsError, Published, locate, place
from sana.reward.judge import Images, Lines, SingleJudge

WEIGHTS = Published(
    "SANA-1.5's verifier, or another vision-language model with a chat template",
    "the folder of NVILA-Lite-2B-Verifier",
    "hf://Efficient-Large-Model/NVILA-Lite-2B-Verifier",
)
REQUEST = "Does this image show everything that its prompt asks for? Prompt: {prompt}. Answer with yes or no."
GAP = 2.0**14
"""Between the scores of "yes" and of "no"; beyond any logit, and a power of two, so that adding it to a float32 logit
is exact in float64 down to 2^-15."""


def yes_no_score(yes_logit: ArrayLike, no_logit: ArrayLike, said_yes: ArrayLike) -> NDArray[np.float64]:
    """One number per image whose order is the published comparison of pairs.

    That comparison: an image called "yes" beats one called "no"; of two "yes" the larger logit of "yes" wins; of two
    "no" the smaller logit of "no"; of equal ones the second. So "yes" scores its logit above a gap, and "no" minus its
    logit below one.

    Args:
        yes_logit, no_logit: (n,), of the first token of the answer.
        said_yes: (n,), whether the answer was "yes".

    Returns:
        (n,) float64; float32 would round differences of logits away.

    Raises:
        ValueError: a logit that is not finite, or of 2^14 or more.
    """
    yes, no = np.asarray(yes_logit, np.float64), np.asarray(no_logit, np.float64)
    used = np.where(said_yes, yes, no)
    if not (np.abs(used) < GAP).all():
        raise ValueError(f"verifier: a logit is {used[~(np.abs(used) < GAP)].flat[0]}, expected less than {GAP:.0f}")
    return np.where(said_yes, GAP + yes, -GAP - no)


class Verifier(SingleJudge):
    """Asks a vision-language model for yes or no.

    Where a word has several first tokens ("yes", "Yes"), its logit is the largest; that is the published number
    whenever the answer is the word itself.

    Args:
        name: see `Judge`.
        weights: folder of the model with its processor, or ``hf://organisation/repository``.
        device: "auto", or a torch device.
        request: what is asked, with ``{prompt}`` in it. A trained verifier knows the words that it was trained with:
            give those of its authors.
        trust_remote_code: run the Python files that come with the weights, which can do anything.

    Raises:
        MissingWeightsError: the weights are not here.
        ValueError: a single file or a seed; a request without the prompt; weights with code that is not trusted.
    """

    def __init__(
        self,
        name: str = "verifier",
        weights: str | None = None,
        device: str = "auto",
        request: str = REQUEST,
        trust_remote_code: bool = False,
    ) -> None:
        if "{prompt}" not in request:
            raise ValueError(f"judge.request: {request[:60]!r} has no {{prompt}} in it")
        files = [*FOLDER_FILES, *(CODE_FILES if trust_remote_code else [])]
        located = locate(weights, WEIGHTS, "judge.weights", files)
        if located.path is None or not located.path.is_dir():
            raise ValueError(f"judge.weights={weights}: needs a folder, which says the architecture and the words")
        config = located.path / "config.json"
        if not config.is_file():
            raise MissingWeightsError(f"judge.weights={weights}: there is no config.json in this folder")
        own = "auto_map" in json.loads(config.read_text(encoding="utf-8"))
        if own and not trust_remote_code:
            raise ValueError(
                f"judge.weights={weights}: this model is code of its own, which can do anything; "
                "judge.trust_remote_code=true runs it"
            )
        self.request = request
        self._ask = _OwnCode(located.path, place(device)) if own else _Native(located.path, place(device))
        super().__init__(name, {"verifier": located.said, "request": request})

    def score(self, images: Images, lines: Lines) -> NDArray[np.float64]:
        """(n,) of `yes_no_score`."""
        answers = [
            self._ask(np.asarray(image), self.request.replace("{prompt}", line["prompt"]))
            for image, line in zip(images, lines, strict=True)
        ]
        yes, no, said = zip(*answers, strict=True)
        return yes_no_score(yes, no, said)


class _Native:
    """Of an architecture that transformers knows; the answer is the likeliest first token."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = VisionLanguage(folder, device)
        self.words = [self.model.first_tokens(word) for word in ("yes", "no")]

    def __call__(self, image: NDArray[np.uint8], text: str) -> tuple[float, float, bool]:
        logits = self.model.logits(image, text)
        yes, no = (float(logits[ids].max()) for ids in self.words)
        return yes, no, int(logits.argmax()) in self.words[0]


class _OwnCode:
    """With code of its own, as VILA's: ``generate_content([image, text]) -> (answer, logits of each token)``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.words = [first_tokens(self.model.tokenizer, word) for word in ("yes", "no")]

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], text: str) -> tuple[float, float, bool]:
        answer, steps = self.model.generate_content([Image.fromarray(image), text])
        logits: Tensor = steps[0][0].float()
        yes, no = (float(logits[ids].max()) for ids in self.words)
        return yes, no, str(answer).strip(" .\n").lower() == "yes"
