"""The Gemma encoder against a plain float64 forward pass, and its rules for rows, masks, cache and errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.gemma_random import byte_tokenizer, gemma_random
from sana.encoder.text.instruction import SHA256, read_instruction
from sana.encoder.text.weights import GemmaUnavailableError, load_gemma
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN

CAPTIONS = ["a red circle", "", "a blue square left of a ring, far away", "ééé 3 🙂"]


def build(seed: int = 0, softcap: float = 50.0, scale: float = 0.3, **options) -> GemmaEncoder:
    """An encoder around a small random Gemma-2 with an odd number of rows and a sliding window that bites."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=9,
        attn_logit_softcapping=softcap,
        initializer_range=scale,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
    )
    model = Gemma2Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.2)
    return GemmaEncoder.from_parts(model, tokenizer, **({"max_tokens": 45} | options))


def naive_forward(encoder: GemmaEncoder, ids: list[int]) -> Tensor:
    """Gemma-2 (arXiv 2408.00118, section 2) for one sequence without padding, in float64 with explicit loops."""
    config = encoder.model.config
    weights = {k: v.double() for k, v in encoder.model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * (1 + weights[name + ".weight"])

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half).double() / half)
        angle = torch.arange(len(x)).double()[:, None] * frequency
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    n, heads, size = len(ids), config.num_attention_heads, config.head_dim
    x = weights["embed_tokens.weight"][ids] * math.sqrt(config.hidden_size)
    for i in range(config.num_hidden_layers):
        p = f"layers.{i}."
        h = norm(x, p + "input_layernorm")
        q, k, v = (h @ weights[f"{p}self_attn.{w}_proj.weight"].T for w in "qkv")
        out = torch.zeros(n, heads * size, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // config.num_key_value_heads)
            qh = rotate(q[:, head * size : (head + 1) * size])
            kh = rotate(k[:, group * size : (group + 1) * size])
            vh = v[:, group * size : (group + 1) * size]
            for row in range(n):
                first = max(0, row - config.sliding_window + 1) if i % 2 == 0 else 0
                score = kh[first : row + 1] @ qh[row] / math.sqrt(config.query_pre_attn_scalar)
                score = config.attn_logit_softcapping * torch.tanh(score / config.attn_logit_softcapping)
                out[row, head * size : (head + 1) * size] = score.softmax(0) @ vh[first : row + 1]
        x = x + norm(out @ weights[p + "self_attn.o_proj.weight"].T, p + "post_attention_layernorm")
        h = norm(x, p + "pre_feedforward_layernorm")
        gate = torch.nn.functional.gelu(h @ weights[p + "mlp.gate_proj.weight"].T, approximate="tanh")
        h = (gate * (h @ weights[p + "mlp.up_proj.weight"].T)) @ weights[p + "mlp.down_proj.weight"].T
        x = x + norm(h, p + "post_feedforward_layernorm")
    return norm(x, "norm")


@pytest.mark.parametrize(("seed", "softcap"), [(0, 50.0), (1, 2.0)])
def test_features_equal_a_naive_forward_with_soft_capping(seed, softcap):
    encoder = build(seed, softcap)
    condition = encoder.encode(CAPTIONS)
    assert condition.text.shape == (4, 45, 48)
    for row, caption in enumerate(CAPTIONS):
        ids = [2, *(encoder.tokenizer(caption, add_special_tokens=False).input_ids)]
        expected = naive_forward(encoder, ids)
        torch.testing.assert_close(condition.text[row, : len(ids)].double(), expected, rtol=1e-4, atol=1e-4)
        assert condition.mask is not None
        assert condition.mask[row].tolist() == [True] * len(ids) + [False] * (45 - len(ids))


def test_soft_capping_is_not_left_out():
    capped, free = build(3, softcap=1.0), build(3, softcap=1e6)
    assert (capped.encode(CAPTIONS).text - free.encode(CAPTIONS).text).abs().max() > 0.1


def test_instruction_is_seen_and_cut():
    encoder, instruction = build(max_tokens=12, instruction="please draw: "), "please draw: "
    condition = encoder.encode(["red", "a prompt that is longer than its rows"])
    for row, caption in enumerate(["red", "a prompt that is longer than its rows"]):
        full = naive_forward(encoder, encoder.tokenizer(instruction + caption).input_ids)
        # A byte tokenizer never merges the trailing space into the word, so that space is the second row.
        expected = torch.cat([full[:1], full[len(instruction) :]])[:12]
        torch.testing.assert_close(condition.text[row, : len(expected)].double(), expected, rtol=1e-4, atol=1e-4)
    assert condition.mask is not None
    assert condition.mask.sum(1).tolist() == [5, 12]
    plain = build(max_tokens=12).encode(["red"])
    torch.testing.assert_close(encoder.encode(["red"], instruct=False).text, plain.text)
    assert (condition.text[0, 2] - plain.text[0, 1]).abs().max() > 1e-3


def test_null_is_the_empty_prompt_without_instruction():
    encoder = build(instruction="please draw: ")
    null = encoder.null(3)
    expected = encoder.encode([""], instruct=False)
    assert null.text.shape == (3, 45, 48)
    torch.testing.assert_close(null.text[2:], expected.text, rtol=0, atol=0)
    assert null.mask is not None
    assert null.mask.sum().item() == 3
    assert null.mask[:, 0].all()
    assert null.text.std() > 0.1
    short = encoder.null(2, length=7)
    torch.testing.assert_close(short.text, null.text[:2, :7], rtol=0, atol=0)
    with pytest.raises(ValueError, match="length 46, expected 1 to 45"):
        encoder.null(1, length=46)


@pytest.mark.parametrize("instruction", [None, "please draw: "])
def test_trim_changes_nothing_for_a_network_that_uses_the_mask(instruction):
    full, trimmed = build(instruction=instruction), build(instruction=instruction, trim=True)
    a, b = full.encode(CAPTIONS), trimmed.encode(CAPTIONS)
    assert b.mask is not None
    assert a.mask is not None
    assert b.text.shape[1] == int(a.mask.sum(1).max()) < 45
    assert (b.text[~b.mask] == 0).all()
    query, value = torch.randn(4, 6, 48), torch.randn(48, 5)

    def attend(c):
        return torch.nn.functional.scaled_dot_product_attention(
            query, c.text, c.text @ value, attn_mask=c.mask[:, None]
        )

    torch.testing.assert_close(attend(a), attend(b), rtol=1e-5, atol=1e-5)


def test_trim_gives_the_same_velocity():
    torch.manual_seed(7)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=8),
        cross=partial(CrossAttention, heads=2),
        ffn=partial(MixFFN, ratio=2.0),
    )
    network = Sana(in_channels=3, width=16, depth=2, text_channels=48, blocks=[block])
    with torch.no_grad():
        for parameter in network.parameters():  # the initial zeros would hide the text
            parameter.normal_(0, 0.3)
    x, t = torch.randn(4, 3, 1, 3, 5), torch.rand(4, 1)
    full, trimmed, cached = (build(**o).encode(CAPTIONS) for o in ({}, {"trim": True}, {"trim": True, "cache": 9}))
    expected = network(x, t, full)
    torch.testing.assert_close(network(x, t, trimmed), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(x, t, cached), expected, rtol=1e-4, atol=1e-4)
    assert (network(x, t, build(1).encode(CAPTIONS)) - expected).abs().max() > 0.01


