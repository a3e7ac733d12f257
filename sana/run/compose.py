"""From a command line to a composed configuration: Hydra's composition with this project's rules and
messages.

* Values may be set with or without ``+``; `sana.run.schema` decides what exists, so both are refused alike.
* A group's option is checked against the files in conf/ before Hydra sees it.
* Whatever Hydra or OmegaConf object to becomes a `ConfigError` of one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from sana.run.error import ConfigError
from sana.run.groups import CONF, list_groups, list_options

Key = tuple[str | int, ...]
ABSENT: Any = object()
REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # all of a value is one reference to another key


@dataclass(frozen=True)
class Composed:
    """A configuration and where it came from.

    Attributes:
        entry: the file in conf/ it began with: "train", "sample" or "eval".
        config: what Hydra composed, interpolations not yet resolved.
        overrides: the command line.
    """

    entry: str
    config: DictConfig
    overrides: tuple[str, ...]

    @cached_property
    def raw(self) -> Any:
        """The configuration as nested dictionaries, interpolations as their text."""
        return OmegaConf.to_container(self.config, resolve=False)

    @cached_property
    def resolved(self) -> Any:
        """The configuration as nested dictionaries, interpolations resolved except those that read the
        environment.

        Raises:
            ConfigError: a reference to something that is not there, with its key and file.
        """
        try:
            with masked_environment():
                return OmegaConf.to_container(self.config, resolve=True)
        except OmegaConfBaseException as error:
            key = str(error.full_key or "")
            raise ConfigError(f"{key}: {one_line(error)} ({self.origin(read_key(key))})") from None

    def origin(self, key: Key) -> str:
        """Which file, or that the command line, gave a key its value."""
        path = show(key)
        for text in reversed(self.overrides):
            name = parse_override(text).key_or_group
            if path == name or path.startswith(name + ".") or name.startswith(path + "."):
                return f"command line: {text}"
        while key:
            for package, file in reversed(self._files):
                if _written(file, package, key) is not ABSENT:
                    return file.relative_to(CONF.parent).as_posix()
            key = key[:-1]
        return f"conf/{self.entry}.yaml"

    def written(self, key: Key) -> Any:
        """What the files say for a key, whatever the command line says; None where they do not have it."""
        values = (_written(file, package, key) for package, file in reversed(self._files))
        return next((value for value in values if value is not ABSENT), None)

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        with hydra_over_conf() as loader:
            found = loader.compute_defaults_list(self.entry, list(normalise(self.overrides)), RunMode.RUN)
        return [
            (default.package or "", CONF / f"{default.config_path}.yaml")
            for default in found.defaults
            if default.config_path and (CONF / f"{default.config_path}.yaml").is_file()
        ]


def compose(entry: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose conf/<entry>.yaml under a command line.

    Raises:
        ConfigError: a group or option that does not exist, or text that cannot be read; one line.
    """
    for override in map(parse_override, overrides):
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: several values need -m; a list is written key=[a,b]")
    texts = normalise(overrides)
    with hydra_over_conf():
        config = hydra_compose(entry, list(texts))
    return Composed(entry, config, tuple(overrides))


def normalise(overrides: Sequence[str]) -> tuple[str, ...]:
    """The command line as Hydra shall read it: groups checked, values set whether or not they were there
    before.

    Raises:
        ConfigError: unreadable text, or no such group or option.
    """
    return tuple(_normalise(parse_override(text)) for text in overrides)


def parse_override(text: str) -> Override:
    """One argument of the command line.

    Raises:
        ConfigError: it is not of the form key=value.
    """
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text!r} cannot be read: {one_line(error)}; settings look like key=value") from None


def _normalise(override: Override) -> str:
    text, key = override.input_line or "", override.key_or_group
    if key.startswith(("hydra.", "hydra/")):
        return text
    if (CONF / key).is_dir():
        choices = [] if override.is_delete() else _choices(override)
        if choices is not None:
            for name in choices:
                _check_option(key, name)
            return text.lstrip("+")
    elif "/" in key:
        near = difflib.get_close_matches(key, list_groups(), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"groups: {', '.join(list_groups())}"
        raise ConfigError(f"{text}: there is no group {key}; {hint}")
    return text if override.is_delete() else "++" + text.lstrip("+")


def _choices(override: Override) -> list[str] | None:
    """The options that an override of a group names; None where it sets keys of the node instead."""
    if override.is_sweep_override():
        texts = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
        return [name for text in texts for name in text.strip("[]").split(",")]
    value = override.value()
    if isinstance(value, dict):
        return None
    return [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]


def _check_option(group: str, name: str) -> None:
    options = list_options(group)
    if not options:
        below = [g for g in list_groups() if g.startswith(group + "/")]
        raise ConfigError(f"{group}={name}: {group} is not a choice; did you mean {' or '.join(below)}?")
    if name not in options:
        near = difflib.get_close_matches(name, options, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{group}={name}: no such option; {hint}({group}: {', '.join(options)})")


@contextmanager
def hydra_over_conf() -> Iterator[Any]:
    """Hydra's loader over conf/; its errors leave as `ConfigError`."""
    try:
        if GlobalHydra.instance().is_initialized():  # inside a sweep
            yield GlobalHydra.instance().config_loader()
            return
        with initialize_config_dir(str(CONF), job_name="sana", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if not str(error) and error.__cause__ else error
        raise ConfigError(one_line(cause)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"conf/: {one_line(error)}") from None


@contextmanager
def masked_environment() -> Iterator[None]:
    """Inside, ``${oc.env:NAME}`` resolves to its own text, so that no secret reaches a screen or a file."""
    OmegaConf.register_new_resolver("oc.env", _own_text, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _own_text(*arguments: Any) -> str:
    return "${oc.env:" + ",".join("null" if a is None else str(a) for a in arguments) + "}"


def read_key(text: str) -> Key:
    """The inverse of `show`."""
    parts = text.replace("[", ".").replace("]", "").split(".")
    return tuple(int(p) if p.isdigit() else p for p in parts if p)


def show(key: Key) -> str:
    """A key as one writes it: "callback.samples.prompts[0]"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, without OmegaConf's trailer of types."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type="))]
    kept = [line for line in kept if not line.startswith("To append to your")]
    return "; ".join(kept)[:400] or type(error).__name__


def _written(file: Path, package: str, key: Key) -> Any:
    """Value of a key in one file whose content belongs at `package`, or ABSENT."""
    prefix = tuple(p for p in package.split(".") if p and p != "_global_")
    if key[: len(prefix)] != prefix:
        return ABSENT
    node: Any = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for part in key[len(prefix) :]:
        try:
            node = node[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return node
