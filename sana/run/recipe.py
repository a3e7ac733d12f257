"""The training configuration of weights that come without a run: taken from a file's header.

Whoever wrote a file chose what its header says, so a recipe in it may build only what the files in conf/ name, may not
refer to the environment, and passes the same check as every configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sana.checkpoint.record import Record
from sana.run.compose import Composed, compose
from sana.run.error import ConfigError
from sana.run.groups import CONF
from sana.run.older import current
from sana.run.schema import check

KEPT = ("seed", "size", "model", "data", "sampler", "timestep")
"""Sections of a training configuration that drawing and evaluation need."""
PROJECT = CONF.parent


def recipe_of(config: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What a header keeps of a resolved training configuration; paths become relative to the project.

    Args:
        config: of a run, as plain dictionaries.
        overrides: the command line of that run; a path outside the project is replaced by what conf/ says without
            the override that set it.

    Raises:
        ConfigError: a path outside the project that conf/ has no other value for.
    """
    kept = {key: config[key] for key in KEPT if key in config}
    defaults: dict[str, Any] | None = None

    def portable(key: tuple[Any, ...], value: Any) -> Any:
        nonlocal defaults
        if not isinstance(value, str) or not Path(value).is_absolute():
            return value
        if Path(value).is_relative_to(PROJECT):
            return Path(value).relative_to(PROJECT).as_posix()
        if defaults is None:
            own = [text for text in overrides if not Path(text.split("=", 1)[-1]).is_absolute()]
            defaults = compose("train", own).resolved
        other: Any = defaults
        for part in key:
            other = other[part] if isinstance(other, Mapping) and part in other else None
        if not isinstance(other, str) or Path(other).is_absolute():
            raise ConfigError(
                f"{'.'.join(map(str, key))}: {value} lies outside the project, so nobody else would find it; move it "
                "into the project and train with that path"
            )
        return other

    return _mapped(kept, portable)


def training_of(record: Record, path: Path) -> Composed:
    """The training configuration in a consolidated file's header, checked.

    Raises:
        ConfigError: it has none, or one that must not or cannot be built.
    """
    if record.recipe is None:
        raise ConfigError(f"{path}: its header holds no recipe")
    allowed = conf_targets()

    def safe(key: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{path}: its recipe refers to {value!r} at {'.'.join(map(str, key))}; refused")
        if key[-1] == "_target_" and value not in allowed:
            raise ConfigError(f"{path}: its recipe would build {value!r}, which no file in conf/ names; refused")
        if isinstance(value, str) and value and not Path(value).exists() and (PROJECT / value).exists():
            return str(PROJECT / value)  # called from another folder
        return value

    content = {key: _mapped(record.recipe[key], safe, (key,)) for key in KEPT if key in record.recipe}
    missing = [key for key in ("seed", "size", "model", "data") if key not in content]
    if missing:
        raise ConfigError(f"{path}: its recipe lacks {', '.join(missing)}")
    rest = {
        "dry_run": False,
        "resume": None,
        "run": {"name": "loaded", "folder": "runs", "dir": None},
        "trainer": {"_target_": "lightning.Trainer"},
        "strategy": "auto",
        "callback": {},
        "logger": {},
    }
    composed = Composed("train", OmegaConf.create(current({**rest, **content})), ())
    try:
        check(composed)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: recipe: {line}" for line in str(error).splitlines())) from None
    return composed


@cache
def conf_targets() -> frozenset[str]:
    """Every `_target_` in the files of conf/."""
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONF.rglob("*.yaml")]
    return frozenset(target for content in files for target in _targets(content))


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "_target_" and isinstance(inner, str):
                yield inner
            yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)


def _mapped(value: Any, change: Callable[[tuple[Any, ...], Any], Any], key: tuple[Any, ...] = ()) -> Any:
    """A copy of nested dictionaries and lists whose leaves went through change(key, leaf)."""
    if isinstance(value, Mapping):
        return {str(name): _mapped(inner, change, (*key, str(name))) for name, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change, (*key, i)) for i, inner in enumerate(value)]
    return change(key, value)
