"""DC-AE weights of any layout: opened under our names, and written under any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sana.checkpoint.diffusers_config import dc_ae_config, dc_ae_from_config
from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers, dc_ae_to_diffusers
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.native_dc_ae import dc_ae_from_native, dc_ae_to_native
from sana.checkpoint.source import STEM, open_state, read_json, sidecar_of
from sana.checkpoint.tensors import Tensors, from_dict, read_safetensors
from sana.checkpoint.transformer import Layout
from sana.checkpoint.write import Progress, in_place, write_folder, write_safetensors, write_text

CONFIG_KEY = "config"  # in the header of our files: arguments of DCAE


def open_dc_ae(path: str | Path) -> tuple[Tensors, dict[str, Any] | None]:
    """Tensors of an autoencoder under our names, and the arguments of `DCAE` that fit them.

    Args:
        path: a file of ours, an original file, or a folder of diffusers (vae/ or its pipeline).

    Returns:
        The tensors, and the arguments; None for an original file without <file>.json, as no tensor tells the scale.

    Raises:
        CheckpointError: no DC-AE, or one that cannot be read.
    """
    path = Path(path)
    tensors, kind, layout = open_state(path)
    if kind != "dc_ae":
        raise CheckpointError(f"{path}: holds a transformer, no autoencoder")
    if layout == "sana":
        header = read_safetensors(path)[1]
        if CONFIG_KEY not in header:
            raise CheckpointError(f"{path}: its header has no {CONFIG_KEY!r}, so its scale is not known")
        return tensors, json.loads(header[CONFIG_KEY])
    sidecar = sidecar_of(path)
    try:
        if layout == "diffusers":
            folder = path.parent if path.is_file() else path / "vae" if (path / "vae").is_dir() else path
            config = dc_ae_from_config(read_json(folder / "config.json"), str(folder / "config.json"))
            return from_dict(dc_ae_from_diffusers(tensors)), config
        return from_dict(dc_ae_from_native(tensors)), read_json(sidecar) if sidecar.is_file() else None
    except (ValueError, KeyError) as error:
        text = str(error) if isinstance(error, ValueError) else f"config.json lacks {error}"
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def write_dc_ae(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layout: Layout,
    progress: Progress | None = None,
) -> None:
    """Write an autoencoder, whole or not at all: a file of ours or of the original code, or a folder of diffusers.

    Raises:
        CheckpointError: the place is taken, or a tensor is not finite.
    """
    with in_place(path) as temporary:
        if layout == "sana":
            write_safetensors(temporary, tensors, {CONFIG_KEY: json.dumps(config)}, progress)
        elif layout == "native":
            native = dc_ae_to_native(tensors, config["encoder_shuffle"], config["latent_shortcut"])
            write_safetensors(temporary, native, {"format": "pt"}, progress)
            write_text(sidecar_of(path), json.dumps(dict(config), indent=2) + "\n")
        else:
            temporary.mkdir()
            write_folder(temporary, STEM, dc_ae_to_diffusers(tensors), progress)
            text = json.dumps(dc_ae_config(config), indent=2) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")
