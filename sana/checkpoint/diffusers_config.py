"""The JSON files of a diffusers folder: what they say of a network, and those that a folder of ours needs.

The facts are those of diffusers' SanaTransformer2DModel, AutoencoderDC and schedulers. diffusers' own converter writes
the flow shift 3 for every size below 4096, although the 0.6B model of 1024 pixels was trained with 4, and no
`timestep_scale` for the teachers of Sprint: what is written here has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts

VERSION = "0.38.0"
RATIO = 32  # pixels per latent pixel of DC-AE f32; diffusers counts sample_size in latent pixels


def facts_in_config(
    config: Mapping[str, Any], scheduler: Mapping[str, Any] | None, source: str, ratio: int = RATIO
) -> dict[str, Any]:
    """What transformer/config.json and scheduler_config.json say, in the words of `Facts`.

    Args:
        config, scheduler: their contents.
        source: for messages.
        ratio: pixels per latent pixel.

    Raises:
        CheckpointError: another class, or an option that SANA's image networks do not have.
    """
    name = config.get("_class_name", "SanaTransformer2DModel")
    if name != "SanaTransformer2DModel":
        raise CheckpointError(f"{source}: is a {name}; SANA's image networks are SanaTransformer2DModel")
    fixed: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False,), "norm_elementwise_affine": (False,), "norm_eps": (1e-6,),
        "qk_norm": (None, "rms_norm_across_heads"),
    }  # fmt: skip
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{source}: {key} is {config[key]!r}; known is {' or '.join(map(repr, allowed))}")
    scheduler = scheduler or {}
    interpolation = config.get("interpolation_scale")
    guidance = bool(config.get("guidance_embeds", False))
    # Sprint's networks take the time itself; its teachers are driven with 1000 t and timestep_scale 0.001.
    scale = config.get("timestep_scale", 1.0)
    said = {
        "depth": config.get("num_layers", 20),
        "in_channels": config.get("in_channels", 32),
        "patch": config.get("patch_size", 1),
        "head_dim": config.get("attention_head_dim", 32),
        "heads": config.get("num_cross_attention_heads", 20),
        "position": interpolation is not None,
        "interpolation": None if interpolation is None else float(interpolation),
        "guidance": guidance,
        "guidance_scale": config.get("guidance_embeds_scale", 0.1) if guidance else None,
        "time_scale": 1.0 if guidance else 1000.0 * float(scale),
        "size": config.get("sample_size", 32) * ratio,
        "ratio": ratio,
        "flow_shift": scheduler.get("flow_shift", scheduler.get("shift")),
    }
    return {key: float(value) if key == "flow_shift" and value is not None else value for key, value in said.items()}


def transformer_config(facts: Facts) -> dict[str, Any]:
    """config.json of SanaTransformer2DModel.

    Raises:
        CheckpointError: a fact is not known, or diffusers has no place for it.
    """
    f = require(facts, "in_channels", "patch", "head_dim", "heads", "size", "time_scale")
    if f.width % f.heads or f.width % f.head_dim:
        raise CheckpointError(
            f"width {f.width} is no multiple of {f.heads} heads and of {f.head_dim} channels per head"
        )
    return {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": VERSION,
        "in_channels": f.in_channels,
        "out_channels": f.in_channels,
        "num_attention_heads": f.width // f.head_dim,
        "attention_head_dim": f.head_dim,
        "num_layers": f.depth,
        "num_cross_attention_heads": f.heads,
        "cross_attention_head_dim": f.width // f.heads,
        "cross_attention_dim": f.width,
        "caption_channels": f.text_channels,
        "mlp_ratio": hidden_ratio(f),
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": f.size // (f.ratio or RATIO),
        "patch_size": f.patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": (f.interpolation or 1.0) if f.position else None,
        "guidance_embeds": f.guidance,
        "guidance_embeds_scale": 0.1 if f.guidance_scale is None else f.guidance_scale,
        "qk_norm": "rms_norm_across_heads" if f.self_norm else None,
        "timestep_scale": 1.0 if f.guidance else f.time_scale / 1000.0,
    }


def hidden_ratio(facts: Facts) -> float:
    """A ratio whose product with the width, rounded down, is the hidden width of the Mix-FFN."""
    for ratio in (2.5, 3.0, facts.hidden / facts.width, (facts.hidden + 0.5) / facts.width):
        if int(ratio * facts.width) == facts.hidden:
            return ratio
    raise AssertionError("a half more than the hidden width is rounded down to it")


def scheduler_config(facts: Facts) -> dict[str, Any]:
    """scheduler_config.json: SCM for Sprint, else Flow-DPM-Solver++ with the flow shift that the weights were trained
    with.

    Raises:
        CheckpointError: the flow shift is not known.
    """
    if facts.family == "sprint":
        return {
            "_class_name": "SCMScheduler",
            "_diffusers_version": VERSION,
            "num_train_timesteps": 1000,
            "prediction_type": "trigflow",
            "sigma_data": 0.5,
        }
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": require(facts, "flow_shift").flow_shift,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }


def model_index(facts: Facts) -> dict[str, Any]:
    """model_index.json of the pipeline."""
    sprint = facts.family == "sprint"
    return {
        "_class_name": "SanaSprintPipeline" if sprint else "SanaPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler_config(facts)["_class_name"]],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }


def require(facts: Facts, *names: str) -> Any:
    """The facts themselves.

    Raises:
        CheckpointError: some of them are not known; says which and who could tell.
    """
    missing = [name for name in names if getattr(facts, name) is None]
    if missing:
        raise CheckpointError(
            f"the tensors do not tell {', '.join(missing)}; name the experiment it was trained like with --recipe"
        )
    return facts


def dc_ae_from_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arguments of `sana.encoder.autoencoder.dc_ae.DCAE` for an AutoencoderDC's config.json.

    Raises:
        CheckpointError: another class, or norms and activations that SANA's autoencoders do not have.
    """
    if config.get("_class_name", "AutoencoderDC") != "AutoencoderDC":
        raise CheckpointError(f"{source}: is a {config['_class_name']}; SANA's image autoencoder is AutoencoderDC")
    widths = {side: list(config[f"{side}_block_out_channels"]) for side in ("encoder", "decoder")}
    stages = len(widths["encoder"])

    def spread(key: str, default: Any) -> list[Any]:
        value = config.get(key, default)
        return [value] * stages if isinstance(value, str) else list(value)

    if set(spread("decoder_norm_types", "rms_norm")) != {"rms_norm"}:
        raise CheckpointError(f"{source}: its decoder has batch norms (in-1.0, mix-1.0); SANA uses none of these")
    if set(spread("decoder_act_fns", "silu")) != {"silu"} or config.get("in_channels", 3) != 3:
        raise CheckpointError(f"{source}: activations or input channels that SANA's autoencoders do not have")
    attention = {
        side: [kind == "EfficientViTBlock" for kind in spread(f"{side}_block_types", "ResBlock")] for side in widths
    }
    scales = {
        tuple(scale)
        for side in widths
        for scale, used in zip(config[f"{side}_qkv_multiscales"], attention[side], strict=True)
        if used
    }
    shortcuts = {bool(config.get("encoder_out_shortcut", True)), bool(config.get("decoder_in_shortcut", True))}
    if len(scales) > 1 or len(shortcuts) > 1:
        raise CheckpointError(f"{source}: encoder and decoder differ in their scales or shortcuts, which ours cannot")
    return {
        "channels": config.get("latent_channels", 32),
        "scale": config.get("scaling_factor", 1.0),
        "encoder_widths": widths["encoder"],
        "encoder_depths": list(config["encoder_layers_per_block"]),
        "encoder_attention": attention["encoder"],
        "decoder_widths": widths["decoder"],
        "decoder_depths": list(config["decoder_layers_per_block"]),
        "decoder_attention": attention["decoder"],
        "head_dim": config.get("attention_head_dim", 32),
        "kernels": list(scales.pop()) if scales else [],
        "encoder_shuffle": config.get("downsample_block_type", "pixel_unshuffle").lower() == "pixel_unshuffle",
        "decoder_shuffle": config.get("upsample_block_type", "pixel_shuffle").lower() == "pixel_shuffle",
        "latent_shortcut": shortcuts.pop(),
        "silu_output": config.get("decoder_conv_act_fn", "relu") == "silu",
    }


def dc_ae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of AutoencoderDC for the arguments of our `DCAE`."""
    made: dict[str, Any] = {
        "_class_name": "AutoencoderDC",
        "_diffusers_version": VERSION,
        "in_channels": 3,
        "latent_channels": config["channels"],
        "attention_head_dim": config["head_dim"],
    }
    for side in ("encoder", "decoder"):
        attention = config[f"{side}_attention"]
        made[f"{side}_block_types"] = ["EfficientViTBlock" if used else "ResBlock" for used in attention]
        made[f"{side}_block_out_channels"] = list(config[f"{side}_widths"])
        made[f"{side}_layers_per_block"] = list(config[f"{side}_depths"])
        made[f"{side}_qkv_multiscales"] = [list(config["kernels"]) if used else [] for used in attention]
    return made | {
        "upsample_block_type": "pixel_shuffle" if config["decoder_shuffle"] else "interpolate",
        "downsample_block_type": "pixel_unshuffle" if config["encoder_shuffle"] else "conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "encoder_out_shortcut": config["latent_shortcut"],
        "decoder_in_shortcut": config["latent_shortcut"],
        "decoder_conv_act_fn": "silu" if config["silu_output"] else "relu",
        "scaling_factor": config["scale"],
    }
