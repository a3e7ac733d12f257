"""DC-AE against diffusers' AutoencoderDC with the same random weights: latents, images, gradients, names."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderDC

from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers, dc_ae_to_diffusers
from sana.encoder.autoencoder.dc_ae import DCAE

SANA_OURS: dict = {}
SANA_THEIRS = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 0.41407,
}
LITE_OURS = {
    "decoder_depths": (0, 3, 5, 4, 4, 4),
    "decoder_attention": (False,) * 6,
    "decoder_shuffle": True,
    "silu_output": True,
}
LITE_THEIRS = SANA_THEIRS | {
    "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
    "decoder_qkv_multiscales": ((),) * 6,
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}

# The same three structures at a few channels. Two stages of attention, of which the coarser sees h w <= 32 places for
# the smaller images: there diffusers takes its quadratic branch.
SMALL = {
    "sana": (
        {"encoder_depths": (1, 2, 1), "decoder_depths": (2, 1, 1)},
        {"encoder_layers_per_block": (1, 2, 1), "decoder_layers_per_block": (2, 1, 1)},
        (False, True, True),
        (False, True, True),
        (5,),
    ),
    "lite": (
        {"encoder_depths": (1, 1, 1), "decoder_depths": (0, 2, 1), "decoder_shuffle": True, "silu_output": True},
        {
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (0, 2, 1),
            "upsample_block_type": "pixel_shuffle",
            "decoder_conv_act_fn": "silu",
        },
        (False, False, True),
        (False, False, False),
        (5,),
    ),
    "in": (
        {
            "encoder_depths": (0, 1, 2),
            "decoder_depths": (0, 1, 2),
            "encoder_shuffle": True,
            "decoder_shuffle": True,
        },
        {
            "encoder_layers_per_block": (0, 1, 2),
            "decoder_layers_per_block": (0, 1, 2),
            "downsample_block_type": "pixel_unshuffle",
            "upsample_block_type": "pixel_shuffle",
        },
        (False, False, True),
        (False, False, True),
        (),
    ),
    "two scales, no shortcut": (
        {
            "encoder_depths": (1, 1, 1),
            "decoder_depths": (1, 1, 1),
            "latent_shortcut": False,
            "decoder_shuffle": True,
        },
        {
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
            "upsample_block_type": "pixel_shuffle",
        },
        (False, True, True),
        (False, False, True),
        (3, 5),
    ),
}


def small(name: str, seed: int) -> tuple[DCAE, AutoencoderDC]:
    ours, theirs, encoder_attention, decoder_attention, kernels = SMALL[name]
    widths = (8, 32, 64)

    def types(attention):
        return tuple("EfficientViTBlock" if a else "ResBlock" for a in attention)

    def scales(attention):
        return tuple(kernels if a else () for a in attention)

    torch.manual_seed(seed)
    settings = {
        "latent_channels": 4,
        "encoder_block_types": types(encoder_attention),
        "decoder_block_types": types(decoder_attention),
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_qkv_multiscales": scales(encoder_attention),
        "decoder_qkv_multiscales": scales(decoder_attention),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
    }
    reference = AutoencoderDC(**(settings | theirs))
    perturb(reference)
    model = DCAE(
        channels=4,
        scale=0.7,
        encoder_widths=widths,
        encoder_attention=encoder_attention,
        decoder_widths=widths,
        decoder_attention=decoder_attention,
        kernels=kernels,
        **ours,
    )
    model.load_state_dict(dc_ae_from_diffusers(reference.state_dict()))
    return model, reference


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():  # norms and biases away from one and zero, so that a swap would show
        for p in model.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0.1 * torch.randn_like(p))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("size", "seed"), [((16, 20), 0), ((36, 44), 1), ((64, 64), 2)])
def test_values_and_gradients(name: str, size: tuple[int, int], seed: int) -> None:
    ours, theirs = small(name, seed)
    image = torch.rand(2, 3, *size) * 2 - 1
    a, b = image.clone().requires_grad_(), image.clone().requires_grad_()
    z, want = ours.encode(a), theirs.encode(b).latent
    assert z.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert relative(z, want * 0.7) < 1e-5
    y, image_want = ours.decode(z), theirs.decode(want).sample
    assert relative(y, image_want) < 1e-5
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (image_want * cotangent).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert relative(a.grad, b.grad) < 1e-5
    gradients = dc_ae_to_diffusers({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient is not None
        assert ((gradients[key] - gradient).norm() / gradient.norm()).item() < 1e-5, key


@pytest.mark.parametrize("name", SMALL)
def test_names_there_and_back_are_exact(name: str) -> None:
    ours, theirs = small(name, 3)
    state = theirs.state_dict()
    back = dc_ae_to_diffusers(ours.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) and back[key].shape == value.shape for key, value in state.items())
    again = dc_ae_from_diffusers(back)
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(("ours", "theirs"), [(SANA_OURS, SANA_THEIRS), (LITE_OURS, LITE_THEIRS)])
def test_names_and_shapes_of_the_published_configurations(ours: dict, theirs: dict) -> None:
    with torch.device("meta"):
        state, reference = DCAE(**ours).state_dict(), AutoencoderDC(**theirs).state_dict()
    shapes = {key: value.shape for key, value in dc_ae_to_diffusers(state).items()}
    assert shapes == {key: value.shape for key, value in reference.items()}


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no name of diffusers' layout"):
        dc_ae_from_diffusers({"encoder.stages.0.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no name of our layout"):
        dc_ae_to_diffusers({"encoder.down_blocks.0.0.conv1.weight": torch.zeros(1)})
    prefix = "encoder.down_blocks.1.0.attn."
    with pytest.raises(ValueError, match="without"):
        dc_ae_from_diffusers({prefix + "to_q.weight": torch.zeros(2, 2), prefix + "to_k.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="without"):
        dc_ae_from_diffusers({prefix + "to_v.weight": torch.zeros(2, 2)})


@pytest.mark.slow
@pytest.mark.parametrize(("size", "seed"), [((64, 64), 0), ((96, 128), 1)])
def test_full_size_f32c32(size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    theirs = AutoencoderDC(**SANA_THEIRS)
    perturb(theirs)
    state = dc_ae_from_diffusers(theirs.state_dict())
    with torch.device("meta"):
        ours = DCAE()
    ours.load_state_dict(state, assign=True)
    with torch.no_grad():
        image = torch.rand(1, 3, *size) * 2 - 1
        want = theirs.encode(image).latent
        z = ours.encode(image)
        assert z.shape == (1, 32, size[0] // 32, size[1] // 32)
        assert relative(z, want * 0.41407) < 1e-5
        assert relative(ours.decode(z), theirs.decode(want).sample) < 1e-5
