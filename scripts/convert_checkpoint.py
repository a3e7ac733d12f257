"""Convert weights between layouts; every tensor keeps its bits.

python scripts/convert_checkpoint.py Sana_600M_512px.pth weights/sana_600m --to diffusers
python scripts/convert_checkpoint.py Sana_600M_1024px_diffusers sana.safetensors --to sana
python scripts/convert_checkpoint.py sana.safetensors sana.pth --to native
    The network. What diffusers has no place for goes into a sidecar of its folder and comes back.
python scripts/convert_checkpoint.py Sana_600M_512px_diffusers/vae weights/dc_ae_f32c32_sana_1.1.safetensors --to sana
    The autoencoder alone.
python scripts/convert_checkpoint.py runs/tiny/2026-01-31_12-00-00_0 experiments/mine/model.safetensors --to sana
    The network of a run as one file, which `python sample.py ckpt=mine` finds by its name.
python scripts/convert_checkpoint.py small.safetensors svdq-int4_r32-mine.safetensors --to nunchaku
    What scripts/quantise.py wrote with quant=svdquant_w4a4, as nunchaku's NunchakuSanaTransformer2DModel reads it. No
    kernel of nunchaku was run on it: only its order of bits was compared with the published packer's.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sana.checkpoint.dc_ae import open_dc_ae, write_dc_ae
from sana.checkpoint.facts import Facts
from sana.checkpoint.folder import PARTS, write_diffusers, write_native
from sana.checkpoint.nunchaku import bias_lost, nunchaku_tensors, write_nunchaku
from sana.checkpoint.record import EXTRA, Record, read_record
from sana.checkpoint.run_file import read_run_file
from sana.checkpoint.source import open_source, open_state
from sana.checkpoint.tensors import Tensors, read_safetensors
from sana.checkpoint.write import write_consolidated
from sana.model.foreign import autoencoder_config
from sana.run.error import ConfigError
from sana.run.export import export_run
from sana.run.match import facts_of, match
from sana.run.recipe import recipe_of, training_of
from sana.run.runs import find_checkpoint, find_weights, read_overrides
from sana.run.saved import load_saved

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILES = {"sana": ".safetensors", "native": ".pth", "nunchaku": ".safetensors"}


@dataclass(frozen=True)
class Opened:
    """A network to convert: its tensors under our names, all facts, what a header keeps, and its pipeline's folder."""

    tensors: Tensors
    facts: Facts
    record: Record
    pipeline: Path | None = None


def open_network(path: Path, options: argparse.Namespace) -> Opened:
    """Weights of any layout, those of a run included."""
    found = find_weights(str(path))
    if found.of_run:
        checkpoint, home = find_checkpoint(path)
        tensors, used, updates = read_run_file(checkpoint, options.weights)
        recipe = recipe_of(load_saved(home).resolved, read_overrides(home))
        facts = facts_of(recipe)
        return Opened(tensors, facts, Record(recipe, facts.told(), used, updates))
    source = open_source(found.path, options.weights)
    if source.record is not None and source.record.recipe is not None:
        notes, record = source.notes, source.record
        facts = replace(facts_of(training_of(record, source.path).resolved), **source.facts.told())
    else:
        plain = replace(source, pipeline=None)  # a header names no folder of this machine
        facts, composed, notes = match(plain, options.recipe)
        recipe = recipe_of(composed.resolved, [])
        record = Record(recipe, facts.told(), source.record.weights if source.record else None)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return Opened(source.tensors, facts, record, source.pipeline)


def convert_network(path: Path, options: argparse.Namespace) -> str:
    """Write a network; the line to print."""
    opened, target = open_network(path, options), Path(options.target)
    tensors = opened.tensors.cast(DTYPES.get(options.dtype))
    count = sum(t.numel() for name, t in tensors.like.items() if not name.startswith(EXTRA))
    facts = opened.facts
    what = f"{facts.family}, {facts.depth} blocks of width {facts.width}, {count:,} parameters"
    with progress(tensors) as report:
        if options.to == "sana":
            write_consolidated(target, tensors, replace(opened.record, facts=facts.told()), report)
        elif options.to == "native":
            write_native(target, tensors, facts, report)
        else:
            with parts_of(opened, options) as parts:
                lacking = write_diffusers(target, tensors, facts, parts, report)
            if lacking:
                what += (
                    f"; the pipeline still lacks {', '.join(lacking)}: give them with --pipeline, or to "
                    "SanaPipeline.from_pretrained"
                )
    return f"{target}: {what}"


