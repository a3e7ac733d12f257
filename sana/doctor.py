"""``python -m sana.doctor``: is this machine ready, and what to do where it is not.

Every line is OK, WARN (something is slower or not available) or FAIL (training cannot work); the exit code is
1 if there is a FAIL. Packages are looked up by their metadata, so the answer comes at once even where one of
them cannot be imported; only the GPU check imports torch, and only where there is a GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    raise SystemExit("FAIL  packages         nothing is installed for this Python; run `make setup`") from None

from sana.processor import cpu_flags, fast_in_bf16
from sana.run.environment import cpu_name, gpus, installed, memory_gib, usable_cores

ROOT = Path(__file__).resolve().parents[1]
Level = Literal["OK", "WARN", "FAIL"]

COMPROMISED = {"lightning": ("2.6.2", "2.6.3")}  # published with malicious code
EXTRAS = {
    "bitsandbytes": "8-bit optimizers",
    "flash_attn": "FlashAttention kernels of their own",
    "pandas": "runs as a DataFrame",
    "torchao": "AdamW with 8-bit moments, training in FP8",
}
MEMORY_GIB, DISK_GIB = 6.0, 5.0  # what the demo needs
GEMMA = "gemma-2-2b-it"


@dataclass(frozen=True)
class Finding:
    """One line of the answer: how bad, what was looked at, and what to do (in `text`)."""

    level: Level
    subject: str
    text: str


def check_python() -> Iterator[Finding]:
    """Version of Python against pyproject.toml."""
    version = platform.python_version()
    if Version(version) >= Version("3.11"):
        yield Finding("OK", "python", version)
    else:
        yield Finding("FAIL", "python", f"{version}, 3.11 or newer is needed; make setup PYTHON=python3.12")


def check_packages() -> Iterator[Finding]:
    """Every dependency of the project against the range that pyproject.toml states."""
    for requirement in requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None:
            yield Finding("FAIL", requirement.name, "is not installed; run `make setup`")
        elif version in COMPROMISED.get(requirement.name, ()):
            text = "was published with malicious code; remove it, change the passwords and tokens of this machine"
            yield Finding("FAIL", requirement.name, f"{version} {text}, and run `make setup`")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("FAIL", requirement.name, f"{version}, needs {requirement.specifier}; run `make setup`")
        else:
            yield Finding("OK", requirement.name, version)


def requirements() -> list[Requirement]:
    """The project's dependencies from pyproject.toml, or from the installed metadata where that is not at
    hand."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        import tomllib

        lines = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("sana-lab") or [] if "extra ==" not in line]
    return [Requirement(line) for line in lines]


def check_torchvision() -> Iterator[Finding]:
    """torchvision is compiled against a version of torch, which its own metadata states; builds for CUDA and
    for processors do not mix. A mismatch breaks whatever imports it (torchmetrics, open_clip, clean-fid)."""
    torch, vision = installed("torch"), installed("torchvision")
    if torch is None or vision is None:
        return
    wanted = next((r for r in map(Requirement, metadata.requires("torchvision") or []) if r.name == "torch"), None)
    release = Version(torch).base_version
    if wanted is not None and not wanted.specifier.contains(release, prereleases=True):
        yield Finding("FAIL", "torchvision", f"{vision} needs torch{wanted.specifier}, found {torch}; run `make setup`")
    elif ("+cu" in torch) != ("+cu" in vision) and "+" in torch and "+" in vision:
        yield Finding("FAIL", "torchvision", f"{vision} and torch {torch} are builds for different devices")
    else:
        yield Finding("OK", "torchvision", f"{vision} with torch {torch}")


def check_gpu() -> Iterator[Finding]:
    """The driver, and whether torch can use it."""
    cards = gpus()
    if not cards:
        yield Finding("OK", "gpu", "none found; the tiny recipes run on the processor")
        return
    names = ", ".join(f"{card['name']} ({card['memory.total']})" for card in cards)
    driver = cards[0]["driver_version"]
    import torch

    if torch.version.cuda is None:
        yield Finding("FAIL", "gpu", f"{names}: torch {torch.__version__} is built without CUDA; run `make setup`")
    elif not torch.cuda.is_available():
        text = f"driver {driver} cannot run torch's CUDA {torch.version.cuda}; install a newer driver"
        yield Finding("FAIL", "gpu", f"{names}: {text}")
    else:
        yield Finding("OK", "gpu", f"{names}, driver {driver}, CUDA {torch.version.cuda}")
        old = [card["name"] for card in cards if float(card["compute_cap"]) < 8.0]
        if old:
            yield Finding("WARN", "gpu", f"{', '.join(old)}: no bf16 arithmetic; use trainer.precision=32-true")


