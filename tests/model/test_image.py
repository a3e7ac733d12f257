"""The image recipe: its loss against a loop by hand, caption dropout, and drawing, on small real parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import euler_grid
from sana.flow.timestep import LogitNormal
from sana.model.base import share_of_good, weighted_mean
from sana.model.generate import Painter
from sana.model.image import ImageModule
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.objective.flow_matching import flow_matching
from sana.ops.random import normal, spread, uniform
from sana.sampler.euler import euler
from sana.sampler.guided import Sampler
from sana.types import Batch


def make(seed: int = 0, **changes: object) -> ImageModule:
    torch.manual_seed(seed)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=8, qk_norm=True),
        cross=partial(CrossAttention, heads=2, qk_norm=True),
        ffn=MixFFN,
    )
    autoencoder = DCAE(
        channels=4,
        scale=1.0,
        encoder_widths=(8, 8, 16),
        encoder_depths=(1, 1, 1),
        encoder_attention=(False, False, False),
        decoder_widths=(8, 8, 16),
        decoder_depths=(1, 1, 1),
        decoder_attention=(False, False, False),
    )
    settings: dict[str, object] = dict(
        network=Sana(4, 16, 2, 64, [block], text_norm=1.0),
        autoencoder=autoencoder,
        text_encoder=gemma_random(64, 1, max_tokens=24, dtype="float32", trim=True),
        objective=flow_matching,
        timestep=LogitNormal(0.0, 1.0, 3.0),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        schedule=lambda update: 1.0,
        seed=seed,
    )
    return ImageModule(**{**settings, **changes})  # type: ignore[arg-type]


def batch(start: int = 0, count: int = 6) -> Batch:
    torch.manual_seed(start)
    captions = ["a red circle", "two stars", "", "a ring above a cross", "a square", "one"][:count]
    index = torch.arange(start, start + count)
    return Batch(torch.rand(count, 3, 16, 16) * 2 - 1, None, captions, index, [str(int(i)) for i in index])


@pytest.mark.parametrize("seed", [0, 5])
def test_loss_is_the_closed_form(seed: int) -> None:
    recipe, data = make(seed, caption_dropout=0.0), batch(40)
    x0 = recipe.latents(data)
    assert x0.shape == (6, 4, 1, 4, 4)
    condition = recipe.condition(data)
    losses = recipe.flow_loss(recipe.network, x0, condition, data.index)
    u = spread(seed, data.index, "timestep").double()
    n = torch.special.ndtri(u)
    t = torch.sigmoid(n)
    t = (3 * t / (1 + 2 * t)).float()
    eps = normal(seed, data.index, "noise", (4, 1, 4, 4))
    for k in range(6):
        xt = (1 - t[k]) * x0[k] + t[k] * eps[k]
        one = type(condition)(condition.text[k : k + 1], None if condition.mask is None else condition.mask[k : k + 1])
        v = recipe.network(xt[None], t[k].view(1, 1), one)
        assert losses[k, 0].item() == pytest.approx((v[0] - (eps[k] - x0[k])).square().mean().item(), rel=1e-4)


def test_randomness_belongs_to_the_sample_not_to_the_batch() -> None:
    recipe, data = make(), batch(7)
    x0, condition = recipe.latents(data), recipe.condition(data)
    whole = recipe.flow_loss(recipe.network, x0, condition, data.index)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = Batch(data.image[order], None, [data.caption[i] for i in order], data.index[order], data.key)  # type: ignore[index]
    again = recipe.flow_loss(recipe.network, recipe.latents(shuffled), recipe.condition(shuffled), shuffled.index)
    assert torch.allclose(whole[order], again, rtol=1e-4)


def test_dropped_captions_become_the_null_embedding() -> None:
    recipe = make(caption_dropout=0.5)
    data = Batch(None, torch.zeros(400, 4, 4, 4), ["a red circle"] * 400, torch.arange(400), ["k"] * 400)
    condition, kept = recipe.condition(data), recipe.encode_text(["a red circle"])
    null = recipe.frozen.text_encoder.null(1)
    drop = uniform(0, data.index, "caption dropout") < 0.5
    assert 150 < int(drop.sum()) < 250
    length = condition.text.shape[1]
    for k in range(8):
        row, mask = condition.text[k], condition.mask[k]  # type: ignore[index]
        if drop[k]:
            assert torch.equal(row, null.text[0, :length])
            assert torch.equal(mask, null.mask[0, :length])
        else:
            assert torch.equal(row, kept.text[0])
            assert torch.equal(mask, kept.mask[0])
    legacy = make(caption_dropout=0.5, null_mask="caption").condition(data)
    assert torch.equal(legacy.mask, kept.mask.expand(400, -1))


def test_none_of_the_frozen_parts_is_trained_or_saved() -> None:
    recipe = make()
    assert all(name.startswith("network.") for name in recipe.state_dict())
    assert {id(p) for p in recipe.parameters()} == {id(p) for p in recipe.network.parameters()}


def test_cached_latents_equal_encoding_in_the_step() -> None:
    recipe, data = make(), batch()
    encoding = recipe.encodings()["latents"]
    cached = Batch(None, encoding.encode(data.image), data.caption, data.index, data.key)
    assert torch.equal(recipe.latents(cached), recipe.latents(data))
    assert encoding.weights == recipe.encodings()["latents"].weights
    assert encoding.weights != make(1).encodings()["latents"].weights


def test_cached_features_equal_encoding_in_the_step() -> None:
    recipe, data = make(caption_dropout=0.3), batch(4)
    encoding = recipe.encodings()["text"]
    rows = encoding.encode(data.caption)
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(text.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    cached = Batch(data.image, None, data.caption, data.index, data.key, text=text, text_mask=mask)
    ours, theirs = recipe.condition(cached), recipe.condition(data)
    assert ours.mask is not None
    assert theirs.mask is not None
    length = text.shape[1]
    assert torch.equal(ours.mask, theirs.mask[:, :length])
    assert not theirs.mask[:, length:].any()
    torch.testing.assert_close(ours.text[ours.mask], theirs.text[theirs.mask], rtol=1e-5, atol=1e-5)
    assert '"max_tokens"' in encoding.template


def test_validation_losses_are_repeatable_and_per_time() -> None:
    recipe, data = make(), batch(3)
    first = recipe.validation_losses(recipe.network, data, 5)
    assert first.shape == (5,)
    assert torch.equal(first, recipe.validation_losses(recipe.network, data, 5))
    x0, condition = recipe.latents(data), recipe.encode_text(data.caption)
    t = torch.full((6,), 0.3)
    assert first[1].item() == pytest.approx(
        recipe.flow_loss(recipe.network, x0, condition, data.index, t).mean().item(), rel=1e-6
    )


def painter(recipe: ImageModule) -> Painter:
    recipe.network.eval()
    return Painter(recipe.network, recipe.frozen.autoencoder, recipe.frozen.text_encoder, recipe.null_like)


def test_same_seed_same_pixels_and_batches_do_not_matter() -> None:
    draw = painter(make()).draw
    sampler = Sampler(euler, partial(euler_grid, shift=3.0), steps=3, guidance=2.0)
    prompts, seeds = ["a red circle", "two stars", "a ring"], [5, 6, 7]
    first = draw(prompts, seeds, sampler, 16, 24)
    assert first.shape == (3, 16, 24, 3)
    assert first.dtype.name == "uint8"
    assert (first == draw(prompts, seeds, sampler, 16, 24)).all()
    apart = draw(prompts, seeds, sampler, 16, 24, batch=1).astype(int)
    assert abs(apart - first).max() <= 1
    assert (draw(prompts, [8, 6, 7], sampler, 16, 24)[0] != first[0]).any()


def test_guidance_is_the_formula() -> None:
    recipe = make()
    draw = painter(recipe)

    def once(velocity, x, grid):  # type: ignore[no-untyped-def]
        return velocity(x, x.new_full((len(x),), 0.7))

    sampler = Sampler(once, lambda n: torch.tensor([0.7, 0.0]), 1, 3.0)
    captured = {}

    def decode(latent: torch.Tensor) -> torch.Tensor:
        captured["v"] = latent
        return torch.zeros(len(latent), 3, 16, 16)

    recipe.frozen.autoencoder.decode = decode  # type: ignore[method-assign]
    draw.draw(["two stars"], [3], sampler, 16, 16)
    noise = normal(0, torch.tensor([3]), "sampling noise", (4, 1, 4, 4))
    t = torch.full((1, 1), 0.7)
    with torch.no_grad():
        c = recipe.network(noise, t, recipe.encode_text(["two stars"]))
        u = recipe.network(noise, t, recipe.frozen.text_encoder.null(1))
    assert torch.allclose(captured["v"], (u + 3.0 * (c - u)).squeeze(2), rtol=1e-4, atol=1e-5)


def test_bad_requests_say_what_is_wrong() -> None:
    draw = painter(make()).draw
    sampler = Sampler(euler, partial(euler_grid, shift=3.0), steps=1)
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        draw(["a", "b"], [1], sampler, 16, 16)
    with pytest.raises(ValueError, match="18x16 pixels are not multiples of the autoencoder's 4"):
        draw(["a"], [1], sampler, 18, 16)
    with pytest.raises(ValueError, match="caption_dropout"):
        make(caption_dropout=1.5)
    with pytest.raises(ValueError, match="null_mask"):
        make(null_mask="none")
    with pytest.raises(ValueError, match="at least 1"):
        Sampler(euler, euler_grid, steps=0)


def test_a_sample_of_weight_zero_gives_no_gradient() -> None:
    """The gradient is that of the others alone, at their share of the batch."""
    recipe, data = make(2, caption_dropout=0.0), batch(40)
    x0, condition = recipe.latents(data), recipe.condition(data)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1])
    gradients = []
    for picked in (None, weight > 0):
        recipe.network.zero_grad()
        losses = recipe.flow_loss(recipe.network, x0, condition, data.index)
        (weighted_mean(losses, weight) if picked is None else losses[picked].mean() * 4 / 6).backward()
        gradients.append([p.grad.clone() for p in recipe.network.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))
    assert torch.equal(weighted_mean(losses, torch.ones(6)), losses.mean())
    assert torch.equal(weighted_mean(losses, None), losses.mean())
    data.weight = weight
    assert float(share_of_good(data)) == pytest.approx(4 / 6)
    data.weight = torch.zeros(6)
    assert float(share_of_good(data)) == 1


@pytest.mark.parametrize("place", ["cpu", "offload"])
def test_encoders_elsewhere_change_nothing(place: str) -> None:
    plain, other = make(), make(frozen=place)
    for module in (plain, other):
        module.frozen.to("cpu")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    batch = Batch(image=images, latent=None, caption=["a", "b c", ""], index=torch.arange(3), key=["x", "y", "z"])
    assert torch.equal(plain.latents(batch), other.latents(batch))
    one, two = plain.condition(batch), other.condition(batch)
    assert torch.equal(one.text, two.text)
    assert torch.equal(plain.encodings()["latents"].encode(images), other.encodings()["latents"].encode(images))
