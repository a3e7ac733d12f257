"""Memory of single parts of a model that draws, for `sana.run.drawing_plan`: weights, and the text encoder at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.ops.allocations import Allocations
from sana.run.error import ConfigError
from sana.run.plan import text_numbers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INSTRUCTION = 256  # tokens before a prompt, generously: the published instruction has fewer


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(module)}.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def largest_at_once(module: nn.Module, offload: str) -> int:
    """Bytes of a part's weights on the device with ``offload="sequential"``: what lies in no list of layers, and the
    largest layer of those that do; else all of them."""
    if offload != "sequential":
        return weight_bytes(module)
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    leaves = {leaf for part in lists for leaf in part.modules() if not list(leaf.children())}
    stay = [t for part in module.modules() if part not in leaves for t in _own(part)]
    largest = max((sum(t.numel() * t.element_size() for t in _own(leaf)) for leaf in leaves), default=0)
    return sum(t.numel() * t.element_size() for t in stay) + largest


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that some work allocates at its worst moment."""
    with torch.no_grad(), Allocations() as allocations:
        work()
    return allocations.peak


@dataclass(frozen=True)
class Text:
    """The text encoder: bytes of all weights and of those that are there at once, bytes that it allocates, the number
    and width of a prompt's rows, and their type."""

    bytes: int
    largest: int
    activations: int
    rows: int
    channels: int
    dtype: torch.dtype


def text_of(config: DictConfig, model: DictConfig) -> Text:
    """The text encoder's memory from the numbers of its configuration."""
    node = model.text_encoder
    numbers = text_numbers(node)
    if numbers is None:
        raise ConfigError(f"dry_run: the text encoder's size is not known: {node.path} is not on this machine")
    dtype = DTYPES[node.get("dtype", "bfloat16") if config.dtype.text == "auto" else config.dtype.text]
    rows = int(node.get("max_tokens", 300))
    tokens = rows + (INSTRUCTION if node.get("instruction") is not None else 0)
    with torch.device("meta"):
        gemma = _gemma(numbers).to(dtype)
    activations = _text_activations(numbers, tokens, dtype)
    return Text(
        weight_bytes(gemma), largest_at_once(gemma, config.offload), activations, rows, gemma.config.hidden_size, dtype
    )


def _gemma(numbers: dict[str, Any], layers: int | None = None) -> Any:
    from sana.encoder.text.weights import without

    with without("torchao"):
        from transformers import Gemma2Config, Gemma2Model
    made = Gemma2Config(**{key: value for key, value in numbers.items() if key in Gemma2Config().to_dict()})
    made._attn_implementation = "eager"
    made.num_hidden_layers = made.num_hidden_layers if layers is None else layers
    if made.layer_types is not None:
        made.layer_types = made.layer_types[: made.num_hidden_layers]
    return Gemma2Model(made).eval().requires_grad_(False)


def _text_activations(numbers: dict[str, Any], tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one prompt of so many tokens allocates: layers come one after the other, so two tell."""
    with torch.device("meta"):
        gemma = _gemma(numbers, layers=2).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        gemma = gemma.to_empty(device="cpu")
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return peak_of(lambda: gemma(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
