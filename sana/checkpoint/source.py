"""Opening weights of any layout: tensors under our names, and what is known of the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sana.checkpoint.diffusers_config import RATIO, facts_in_config
from sana.checkpoint.distributed import read_distributed, weights_in
from sana.checkpoint.distributed_index import is_distributed
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.pickled import read_pickle, state_in
from sana.checkpoint.published import RELEASES, release_of, warning_for
from sana.checkpoint.recognise import kind_of, recognise
from sana.checkpoint.record import Record, check_unquantised, parse_record
from sana.checkpoint.run_file import Weights
from sana.checkpoint.tensors import Tensors, join, read_safetensors, read_sharded
from sana.checkpoint.transformer import Layout, to_ours

SIDECAR = "sana.json"
"""In a diffusers folder, or <file>.json beside a file: facts that the format has no place for."""
EXTRA_FILE = "sana_extra.safetensors"
"""In a diffusers folder: tensors of the original file that diffusers has no place for, under their original names."""
STEM = "diffusion_pytorch_model"
PICKLES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Source:
    """Weights that were opened.

    Attributes:
        path: file or folder.
        layout: of its names.
        tensors: of the network under our names; others under ``extra.``.
        facts: what is known of the network.
        record: of a consolidated file.
        pipeline: diffusers folder whose other parts (vae, text_encoder, tokenizer) belong to the network.
        notes: one line each on what the user should know.
    """

    path: Path
    layout: Layout
    tensors: Tensors
    facts: Facts
    record: Record | None = None
    pipeline: Path | None = None
    notes: tuple[str, ...] = field(default=())


def open_source(path: str | Path, weights: Weights = "ema") -> Source:
    """Open an original ``.pth``, a safetensors file of any layout, a diffusers folder, or the shards of FSDP.

    Args:
        path: the file; the folder of a pipeline or of its transformer; or a directory of torch.distributed.checkpoint.
        weights: of a ``.pth`` with `state_dict_ema`, that one or `state_dict`.

    Raises:
        CheckpointError: it cannot be read, is of another family, or lacks tensors; one line.
    """
    path = Path(path)
    shards = is_distributed(path)
    if path.is_dir() and not shards:
        return _open_folder(path)
    if path.suffix == ".ckpt" and not shards:
        raise CheckpointError(
            f"{path}: is a checkpoint of a training run, whose directory says what to build; export the run with "
            "scripts/convert_checkpoint.py RUN FILE.safetensors --to sana"
        )
    try:
        if shards:
            tensors, record, notes = weights_in(read_distributed(path)), None, []
        elif path.suffix in PICKLES:
            tensors, notes = _read_original(path, weights)
            record = None
        else:
            tensors, metadata = read_safetensors(path)
            record, notes = parse_record(metadata, path), []
            check_unquantised(record, path)
        kind, layout = kind_of(tensors)
        if kind != "transformer":
            raise CheckpointError("is an autoencoder, not the network; give it as encoder.autoencoder.weights")
        ours = to_ours(tensors, layout)
        facts = recognise(tensors.like, layout)
    except CheckpointError as error:
        raise _naming(path, error) from None
    if record is not None:
        facts = facts.with_words(record.facts, str(path))
    words = _sidecar(sidecar_of(path))
    facts = facts.with_words(words, sidecar_of(path).name)
    facts, told = _by_name(facts, None if record or words else path)
    notes += told
    return Source(path, layout, ours, facts, record, None, tuple(notes))


def open_state(path: str | Path) -> tuple[Tensors, str, Layout]:
    """Tensors of a file or folder as they are, what they are ("transformer" or "dc_ae"), and whose names they bear.

    Raises:
        CheckpointError: it cannot be read or is nothing that is known.
    """
    path = Path(path)
    if is_distributed(path):
        tensors = weights_in(read_distributed(path))
    elif path.is_dir():
        tensors = read_folder(path / "vae" if (path / "vae").is_dir() else path)
    elif path.suffix in PICKLES:
        tensors = _read_original(path, "live")[0]
    else:
        tensors = read_safetensors(path)[0]
    try:
        return tensors, *kind_of(tensors)
    except CheckpointError as error:
        raise _naming(path, error) from None


def sidecar_of(path: Path) -> Path:
    """Where the facts lie that a file or a folder has no place for: within a folder, beside a file."""
    return path / SIDECAR if path.is_dir() else path.with_name(path.name + ".json")


def read_folder(folder: Path) -> Tensors:
    """Tensors of a folder that diffusers wrote: one file or an index of several, with or without a precision in the
    name.

    Raises:
        CheckpointError: no such files.
    """
    for stem in (STEM, "model"):
        # The widest precision that is there: the others are rounded from it.
        for variant in ("", ".fp32", ".bf16", ".fp16"):
            for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
                if (folder / name).is_file():
                    return (read_sharded if name.endswith("json") else read_safetensors)(folder / name)[0]
    pickles = sorted(folder.glob("*.bin"))
    hint = (
        f"; it has {pickles[0].name}, a pickle, which diffusers folders need not hold: fetch the safetensors"
        if pickles
        else ""
    )
    raise CheckpointError(f"{folder}: has no {STEM}.safetensors{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, damaged, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return value


def _open_folder(path: Path) -> Source:
    inner = path / "transformer" if (path / "transformer").is_dir() else path
    if not (inner / "config.json").is_file():
        raise CheckpointError(f"{path}: is no diffusers folder: it has no transformer/config.json")
    pipeline = path if inner != path else path.parent if (path.parent / "model_index.json").is_file() else None
    config = read_json(inner / "config.json")
    ratio, scheduler = RATIO, None
    if pipeline is not None:
        index = read_json(pipeline / "model_index.json") if (pipeline / "model_index.json").is_file() else {}
        kind = index.get("_class_name", "SanaPipeline")
        if not str(kind).startswith("Sana") or "Video" in str(kind):
            raise CheckpointError(
                f"{path}: is a {kind}; SanaPipeline, SanaPAGPipeline and SanaSprintPipeline are known"
            )
        if (pipeline / "scheduler" / "scheduler_config.json").is_file():
            scheduler = read_json(pipeline / "scheduler" / "scheduler_config.json")
        if (pipeline / "vae" / "config.json").is_file():
            widths = read_json(pipeline / "vae" / "config.json").get("encoder_block_out_channels")
            ratio = 2 ** (len(widths) - 1) if isinstance(widths, list) and widths else RATIO
    tensors = read_folder(inner)
    try:
        kind, layout = kind_of(tensors)
        if kind != "transformer":
            raise CheckpointError("is an autoencoder, not the network; give the folder of its pipeline")
        if layout != "diffusers":
            raise CheckpointError("holds no transformer of diffusers")
        ours, facts = to_ours(tensors, "diffusers"), recognise(tensors.like, "diffusers")
        facts = facts.with_words(facts_in_config(config, scheduler, f"{inner.name}/config.json", ratio), "config.json")
    except CheckpointError as error:
        raise _naming(path, error) from None
    home = pipeline or path
    if (home / EXTRA_FILE).is_file():
        extra = read_safetensors(home / EXTRA_FILE)[0]
        ours = join(ours, extra.renamed(lambda name: f"extra.{name}"))
    words = _sidecar(sidecar_of(home))
    facts = facts.with_words(words, SIDECAR)
    facts, notes = _by_name(facts, None if words else path)
    return Source(path, "diffusers", ours, facts, None, pipeline, notes)


def _read_original(path: Path, weights: Weights) -> tuple[Tensors, list[str]]:
    """State dict of an original file, without the prefixes of what it was wrapped in; notes."""
    content: Mapping[str, Any] = read_pickle(path)
    notes = []
    if "state_dict" not in content and any("." in str(key) for key in content):
        content = {"state_dict": content}  # the state dict itself
    if "updates" in content and "ema" in content:
        raise CheckpointError(f"{path}: is a checkpoint of a training run here; rename it to .ckpt within its run")
    several = sorted(set(content) & {"generator", "generator_ema", "critic"})
    if several:
        raise CheckpointError(f"{path}: holds {', '.join(several)}: LongSANA or another distillation of SANA-Video, "
                              "whose network is not part of this version")  # fmt: skip
    if weights == "ema" and content.get("state_dict_ema"):
        key = "state_dict_ema"
        notes.append("the averaged weights (state_dict_ema); weights=live takes the last ones")
    else:
        key = "state_dict"
    state = state_in(content, key, path)
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = state.renamed(lambda name, prefix=prefix: name.removeprefix(prefix))
    left = sorted(set(content) - {"state_dict", "state_dict_ema"})
    if left:
        notes.append(f"not taken over: {', '.join(map(str, left))}")
    return state, notes


def _sidecar(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _by_name(facts: Facts, path: Path | None) -> tuple[Facts, tuple[str, ...]]:
    """Facts with the name of the release that the path bears, and what there is to say of that release.

    Args:
        facts: they may have a name already, from a file that was converted.
        path: None where something better than a name came along.
    """
    release = RELEASES.get((facts.release or "").lower()) or (None if path is None else release_of(path))
    if release is None:
        return facts, ()
    return replace(facts, release=release.name), tuple(filter(None, [warning_for(release)]))


def _naming(path: Path, error: CheckpointError) -> CheckpointError:
    """The same error, saying which file."""
    text = str(error)
    return error if text.startswith(str(path)) else CheckpointError(f"{path}: {text}")
