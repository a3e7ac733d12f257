"""The choices that conf/ offers: a folder is a group, a file in it an option."""

from __future__ import annotations

from pathlib import Path

import yaml

CONF = Path(__file__).resolve().parents[2] / "conf"
NESTED = ("experiment",)  # groups whose options lie in folders


def list_groups() -> list[str]:
    """The groups of conf/, such as "model" and "encoder/text"."""
    folders = {p.parent.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml")} - {"."}
    found = {next((n for n in NESTED if f.startswith(n + "/")), f) for f in folders}
    return sorted(group for group in found if not group.startswith("hydra"))  # those are Hydra's own groups


def list_options(group: str) -> list[str]:
    """Options of a group, such as "image/sana_600m_512px"; files whose names begin with _ are parts of
    others."""
    folder = CONF / group
    found = folder.rglob("*.yaml") if group in NESTED else folder.glob("*.yaml")
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in found if not p.name.startswith("_"))


def groups_of(entry: str) -> dict[str, str | None]:
    """Groups that conf/<entry>.yaml chooses from, and what it chooses."""
    defaults = yaml.safe_load((CONF / f"{entry}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    chosen = {str(group): option for item in defaults if isinstance(item, dict) for group, option in item.items()}
    return {group: option for group, option in chosen.items() if not group.startswith("override ")}