def check_triton() -> Iterator[Finding]:
    """Triton, which the fast kernels need."""
    version = installed("triton")
    if version is not None:
        yield Finding("OK", "triton", version)
    elif gpus():
        yield Finding("WARN", "triton", "not installed: kernels fall back to plain torch; run `make setup`")
    else:
        yield Finding("OK", "triton", "not installed, and of no use without a GPU")


def check_processor() -> Iterator[Finding]:
    """Cores, and bf16 arithmetic."""
    bf16 = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    yield Finding("OK", "processor", f"{cpu_name()}, {usable_cores()} cores")
    if bf16 and fast_in_bf16():
        yield Finding("OK", "bf16", f"{', '.join(bf16)}: the processor computes in bf16")
    elif bf16:
        yield Finding("OK", "bf16", f"{', '.join(bf16)} alone is slower than fp32 here: training is in fp32")
    elif not gpus():
        yield Finding("WARN", "bf16", "the processor has no bf16 arithmetic: training is in fp32 and slower")


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler, for torch.compile on processors."""
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if found:
        yield Finding("OK", "compiler", shutil.which(found) or found)
    else:
        yield Finding("WARN", "compiler", "none: model.compile=true will not work; install g++ (apt install g++)")


def check_room() -> Iterator[Finding]:
    """Memory, and disk where runs and caches go."""
    memory = memory_gib()
    if memory is not None:
        level: Level = "OK" if memory >= MEMORY_GIB else "WARN"
        yield Finding(level, "memory", f"{memory:.1f} GiB" + ("" if level == "OK" else "; the demo needs about 6"))
    free = shutil.disk_usage(ROOT).free / 2**30
    level = "OK" if free >= DISK_GIB else "WARN" if free >= 1 else "FAIL"
    yield Finding(level, "disk", f"{free:.1f} GiB free in {ROOT}" + ("" if level == "OK" else "; free some"))
    if not os.access(ROOT, os.W_OK):
        yield Finding("WARN", "disk", f"{ROOT} is read-only: give run.folder and data.folder elsewhere")


def check_extras() -> Iterator[Finding]:
    """Optional packages."""
    for name, use in EXTRAS.items():
        version = installed(name)
        yield Finding("OK", name, version if version is not None else f"not installed; optional, for {use}")


def check_weights() -> Iterator[Finding]:
    """The gated text encoder: its weights, and a token to fetch them with. The token itself is never
    shown."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    found = [p for p in cache.expanduser().glob(f"models--*--{GEMMA}") if any(p.glob("snapshots/*/*.safetensors"))]
    if found:
        yield Finding("OK", "gemma", f"{GEMMA} is in {found[0]}")
        return
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
    token = names[0] if names else "a stored login" if (home / "token").is_file() else None
    if token is None:
        text = "accept its licence on the hub and set HF_TOKEN; published models need it, scenes do not"
        yield Finding("WARN", "gemma", f"{GEMMA} is not here and there is no token: {text}")
    else:
        yield Finding("WARN", "gemma", f"{GEMMA} is not here; it is fetched at first use with {token}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python, check_packages, check_torchvision, check_gpu, check_triton, check_processor, check_compiler,
    check_room, check_extras, check_weights,
)  # fmt: skip


def examine() -> list[Finding]:
    """All findings; a check that breaks is itself a finding, never the end of the answer."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:
            line = re.sub(r"\s+", " ", str(error))[:200]
            found.append(Finding("WARN", check.__name__.removeprefix("check_"), f"{type(error).__name__}: {line}"))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; 1 if one of them is a FAIL, else 0."""
    parser = argparse.ArgumentParser(prog="python -m sana.doctor", description="Is this machine ready?")
    parser.add_argument("--quiet", action="store_true", help="leave out what is OK")
    quiet = parser.parse_args(arguments).quiet
    found = examine()
    for finding in found:
        if finding.level != "OK" or not quiet:
            print(f"{finding.level:4}  {finding.subject:16} {finding.text}")
    counts = {level: sum(f.level == level for f in found) for level in ("FAIL", "WARN")}
    print(f"{counts['FAIL']} failures, {counts['WARN']} warnings")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
