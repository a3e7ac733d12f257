"""Weights by ``hf://organisation/repository[/file]``: local folders first, then the hub's cache, then the hub, and only
the files that are needed.

`HF_HUB_OFFLINE`, `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from sana.checkpoint.error import CheckpointError

SCHEME = "hf://"
LOCAL = Path("models")
OURS = "model.safetensors"
STEM = "diffusion_pytorch_model"
PIPELINE = "model_index.json"
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
WEIGHTS = (".safetensors", ".safetensors.index.json")

GATED = """{name} asks for its terms to be accepted first. Do this, then run the same command again:
  1. open {endpoint}/{name} and accept the terms
  2. hf auth login   (or set HF_TOKEN)
or copy the folder from a machine that has it and give its path."""


def parse(uri: str) -> tuple[str, str | None]:
    """Repository and file of ``hf://organisation/repository[/file]``.

    Raises:
        CheckpointError: not of that form.
    """
    parts = uri.removeprefix(SCHEME).strip("/").split("/")
    if not uri.startswith(SCHEME) or len(parts) < 2 or not all(parts) or ".." in parts:
        raise CheckpointError(f"{uri}: write hf://organisation/repository or hf://organisation/repository/file")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def fetch(uri: str, folders: Sequence[Path] = (LOCAL,)) -> Path:
    """Where the weights of a ``hf://`` address lie on this machine, after downloading what was missing.

    Args:
        uri: the address. Without a file it is the repository's pipeline, else its file of ours, else its only original
            checkpoint.
        folders: searched first, for <repository> and <organisation>/<repository>.

    Raises:
        CheckpointError: no such repository or file, no access, no network, or several checkpoints to choose from; with
            what to do.
    """
    name, file = parse(uri)
    for folder in folders:
        for place in (folder / name, folder / name.split("/")[1]):
            found = _local(place, file)
            if found is not None:
                return found
    return _download(uri, name, file)


def choose(files: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """What to fetch of a repository: the file to open (None: the folder) and all files that it needs.

    Args:
        files: of the repository.
        name: organisation/repository.

    Raises:
        CheckpointError: nothing that can be opened, or several checkpoints.
    """
    if PIPELINE in files or "transformer/config.json" in files:
        kept = [f for f in files if "/" not in f and f.endswith((".json", "sana_extra.safetensors"))]
        for part in PARTS:
            kept += _part([f for f in files if f.startswith(f"{part}/")])
        return None, sorted(kept)
    if OURS in files:
        return OURS, [OURS]
    if "config.json" in files and any(f.startswith(STEM) for f in files):  # one part of a pipeline
        return None, _part([f for f in files if "/" not in f and (f.startswith(STEM) or f == "config.json")])
    found = [f for f in files if f.endswith((".pth", ".pt")) or (f.endswith(".safetensors") and "/" not in f)]
    if not found:
        raise CheckpointError(f"hf://{name}: has no diffusers folder, no {OURS} and no .pth among {len(files)} files")
    same = [f for f in found if Path(f).stem == name.split("/")[1]]
    if len(found) > 1 and len(same) != 1:
        raise CheckpointError(
            f"hf://{name}: has several checkpoints; name one: " + ", ".join(f"hf://{name}/{f}" for f in found[:8])
        )
    chosen = same[0] if len(same) == 1 else found[0]
    return chosen, [f for f in (chosen, f"{chosen}.json") if f in files]


def _part(files: Sequence[str]) -> list[str]:
    """Files of one part of a pipeline: everything but weights, and weights in one precision, the widest."""
    weights = [f for f in files if f.endswith(WEIGHTS) or fnmatch.fnmatch(f, "*.safetensors.index.*.json")]
    other = [
        f for f in files if f not in weights and not f.endswith((".bin", ".pth", ".pt", ".msgpack", ".h5", ".onnx"))
    ]
    for variant in ("", "fp32", "bf16", "fp16"):
        own = [f for f in weights if _variant(f) == variant]
        if any(f.endswith(".safetensors") for f in own):
            return [*other, *own]
    return other


def _variant(file: str) -> str:
    words = Path(file).name.replace("-", ".").split(".")
    return next((word for word in ("fp32", "bf16", "fp16") if word in words), "")


def _local(place: Path, file: str | None) -> Path | None:
    if file is not None:
        return place / file if (place / file).exists() else None
    if (place / PIPELINE).is_file() or (place / "transformer" / "config.json").is_file():
        return place
    if (place / OURS).is_file():
        return place / OURS
    if (place / "config.json").is_file() and list(place.glob(f"{STEM}*")):
        return place
    found = sorted([*place.glob("*.pth"), *place.glob("checkpoints/*.pth")])
    return found[0] if len(found) == 1 else None


def _download(uri: str, name: str, file: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if file is not None and Path(file).suffix:
            return Path(hf_hub_download(name, file))
        if file is not None:  # a folder of the repository, such as transformer
            return Path(snapshot_download(name, allow_patterns=[f"{file}/*"])) / file
        files = _list(name)
        if files is None:
            root = _cached(name)
            chosen, _ = choose([p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()], name)
        else:
            chosen, needed = choose(files, name)
            root = Path(snapshot_download(name, allow_patterns=needed))
        return root if chosen is None else root / chosen
    except GatedRepoError:
        raise CheckpointError(GATED.format(name=name, endpoint=constants.ENDPOINT)) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{uri}: there is no such repository, or it is private (hf auth login)") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise CheckpointError(
            f"{uri}: is not on this machine and {why}; where there is a network: "
            f"hf download {name} --local-dir models/{name.split('/')[1]}, and copy that folder here"
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(f"{uri}: the repository has no file {file}") from None
    except Exception as error:
        if not isinstance(error, OSError) and not _of_network(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{uri}: cannot be fetched ({(lines or [type(error).__name__])[0]})") from None


def _cached(name: str) -> Path:
    """Folder of a repository's newest snapshot in the hub's cache, whatever part of the repository was fetched.

    Raises:
        LocalEntryNotFoundError: there is none.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        root = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        root = None
    if root is None or not root.is_dir():
        raise LocalEntryNotFoundError(f"{name} is not in {constants.HF_HUB_CACHE}")
    return root


def _list(name: str) -> list[str] | None:
    """Files of a repository; None without a network."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings or []]
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise  # the hub has answered
        return None
    except OfflineModeIsEnabled:
        return None
    except Exception as error:
        if isinstance(error, OSError) or _of_network(error):
            return None
        raise


def _of_network(error: Exception) -> bool:
    """Whether the hub's client failed to connect: its versions use different libraries, none named here."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
