"""Writing a folder that diffusers reads, and an original file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sana.checkpoint.diffusers_config import model_index, require, scheduler_config, transformer_config
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.source import EXTRA_FILE, SIDECAR, STEM, sidecar_of
from sana.checkpoint.tensors import Tensors, check_finite
from sana.checkpoint.transformer import from_ours
from sana.checkpoint.write import SHARD, Progress, in_place, write_folder, write_safetensors, write_text

PARTS = ("vae", "text_encoder", "tokenizer")


def write_diffusers(
    path: str | Path,
    tensors: Tensors,
    facts: Facts,
    parts: Path | None = None,
    progress: Progress | None = None,
    shard: int = SHARD,
) -> list[str]:
    """Write a pipeline's folder, whole or not at all.

    Args:
        path: new folder.
        tensors: the network's under our names, others under ``extra.``; these go into a sidecar.
        facts: all of them; what diffusers has no place for goes into a sidecar too.
        parts: folder of a pipeline to take vae, text_encoder and tokenizer from.
        progress: called with the bytes of every tensor written.
        shard: bytes per file of the transformer.

    Returns:
        The parts that the pipeline still lacks.

    Raises:
        CheckpointError: diffusers has no place for the network, a fact or the place is missing.
    """
    path = Path(path)
    main, extra = from_ours(tensors, "diffusers", require(facts, "patch").patch)
    config, scheduler, index = transformer_config(facts), scheduler_config(facts), model_index(facts)
    there = [part for part in PARTS if parts is not None and (parts / part).is_dir()]
    if parts is not None and (parts / "model_index.json").is_file():
        own = json.loads((parts / "model_index.json").read_text(encoding="utf-8"))
        index |= {part: own[part] for part in there if part in own}  # classes of what is copied
    with in_place(path) as temporary:
        (temporary / "transformer").mkdir(parents=True)
        (temporary / "scheduler").mkdir()
        write_folder(temporary / "transformer", STEM, main, progress, shard)
        if extra:
            write_safetensors(temporary / EXTRA_FILE, extra, {"format": "pt"}, progress)
        for file, content in (
            ("transformer/config.json", config),
            ("scheduler/scheduler_config.json", scheduler),
            ("model_index.json", index),
            (SIDECAR, facts.told()),
        ):
            write_text(temporary / file, json.dumps(content, indent=2) + "\n")
        for part in there:
            assert parts is not None
            shutil.copytree(parts / part, temporary / part)
    return [part for part in PARTS if part not in there]


def write_native(path: str | Path, tensors: Tensors, facts: Facts, progress: Progress | None = None) -> None:
    """Write an original file, {"state_dict": ...}, and beside it <file>.json with what tensors do not tell.

    Raises:
        CheckpointError: a fact is missing, the place is taken, or a tensor is not finite.
    """
    path = Path(path)
    main, extra = from_ours(tensors, "native", require(facts, "patch").patch)
    with in_place(path) as temporary:
        if sidecar_of(path).exists():
            raise CheckpointError(f"{sidecar_of(path)}: exists already; give a new name, or remove it first")
        state: dict[str, torch.Tensor] = {}
        for name, tensor in (*main.items(), *extra.items()):
            # torch.save would write the whole file that a memory-mapped tensor is a view of.
            state[name] = check_finite(name, tensor.detach(), path).clone()
            if progress is not None:
                progress(tensor.nbytes)
        torch.save({"state_dict": state}, temporary)
    write_text(sidecar_of(path), json.dumps(facts.told(), indent=2) + "\n")
