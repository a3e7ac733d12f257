"""Text conditioning against diffusers' SanaPipeline: the same rows and masks from the same Gemma-2 and tokenizer."""

from __future__ import annotations

import pytest
import torch

from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.instruction import read_instruction

SanaPipeline = pytest.importorskip("diffusers").SanaPipeline

INSTRUCTION = read_instruction("diffusers")
PUBLISHED = read_instruction("published_yaml")
PROMPTS = [
    "a cat",
    "",
    " ".join(f"word{i % 7} and" for i in range(340)),
    "3 cats, 🙂 and 12 dogs — naïve!",
    "🙂",
    "  two  spaces, CAPITALS\n",
]


@pytest.fixture
def parts(gemma):
    return gemma


def encode_by_diffusers(parts, prompts, instruction, negative=""):
    model, tokenizer = parts
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
    with torch.no_grad():
        return pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
            device=torch.device("cpu"),
            complex_human_instruction=None if instruction is None else instruction.split("\n"),
        )


@pytest.mark.parametrize("instruction", [None, INSTRUCTION, PUBLISHED], ids=["plain", "diffusers", "published"])
def test_rows_and_masks_equal_diffusers(parts, instruction):
    text, mask, negative, negative_mask = encode_by_diffusers(parts, PROMPTS, instruction, "blurry, 2 legs")
    encoder = GemmaEncoder.from_parts(*parts, instruction=instruction, lowercase=True, strip=True)
    ours = encoder.encode(PROMPTS)
    assert ours.text.shape == (len(PROMPTS), 300, 32)
    torch.testing.assert_close(ours.text, text, rtol=0, atol=1e-6)
    assert torch.equal(ours.mask, mask.bool())
    assert mask[2].all()
    assert 0 < mask[3].sum() < 300
    bad = encoder.encode(["blurry, 2 legs"] * 2, instruct=False)
    torch.testing.assert_close(bad.text, negative[:2], rtol=0, atol=1e-6)
    assert torch.equal(bad.mask, negative_mask[:2].bool())


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["plain", "instruction"])
def test_null_equals_the_empty_negative_prompt_of_diffusers(parts, instruction):
    _, _, negative, mask = encode_by_diffusers(parts, ["a cat", "x"], instruction)
    null = GemmaEncoder.from_parts(*parts, instruction=instruction).null(2)
    torch.testing.assert_close(null.text, negative, rtol=0, atol=1e-6)
    assert torch.equal(null.mask, mask.bool())


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["plain", "instruction"])
def test_trimmed_and_cached_rows_equal_diffusers(parts, instruction):
    short = [p for p in PROMPTS if len(p) < 100]
    text, mask, _, _ = encode_by_diffusers(parts, short, instruction)
    for cache in (0, 3):
        options = {"lowercase": True, "strip": True, "trim": True, "cache": cache}
        ours = GemmaEncoder.from_parts(*parts, instruction=instruction, **options).encode(short)
        assert ours.mask is not None
        l = ours.mask.shape[1]
        assert l == mask.sum(1).max()
        assert torch.equal(ours.mask, mask[:, :l].bool())
        torch.testing.assert_close(ours.text[ours.mask], text[:, :l][ours.mask], rtol=1e-5, atol=1e-5)


def test_second_row_is_the_first_word(parts):
    """The published "minus 2": the instruction's trailing space becomes part of the first word, which is row 1."""
    model, tokenizer = parts
    assert INSTRUCTION is not None
    alone, full = tokenizer(INSTRUCTION).input_ids, tokenizer(INSTRUCTION + "cat").input_ids
    assert len(full) == len(alone)
    assert full[:-1] == alone[:-1]
    ours = GemmaEncoder.from_parts(model, tokenizer, instruction=INSTRUCTION).encode(["cat"])
    assert ours.mask is not None
    assert ours.mask.sum() == 2
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([full])).last_hidden_state
    torch.testing.assert_close(ours.text[0, :2], hidden[0, [0, -1]], rtol=1e-4, atol=1e-5)