@contextmanager
def parts_of(opened: Opened, options: argparse.Namespace) -> Iterator[Path | None]:
    """Folder with the other parts of a pipeline: the source's own, that of --pipeline, with --autoencoder in it."""
    own = Path(options.pipeline) if options.pipeline else opened.pipeline
    if own is not None and not any((own / part).is_dir() for part in PARTS):
        raise ConfigError(f"--pipeline: {own} has none of {', '.join(PARTS)}")
    if options.autoencoder is None:
        yield own
        return
    tensors, config = open_dc_ae(options.autoencoder)
    with tempfile.TemporaryDirectory(dir=Path(options.target).absolute().parent) as made:
        config = config or autoencoder_config(tensors, options.autoencoder)
        write_dc_ae(Path(made) / "vae", tensors, config, "diffusers")
        if own is not None:
            for part in (own / name for name in (*PARTS[1:], "model_index.json") if (own / name).exists()):
                (Path(made) / part.name).symlink_to(part.resolve())
        yield Path(made)


def convert_quantised(path: Path, options: argparse.Namespace) -> str:
    """Write what scripts/quantise.py wrote in nunchaku's layout; the line to print."""
    record = read_record(path) if path.suffix == ".safetensors" and path.is_file() else None
    if record is None or record.quant is None:
        raise ConfigError(
            f"{path}: --to nunchaku needs weights in 4 bits; quantise them first: python scripts/quantise.py "
            f"ckpt={path} quant=svdquant_w4a4 out=FILE.safetensors"
        )
    for name in ("recipe", "dtype"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} does not apply to --to nunchaku: the quantised file tells")
    facts, layers = facts_of(training_of(record, path).resolved), record.quant["layers"]
    tensors, _ = read_safetensors(path)
    made = nunchaku_tensors(tensors, layers, facts)
    with progress(made) as report:
        write_nunchaku(options.target, made, layers, facts, report)
    print(
        f"note: nunchaku's Sana adds no bias after self-attention; here the largest is {bias_lost(tensors, facts):.3g}",
        file=sys.stderr,
    )
    first, size = next(iter(layers.values())), Path(options.target).stat().st_size
    return f"{options.target}: {first['precision']}, rank {first['rank']}, {len(layers)} layers, {size / 2**20:.1f} MiB"


def convert_autoencoder(path: Path, options: argparse.Namespace) -> str:
    """Write an autoencoder; the line to print."""
    tensors, config = open_dc_ae(path)
    config = config or autoencoder_config(tensors, path)
    tensors = tensors.cast(DTYPES.get(options.dtype))
    with progress(tensors) as report:
        write_dc_ae(Path(options.target), tensors, config, options.to, report)
    count = sum(t.numel() for t in tensors.like.values())
    return f"{options.target}: DC-AE, {config['channels']} channels, {count:,} parameters"


@contextmanager
def progress(tensors: Tensors) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.like.values())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Convert weights between layouts; every tensor keeps its bits.")
    made.add_argument(
        "source",
        metavar="SRC",
        help="run, .ckpt, .pth, .safetensors, diffusers folder, directory of FSDP shards, hf://organisation/repository",
    )
    made.add_argument("target", metavar="DST", help="file or folder to write; must not exist yet")
    made.add_argument(
        "--to", required=True, choices=["native", "diffusers", "sana", "nunchaku"], help="layout to write"
    )
    made.add_argument("--recipe", metavar="NAME", help="experiment that the weights were trained like, such as "
                      "image/sana_600m_512px, where the file does not tell")  # fmt: skip
    made.add_argument("--weights", choices=["ema", "live"], default="ema", help="of a run or .pth (%(default)s)")
    made.add_argument("--dtype", choices=DTYPES, help="round to this type; left out: every bit is kept")
    made.add_argument(
        "--pipeline", metavar="DIR", help="to diffusers: folder to take vae, text encoder, tokenizer from"
    )
    made.add_argument("--autoencoder", metavar="FILE", help="to diffusers: autoencoder to put in as vae")
    return made


def convert(options: argparse.Namespace) -> str:
    """Convert what the options name; the line to print."""
    path, suffix = find_weights(options.source).path, FILES.get(options.to)
    run = find_weights(options.source).of_run
    if options.to != "diffusers" and (options.pipeline or options.autoencoder):
        raise ConfigError(f"--pipeline and --autoencoder are for --to diffusers; --to {options.to} holds the network")
    autoencoder = options.to != "nunchaku" and not run and path.suffix != ".ckpt" and _is_autoencoder(path)
    suffix = ".safetensors" if autoencoder and suffix else suffix
    if suffix is not None and Path(options.target).suffix != suffix:
        raise ConfigError(f"DST: {options.target}: --to {options.to} writes a file that ends in {suffix}")
    if options.to == "nunchaku":
        return convert_quantised(path, options)
    if autoencoder:
        return convert_autoencoder(path, options)
    if run and options.to == "sana":
        record = export_run(options.source, options.target, options.weights, DTYPES.get(options.dtype))
        size = Path(options.target).stat().st_size
        return f"{options.target}: {record.weights} weights after {record.updates} updates, {size / 2**20:.1f} MiB"
    return convert_network(path, options)


def _is_autoencoder(path: Path) -> bool:
    if path.is_dir() and ((path / "transformer").is_dir() or (path / "model_index.json").is_file()):
        return False
    return open_state(path)[1] == "dc_ae"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        print(convert(options))
    except (ValueError, OSError) as problem:
        print(f"convert_checkpoint: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
