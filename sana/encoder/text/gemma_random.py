"""A Gemma-2 with random weights and a tokenizer of bytes, made on the spot: text features of any width, offline."""

from __future__ import annotations

from typing import Any

import torch

from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.weights import DTYPES, without


def gemma_random(
    channels: int = 2304,
    layers: int = 2,
    max_tokens: int = 300,
    seed: int = 0,
    dtype: str = "bfloat16",
    trim: bool = False,
) -> GemmaEncoder:
    """An encoder with Gemma-2's architecture and random weights, the same for the same seed.

    It exercises a recipe where Gemma cannot be had (no network, no licence): shapes, masks, memory and time are those
    of a text encoder of this width, and different prompts have different features, but no meaning.

    Args:
        channels: width of the features, a multiple of 64; 2304 fits the published networks.
        layers: of the decoder.
        max_tokens: rows per prompt with BOS; a token is a byte.
        seed: of the weights. The global random state is left as it was.
        dtype: "bfloat16" or "float32".
        trim: see `GemmaEncoder`.

    Raises:
        ValueError: channels no multiple of 64, or another dtype.
    """
    with without("torchao"):
        from transformers import Gemma2Config, Gemma2Model

    if channels < 64 or channels % 64:
        raise ValueError(f"random text encoder: channels is {channels}, expected a positive multiple of 64")
    if dtype not in DTYPES:
        raise ValueError(f"random text encoder: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    tokenizer = byte_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        intermediate_size=2 * channels,
        num_hidden_layers=layers,
        num_attention_heads=channels // 64,
        num_key_value_heads=channels // 64,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Gemma2Model(config)
    return GemmaEncoder.from_parts(model.to(DTYPES[dtype]), tokenizer, max_tokens, trim=trim)


def byte_tokenizer() -> Any:
    """A transformers tokenizer without a file: one token per byte of UTF-8, BOS before, padding on the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*special, *letters))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
