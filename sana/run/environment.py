"""Facts about the machine and the code of a run: what one needs to repeat it or to doubt it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from sana.processor import fast_in_bf16

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "triton",
    "safetensors",
    "webdataset",
    "pillow",
    "torchmetrics",
    "wandb",
)
MAX_DIFF = 5_000_000  # characters; a longer diff is data that was added by accident


def describe_environment() -> tuple[dict[str, Any], str]:
    """Facts for environment.json, and the text of uncommitted changes ("" where there are none).

    Keys: command, python, platform, host, packages {name: version}, hardware {cpu, cores, memory_gib, gpus},
    git {commit, branch, dirty, untracked}. git is None outside a repository.
    """
    git, diff = describe_git()
    facts = {
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        "hardware": {"cpu": cpu_name(), "cores": usable_cores(), "memory_gib": memory_gib(), "gpus": gpus()},
        "git": git,
    }
    return facts, diff


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_git() -> tuple[dict[str, Any] | None, str]:
    """Commit, branch and changes of the repository that this code lies in, and the diff against the
    commit."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, ""
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    untracked = (_git("ls-files", "--others", "--exclude-standard") or "").splitlines()
    if len(diff) > MAX_DIFF:
        diff = diff[:MAX_DIFF] + f"\n# cut after {MAX_DIFF} characters\n"
    facts = {
        "commit": commit.strip(),
        "branch": (_git("rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(diff),
        "untracked": untracked[:200],
    }
    return facts, diff


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def cpu_name() -> str:
    """Model of the processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """Memory of the machine or of its container limit, whichever is less, in GiB."""
    limits = []
    with suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # "max" means no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(min(limits) / 2**30, 2) if limits else None


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    # On Linux a process inherits ru_maxrss from the one that started it (through exec), VmHWM it does not.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def fast_precision() -> str:
    """Lightning's name of the precision that this machine is fast in: "bf16-mixed" where its GPUs, or without
    GPU its processor, are fast in bf16, else "32-true"."""
    cards = gpus()
    if cards:
        fast = all(float(card.get("compute_cap") or 0) >= 8.0 for card in cards)
    else:
        fast = fast_in_bf16()
    return "bf16-mixed" if fast else "32-true"


def gpus() -> list[dict[str, str]]:
    """Name, memory and driver of every NVIDIA GPU, asked from the driver's tool so that torch is not
    needed."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ("name", "memory.total", "driver_version", "compute_cap")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in answer.stdout.splitlines()]
