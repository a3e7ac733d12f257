"""Weights of the networks that judge pictures: where they lie, whether they are the published ones, what to do if not.

A leaf like `sana.types`: metrics, rewards and the CLIP wrapper all name their weights in one way:

* a path of a file or folder on this machine;
* ``hf://organisation/repository[/file]``, kept in the hub's own cache (`HF_HOME`);
* ``random:SEED``: no weights but a seeded random network, to try the whole path without a download. What is computed
  with it means nothing, and the settings beside the number say so.

Nothing is ever looked for in, or written to, a temporary directory, where anybody may have put another file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

HUB = "hf://"
DIGITS = 16  # of a digest that is shown
FOLDER_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a repository; not its other formats
CODE_FILES = ["*.py"]  # of a repository whose code is run, where that was asked for


class MissingWeightsError(ValueError):
    """Weights are not here, or are not what they claim to be; the message says how to get them."""


@dataclass(frozen=True)
class Published:
    """Weights as their authors published them.

    Attributes:
        what: the network, for people.
        file: name of the file or folder.
        source: address to download it from.
        sha256: the first digits of the file's SHA-256, or "" where they are not known.
    """

    what: str
    file: str
    source: str
    sha256: str = ""


@dataclass(frozen=True)
class Located:
    """Weights that were asked for.

    Attributes:
        given: as they were named.
        path: where they lie; None for random ones.
        seed: of random ones; None otherwise.
        sha256: of the file, shortened; "" for folders and random ones.
    """

    given: str
    path: Path | None
    seed: int | None
    sha256: str = ""

    @property
    def said(self) -> str:
        """What stands beside a number: the file with its digest, or the seed."""
        if self.path is None:
            return f"random:{self.seed} (not trained: the number means nothing)"
        return f"{self.path.name}" + (f" sha256:{self.sha256}" if self.sha256 else "")


def locate(given: str | None, known: Published, key: str, files: Sequence[str] = FOLDER_FILES) -> Located:
    """Find weights.

    Args:
        given: path, hub address or ``random:SEED``; None where nothing was given.
        known: what is expected there, for the message and the checksum.
        key: of the setting, for the message.
        files: patterns of what is fetched of a repository of the hub.

    Raises:
        MissingWeightsError: nothing was given or found, or a file whose digest contradicts its name.
    """
    if given is None:
        raise MissingWeightsError(f"{_need(known)}; {_how(known, key)}")
    if (seed := random_seed(given)) is not None:
        return Located(given, None, seed)
    path = _from_hub(given, known, key, files) if given.startswith(HUB) else Path(given).expanduser()
    if not path.exists():
        raise MissingWeightsError(f"{key}={given}: no such file; {_need(known)}; {_how(known, key)}")
    if path.is_dir():
        return Located(given, path, None)
    digest = sha256(path)
    # torch.hub's convention: a name that ends in -XXXXXXXX promises the first digits of the digest.
    promised = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    expected = known.sha256 if path.name == known.file else promised[1] if promised else ""
    if not digest.startswith(expected):
        raise MissingWeightsError(
            f"{key}={given}: its SHA-256 begins with {digest[:8]}, expected {expected}; the download is broken or it "
            f"is another file; get it again from {known.source}"
        )
    return Located(given, path, None, digest[:DIGITS])


def random_seed(given: str) -> int | None:
    """The seed of ``random:SEED``; None for any other name.

    Raises:
        MissingWeightsError: ``random`` without a number.
    """
    if given.split(":")[0] != "random":
        return None
    if not re.fullmatch(r"random:\d{1,18}", given):
        raise MissingWeightsError(f"{given!r}: random weights need a seed, such as random:0")
    return int(given.split(":")[1])


def sha256(path: Path) -> str:
    """The digest of a file, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch's generator of the CPU starts from `seed`; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def place(device: str) -> torch.device:
    """The device of a name; "auto": a CUDA card where there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def _need(known: Published) -> str:
    return f"this needs {known.file} ({known.what})"


def _how(known: Published, key: str) -> str:
    return f"get it from {known.source} and give {key}=PATH, or {key}=random:0 to try the path without it"


def _from_hub(given: str, known: Published, key: str, files: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    parts = given.removeprefix(HUB).strip("/").split("/")
    if len(parts) < 2 or not all(parts) or ".." in parts:
        raise MissingWeightsError(f"{key}={given}: write hf://organisation/repository or .../repository/file")
    try:
        if len(parts) == 2:
            return Path(snapshot_download("/".join(parts), allow_patterns=list(files)))
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise MissingWeightsError(f"{key}={given}: not to be had: {line}; {_how(known, key)}") from None
