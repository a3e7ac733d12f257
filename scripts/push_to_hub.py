"""Make a folder for the Hugging Face hub, and upload it only when told to.

python scripts/push_to_hub.py CKPT DST
    CKPT is whatever `ckpt=` takes. DST gets model.safetensors (whose header says how to build it), config.json, the
    samples of the run or of --samples, the licences of code, weights and text encoder, and README.md, the model card.
python scripts/push_to_hub.py CKPT DST --upload organisation/name
    The same, then uploads DST. Needs `hf auth login` or HF_TOKEN. New repositories are private unless --public.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana.checkpoint.facts import Facts
from sana.checkpoint.record import Record, read_record
from sana.checkpoint.source import open_source
from sana.checkpoint.tensors import Tensors
from sana.checkpoint.write import in_place, write_consolidated
from sana.run.error import ConfigError
from sana.run.export import export_run
from sana.run.match import facts_of, match
from sana.run.recipe import PROJECT, recipe_of
from sana.run.runs import find_weights, load_run
from sana.run.sidecar import read_sidecar

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLES = 16  # of a card


@dataclass(frozen=True)
class Licence:
    """Terms of one part.

    Attributes:
        name: as it is commonly called.
        identifier: the hub's.
        link: where the terms are.
        note: what to know.
    """

    name: str
    identifier: str
    link: str
    note: str = ""


APACHE = Licence("Apache License 2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
NSCL = Licence(
    "NVIDIA License (NSCL v2-custom)",
    "other",
    "https://huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_BF16/blob/main/LICENSE.txt",
    "of the published SANA weights, and of what is converted or fine-tuned from them",
)
GEMMA = Licence(
    "Gemma Terms of Use",
    "gemma",
    "https://ai.google.dev/gemma/terms",
    "Gemma-2 is not contained here; whoever draws with this model fetches it and accepts its terms and prohibited uses",
)
OWN_TEXT = Licence(
    "Apache License 2.0", "apache-2.0", APACHE.link, "a small encoder of this project, trained from random weights"
)


def licences(recipe: dict[str, Any], published: bool, weights: str | None) -> dict[str, Licence]:
    """Terms of code, weights, text encoder and outputs.

    Args:
        recipe: of the model.
        published: whether the weights come from files that are not this project's.
        weights: identifier that the user gives the weights, None for none given.

    Raises:
        ConfigError: the weights are the user's own, and no licence was given.
    """
    text = recipe["model"].get("text_encoder") or {}
    name = f"{text.get('_target_', '')} {text.get('path', '')}".lower()
    tiny = "gemma_tiny" in name or "gemma_random" in name
    if weights is not None:
        own = Licence(weights, weights, f"https://spdx.org/licenses/{weights}", "as their author states")
    elif published:
        own = NSCL
    else:
        raise ConfigError("--licence: the weights are yours; say under which terms, such as apache-2.0 or cc-by-4.0")
    outputs = Licence("no terms of their own", "none", own.link,
                      "images are bound by the terms of the weights and of the text encoder")  # fmt: skip
    return {"code": APACHE, "weights": own, "text encoder": OWN_TEXT if tiny else GEMMA, "outputs": outputs}


def write_weights(ckpt: str, path: Path, options: argparse.Namespace) -> tuple[Record, bool, Path | None]:
    """Write model.safetensors; its record, whether the weights are published ones, and the run's directory."""
    found = find_weights(ckpt)
    if found.of_run:
        record = export_run(ckpt, path, options.weights, DTYPES.get(options.dtype))
        return record, False, found.home
    record = read_record(found.path) if found.path.suffix == ".safetensors" else None
    source = open_source(found.path, options.weights)
    published = source.layout != "sana" or "release" in (record.facts if record else {})
    if record is None or record.recipe is None:
        facts, composed, _ = match(source, options.recipe)
        record = Record(recipe_of(composed.resolved, []), facts.told())
    tensors: Tensors = source.tensors.cast(DTYPES.get(options.dtype))
    write_consolidated(path, tensors, record)
    return record, published, None


def sample_images(run: Path | None, folder: str | None) -> list[Path]:
    """Pictures for the card: of a folder, else the newest grid that the run drew."""
    if folder is not None:
        found = sorted(Path(folder).rglob("*.png"))
        if not found:
            raise ConfigError(f"--samples: no .png in {folder}")
        return found[:SAMPLES]
    return sorted((run / "samples").glob("step_*.png"))[-1:] if run is not None else []


