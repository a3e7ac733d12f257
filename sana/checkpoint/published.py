"""The published checkpoints by name, and what their names say that their tensors do not.

Source: the model zoo and configurations of NVlabs/Sana. All lie on the hub under Efficient-Large-Model, original files
as <name>/checkpoints/<name>.pth, diffusers folders as <name>_diffusers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ORGANISATION = "Efficient-Large-Model"
_NAME = re.compile(r"(?P<name>SANA.+?)(?P<languages>_MultiLing)?(?P<diffusers>_diffusers)?", re.IGNORECASE)


@dataclass(frozen=True)
class Release:
    """A published model.

    Attributes:
        name: on the hub.
        recipe: experiment of conf/ it was trained by; None where conf/ has none yet.
        size: pixels of a side.
        precision: type it was trained and is meant to be used in.
        time_scale: its network sees t times this.
        instead: the release to prefer.
    """

    name: str
    recipe: str | None
    size: int
    precision: str
    time_scale: float = 1000.0
    instead: str | None = None


RELEASES = {
    release.name.lower(): release
    for release in (
        Release("Sana_600M_512px", "image/sana_600m_512px", 512, "fp16"),
        Release("Sana_600M_1024px", "image/sana_600m_1024px", 1024, "fp16"),
        Release("Sana_1600M_512px", "image/sana_1600m_512px", 512, "fp16"),
        Release(
            "Sana_1600M_1024px", "image/sana_1600m_1024px", 1024, "fp16", instead="Sana_1600M_1024px_BF16"
        ),
        Release("Sana_1600M_1024px_BF16", "image/sana_1600m_1024px", 1024, "bf16"),
        Release("Sana_1600M_2Kpx_BF16", "image/sana_1600m_2048px", 2048, "bf16"),
        Release("Sana_1600M_4Kpx_BF16", "image/sana_1600m_4096px", 4096, "bf16"),
        Release("SANA1.5_1.6B_1024px", "image/sana15_1600m_1024px", 1024, "bf16"),
        Release("SANA1.5_4.8B_1024px", "image/sana15_4800m_1024px", 1024, "bf16"),
        Release("Sana_Sprint_0.6B_1024px", "sprint/student_600m", 1024, "bf16", time_scale=1.0),
        Release("Sana_Sprint_1.6B_1024px", "sprint/student_1600m", 1024, "bf16", time_scale=1.0),
        Release("Sana_Sprint_0.6B_1024px_teacher", "sprint/teacher_600m", 1024, "bf16", time_scale=1.0),
        Release("SANA_Sprint_1.6B_1024px_teacher", "sprint/teacher_1600m", 1024, "bf16", time_scale=1.0),
    )
}  # fmt: skip


def release_of(path: str | Path) -> Release | None:
    """The release that a file or folder is named after, as the hub names it: the file itself, its folder where that
    only holds checkpoints, or a repository in the hub's cache; None for every other name."""
    path = Path(path)
    names = [path.stem if path.suffix in (".pth", ".safetensors") else path.name]
    if path.parent.name == "checkpoints":
        names.append(path.parent.parent.name)
    if path.parent.name == "transformer" or path.name == "transformer":
        names += [path.parent.name, path.parent.parent.name]
    names += [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    for name in names:
        found = _NAME.fullmatch(name)
        if found and (release := RELEASES.get(found["name"].lower())):
            return release
    return None


def warning_for(release: Release | None) -> str | None:
    """One line on a release that is known to draw badly; None for others."""
    if release is None or release.instead is None:
        return None
    return (
        f"{release.name} was trained in {release.precision} and draws badly in bf16; use "
        f"{ORGANISATION}/{release.instead} instead, or draw with precision=32-true"
    )