def test_cache_is_exact_and_bounded():
    encoder = build(trim=True, cache=5)
    words = [f"{n} of {c}" for n in range(5) for c in ("red", "dark blue circles", "x")]
    first = {w: c for w in words for c in [encoder.encode([w, "something much longer than that"]).text[0]]}
    assert len(encoder._cache) == 5
    together = encoder.encode(words[::-1] + words[:4])
    assert len(encoder._cache) == 5
    assert together.mask is not None
    for row, word in enumerate(words[::-1] + words[:4]):
        count = int(together.mask[row].sum())
        assert torch.equal(together.text[row, :count], first[word][:count])
    plain = build(trim=True).encode(words)
    torch.testing.assert_close(together.text[: len(words)].flip(0), plain.text, rtol=1e-5, atol=1e-5)
    assert torch.equal(together.mask[: len(words)].flip(0), plain.mask)
    encoder.to(torch.float64)
    assert encoder.encode(["x"]).text.dtype == torch.float64


def test_frozen_and_independent_of_autocast():
    encoder = build()
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    outside = encoder.encode(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder.encode(CAPTIONS)
    assert not outside.text.requires_grad
    assert torch.equal(outside.text, inside.text)


def test_lowercase_and_strip():
    plain, tidy = build(), build(lowercase=True, strip=True)
    torch.testing.assert_close(tidy.encode(["  A Red\n"]).text, plain.encode(["a red"]).text, rtol=0, atol=0)
    assert plain.encode(["  A Red\n"]).mask.sum() == 9  # type: ignore[union-attr]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="list of captions"):
        build().encode("a red circle")
    with pytest.raises(ValueError, match="non-empty"):
        build().encode([])
    with pytest.raises(ValueError, match="max_tokens is 1"):
        build(max_tokens=1)
    with pytest.raises(ValueError, match="trim=true"):
        build(cache=3)
    with pytest.raises(ValueError, match="overflows in float16"):
        GemmaEncoder("anywhere", dtype="float16")
    parts = build()
    parts.tokenizer._tokenizer.post_processor = None
    with pytest.raises(ValueError, match="BOS alone"):
        GemmaEncoder.from_parts(parts.model, parts.tokenizer)
    parts = build()
    parts.model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="soft-capping"):
        GemmaEncoder.from_parts(parts.model, parts.tokenizer)


