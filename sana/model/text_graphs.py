"""CUDA graphs for the text encoder: the hundreds of kernels of a prompt's features are launched together.

Prompts are padded on the right to a multiple of `LENGTH` tokens, which their own tokens do not see, as attention is
causal; so a few graphs serve prompts of all lengths, and features depend on the prompt alone as without graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sana.model.graphs import LENGTH, LIMIT, Capture, Graphs
from sana.ops.choice import chosen


class TextGraphs:
    """``encoder.rows(captions)`` by graphs, one per padded length with and without the instruction.

    Args:
        encoder: `sana.encoder.text.gemma.GemmaEncoder`.
        capture, limit: see `Graphs`.
    """

    def __init__(self, encoder: Any, capture: Capture | None = None, limit: int = LIMIT) -> None:
        self.encoder, self.graphs = encoder, Graphs(encoder.model, capture, limit)

    @torch.no_grad()
    def rows(self, captions: Sequence[str], instruct: bool = True) -> list[Tensor]:
        """As `GemmaEncoder.rows`."""
        return self.encoder.rows(captions, instruct, hidden=self._hidden)

    def _hidden(self, ids: Tensor, prefix: Any) -> Tensor:
        """Features (1, n, c) of ids (1, n), all of which are tokens; after a prefix those that follow it."""
        n = ids.shape[1]
        length = -(-n // LENGTH) * LENGTH
        key = (length, None if prefix is None else id(prefix), chosen())
        if not self.graphs.possible(ids):
            return self.encoder.hidden(ids, prefix)
        self.graphs.check()
        found = self.graphs.find(key)
        if found is None:
            inputs = ids.new_full((1, length), int(self.encoder.tokenizer.pad_token_id))
            inputs[:, :n] = ids
            held = inputs, prefix  # kept as long as the graph, which reads both and is known by the prefix's identity
            found = self.graphs.record(key, held, ids.device, lambda: self.encoder.hidden(inputs, prefix))
            if found is None:
                return self.encoder.hidden(ids, prefix)
        else:
            found.inputs[0][:, :n] = ids
        found.replay()
        return found.output[:, :n].clone()