def card(
    name: str, record: Record, facts: Facts, terms: dict[str, Licence], images: list[Path], run: Path | None
) -> str:
    """README.md: the hub's front matter, what the model is, how to use it, pictures, settings, licences."""
    recipe = record.recipe or {}
    sampler = recipe.get("sampler") or {}
    rows = {
        "parameters": f"{facts.depth} blocks of width {facts.width}",
        "family": facts.family,
        "size": f"{recipe.get('size')} px",
        "flow shift": (recipe.get("timestep") or {}).get("shift"),
        "steps, guidance": f"{sampler.get('steps')}, {sampler.get('guidance')}",
        "weights": " ".join(
            filter(None, [record.weights, f"after {record.updates} updates" if record.updates else None])
        )
        or "as published",
    }
    lines = [
        "---",
        f"license: {terms['weights'].identifier}",
        *([f"license_link: {terms['weights'].link}"] if terms["weights"].identifier == "other" else []),
        "pipeline_tag: text-to-image",
        "library_name: sana-lab",
        "tags: [sana, text-to-image, flow-matching]",
        "---",
        f"# {name}",
        "",
        "A SANA text-to-image model (arXiv:2410.10629). Draw with it:",
        "",
        "```",
        f'python sample.py ckpt=hf://<organisation>/{name} prompt="..."',
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
    ]
    if images:
        lines += ["## Samples", ""]
        for image in images:
            said = read_sidecar(image) or {}
            prompt = str(said.get("prompt", "")).replace("\n", " ")
            lines += [f"![{prompt or image.stem}](samples/{image.name})", *([f"*{prompt}*"] if prompt else []), ""]
    if run is not None:
        lines += ["## Training", "", *_training(run), ""]
    lines += ["## Licences", "", "| part | terms | |", "|---|---|---|"]
    lines += [f"| {part} | [{term.name}]({term.link}) | {term.note} |" for part, term in terms.items()]
    lines += ["", "`config.json` has every setting of the network, its training data module and its sampler.", ""]
    return "\n".join(lines)


def _training(run: Path) -> list[str]:
    facts = load_run(run)
    commit = (facts["commit"] or "unknown")[:12] + (" with uncommitted changes" if facts["dirty"] else "")
    shown = {k: v for k, v in facts["metrics"].items() if isinstance(v, int | float) and "loss" in k}
    rows = [f"| {key} | {value:.4g} |" for key, value in sorted(shown.items())]
    return ["| | |", "|---|---|", f"| commit | {commit} |", f"| status | {facts['status']} |", *rows]


def make_folder(options: argparse.Namespace) -> str:
    """Write the folder, whole or not at all; the line to print."""
    target = Path(options.target)
    name = options.upload.split("/")[-1] if options.upload else target.resolve().name
    with in_place(target) as temporary:
        temporary.mkdir()
        record, published, run = write_weights(options.ckpt, temporary / "model.safetensors", options)
        assert record.recipe is not None
        terms = licences(record.recipe, published, options.licence)
        images = sample_images(run, options.samples)
        (temporary / "config.json").write_text(json.dumps(record.recipe, indent=2) + "\n", encoding="utf-8")
        (temporary / "licences").mkdir()
        shutil.copyfile(PROJECT / "LICENSE", temporary / "licences" / "code.txt")
        text = "\n\n".join(f"{part}: {t.name}\n{t.link}\n{t.note}".rstrip() for part, t in terms.items()) + "\n"
        (temporary / "licences" / "README.txt").write_text(text, encoding="utf-8")
        for image in images:
            (temporary / "samples").mkdir(exist_ok=True)
            shutil.copyfile(image, temporary / "samples" / image.name)
        text = card(name, record, facts_of(record.recipe), terms, images, run)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return f"{target}: {sum(p.stat().st_size for p in target.rglob('*') if p.is_file()) / 2**20:.1f} MiB"


def upload(folder: Path, name: str, public: bool) -> str:
    """Upload the folder; the line to print.

    Raises:
        ConfigError: not logged in, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ConfigError(
            f"--upload: the hub refuses ({str(error).strip().splitlines()[0]}); run hf auth login with a token that "
            f"may write to {name}. {folder} is complete, so nothing else has to be done again"
        ) from None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Make a folder for the Hugging Face hub; upload it only when told to.")
    made.add_argument("ckpt", metavar="CKPT", help="run, checkpoint or model, as for sample.py")
    made.add_argument("target", metavar="DST", help="folder to make; must not exist yet")
    made.add_argument("--upload", metavar="ORG/NAME", help="upload it there afterwards")
    made.add_argument("--public", action="store_true", help="make a new repository public")
    made.add_argument("--licence", help="of the weights, as the hub names it, such as apache-2.0")
    made.add_argument("--samples", metavar="DIR", help="folder of pictures that sample.py drew; default: of the run")
    made.add_argument("--recipe", metavar="NAME", help="experiment, where the file does not tell")
    made.add_argument("--weights", choices=["ema", "live"], default="ema", help="of a run or .pth (%(default)s)")
    made.add_argument("--dtype", choices=DTYPES, help="round to this type; left out: every bit is kept")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.upload and options.upload.count("/") != 1:
            raise ConfigError(f"--upload: {options.upload}: write organisation/name")
        print(make_folder(options))
        if options.upload:
            print(upload(Path(options.target), options.upload, options.public))
    except (ValueError, OSError) as problem:
        print(f"push_to_hub: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("push_to_hub: interrupted; nothing was uploaded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