def test_saved_weights_load_again(tmp_path):
    encoder = build()
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = GemmaEncoder(str(tmp_path), max_tokens=45, dtype="float32")  # the folders of a diffusers pipeline
    torch.testing.assert_close(again.encode(CAPTIONS).text, encoder.encode(CAPTIONS).text, rtol=0, atol=0)
    folder = tmp_path / "text_encoder"
    (folder / "model.safetensors").rename(folder / "model.bf16.safetensors")
    half = GemmaEncoder(str(tmp_path), max_tokens=45)
    assert half.encode(["x"]).text.dtype == torch.bfloat16
    assert half.channels == 48


def test_other_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="'t5', expected 'gemma2'"):
        load_gemma(str(tmp_path), torch.float32)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/gemma", "models/gemma/2b"])
def test_missing_folder_lists_the_steps(path):
    with pytest.raises(GemmaUnavailableError, match="hf auth login") as caught:
        GemmaEncoder(path)
    assert str(caught.value).startswith("Gemma-2 is not available: no config.json in the folder")
    assert "encoder/text=gemma_tiny" in str(caught.value)


def test_missing_network_lists_the_steps(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(GemmaUnavailableError, match="'google/gemma-2-2b-it' could not be loaded") as caught:
        GemmaEncoder("google/gemma-2-2b-it")
    assert "hf download google/gemma-2-2b-it" in str(caught.value)


def test_random_encoder_has_any_width_and_is_seeded():
    state = torch.random.get_rng_state()
    a, b, c = (gemma_random(192, layers=1, seed=s, dtype="float32").encode(CAPTIONS).text for s in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a.shape == (4, 300, 192)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(ValueError, match="multiple of 64"):
        gemma_random(100)


def test_instruction_from_files(tmp_path):
    assert read_instruction(None) is None
    (tmp_path / "a.yaml").write_text("- first line\n- 'Say: '\n")
    assert read_instruction(str(tmp_path / "a.yaml")) == "first line\nSay: "
    (tmp_path / "b.yaml").write_text("text_encoder:\n  chi_prompt:\n    - first\n    - 'Say: '\n")
    assert read_instruction(str(tmp_path / "b.yaml")) == "first\nSay: "
    (tmp_path / "c.txt").write_text("first\nSay: \n")
    assert read_instruction(str(tmp_path / "c.txt")) == "first\nSay: "
    (tmp_path / "d.yaml").write_text("other: 3\n")
    with pytest.raises(ValueError, match="expected a list of lines"):
        read_instruction(str(tmp_path / "d.yaml"))
    with pytest.raises(ValueError, match="no such file"):
        read_instruction("difusers")


def test_instruction_of_diffusers_is_recognised(monkeypatch):
    text = read_instruction("diffusers")
    assert text is not None
    assert len(text) == 1057
    assert text.endswith(": ")
    monkeypatch.setitem(SHA256, "diffusers", "0" * 64)
    with pytest.raises(ValueError, match="has another text"):
        read_instruction("diffusers")


INSTRUCTION = "please draw: "


def forwards(encoder: GemmaEncoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the token batches that the model is given from now on."""
    shapes: list[tuple[int, ...]] = []
    forward = encoder.model.forward
    monkeypatch.setattr(
        encoder.model, "forward", lambda **k: shapes.append(tuple(k["input_ids"].shape)) or forward(**k)
    )
    return shapes


@pytest.mark.parametrize("seed", [0, 1])
def test_the_instruction_is_read_once(seed, monkeypatch):
    """The prefix's keys and values, kept, give what the whole sequence gives: also where the sliding window of 9 tokens
    reaches into the 13 of the instruction or leaves them behind."""
    encoder = build(seed, instruction=INSTRUCTION)
    shapes = forwards(encoder, monkeypatch)
    first, again = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS[:2])
    start = len(INSTRUCTION)
    assert shapes == [(1, start), (4, 44), (2, 44)]
    assert first.mask is not None
    for row, caption in enumerate(CAPTIONS):
        full = naive_forward(encoder, encoder.tokenizer(INSTRUCTION + caption).input_ids)
        expected = torch.cat([full[:1], full[start:]])[:45]
        torch.testing.assert_close(first.text[row, : len(expected)].double(), expected, rtol=1e-4, atol=1e-4)
        whole = encoder._hidden(*encoder._tokenise([INSTRUCTION + caption], INSTRUCTION, longest=True))[0]
        kept = first.text[row][first.mask[row]]
        torch.testing.assert_close(kept, whole[[0, *range(start, len(whole))]], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(again.text[again.mask], first.text[:2][first.mask[:2]], rtol=1e-5, atol=1e-5)
    shapes.clear()
    encoder.to(torch.float64)
    encoder.encode(CAPTIONS[:1])
    assert shapes == [(1, start), (1, 44)], "what was kept was of another type"


def test_a_prompt_that_merges_with_the_instruction_is_computed_whole(monkeypatch):
    encoder = build(2, instruction=INSTRUCTION)
    tokenise = encoder._tokenise

    def merging(texts, prefix, longest):
        ids, mask = tokenise(texts, prefix, longest)
        ids[1, len(prefix) - 3] = 99  # as if the second prompt changed a token before the last of the instruction
        return ids, mask

    monkeypatch.setattr(encoder, "_tokenise", merging)
    got = encoder.encode(CAPTIONS[:3])
    ids, mask = merging([INSTRUCTION + c for c in CAPTIONS[:3]], INSTRUCTION, False)
    want = encoder._hidden(ids, mask)[:, [0, *range(len(INSTRUCTION), ids.shape[1])]]
    torch.testing.assert_close(got.text[got.mask], want[got.mask], rtol=2e-5, atol=2e-5)
    assert (encoder.encode(CAPTIONS[1:2] * 2).text[0, 1] - got.text[1, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("cache", [0, 9])
@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_rows_depend_on_the_caption_alone(instruction, cache):
    def rows(captions):
        return build(3, instruction=instruction, trim=True, cache=cache).rows(captions)

    together = rows([*CAPTIONS, CAPTIONS[0]])
    for caption, row in zip([*CAPTIONS, CAPTIONS[0]], together, strict=True):
        assert torch.equal(row, rows([caption])[0]), "to the last bit"
    full = build(3, instruction=instruction).encode(CAPTIONS)
    for row, text, mask in zip(together, full.text, full.mask, strict=False):
        torch.testing.assert_close(row, text[mask], rtol=2e-5, atol=2e-5)


def test_padded_rows_have_the_features_of_the_padding():
    plain, trimmed = build(4), build(4, trim=True, cache=5)
    for caption in ("a red circle", ""):
        want, got = plain.encode([caption], instruct=False), trimmed.padded(caption)
        torch.testing.assert_close(got.text, want.text, rtol=0, atol=0)
        assert torch.equal(got.mask, want.mask)
    assert torch.equal(trimmed.null(1).text, trimmed.padded("").text)
