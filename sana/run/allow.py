"""What a configuration may build: names are checked before anything is imported, objects before anything is called.

A name is allowed if it is

* a public class of the project in one of the packages of `ROLES`,
* another class or function of the project that a file in conf/ names, or one of `WRITTEN`, or
* one of the few library names in library_signatures.json,

letter by letter: no alias, no path through another module. What is found under an allowed name must then be the listed
object itself, by its module and qualified name, so that a library that re-exports something else under the name, or a
module that was tampered with, is refused too. Hydra's own blocklist, which its authors do not call a boundary, stays
behind this.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from sana.run.groups import CONF
from sana.run.signature import PACKAGE, TABLE, Signature, UnknownTargetError, find_signature, is_class

ROLES = ("callback", "data", "encoder", "flow", "metric", "model", "network", "nn", "objective", "optimizer", "quant",
         "sampler", "strategy")  # fmt: skip
WRITTEN = frozenset({"sana.model.foreign.autoencoder"})
"""Names of the project that no file in conf/ has: `sana.run.match` writes them into the recipes of foreign weights."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+", re.ASCII)
RESOLVERS = ("oc.env", "oc.select", "hydra")
"""Interpolations that a configuration may call; others could make a node out of text that no check has seen."""
CALL = re.compile(r"\$\{\s*([^${}\s:]+)\s*:")


def check_name(target: object) -> Signature:
    """The signature of what a `_target_` names, without importing it.

    Raises:
        UnknownTargetError: it may not be built, with the reason.
    """
    if not isinstance(target, str) or not NAME.fullmatch(target):
        raise UnknownTargetError(f"{str(target)!r:.80} is not the dotted name of a class or function")
    signature = find_signature(target)
    head, role, *_ = target.split(".")
    listed = target in WRITTEN or target in conf_names()
    if head == PACKAGE.name and not listed and not (role in ROLES and is_class(target)):
        raise UnknownTargetError(
            f"{target} is none of the classes that a config may build, and no file in conf/ names it"
        )
    return signature


def check_object(target: str) -> Any:
    """Import what a `_target_` names and make sure that it is what the list says.

    Raises:
        UnknownTargetError: it may not be built, or another object stands under its name.
    """
    check_name(target)
    found = _import(target)
    expected = target if target.split(".", 1)[0] == PACKAGE.name else identities()[target]
    if identity(found) != expected:
        raise UnknownTargetError(f"{target} is {identity(found)} here, not {expected}")
    return found


def check_nodes(config: Any) -> None:
    """Check every `_target_` in nested dictionaries and lists, names first, then objects.

    Raises:
        UnknownTargetError: one of them may not be built.
    """
    targets = list(_targets(config))
    for target in targets:
        check_name(target)
    for target in dict.fromkeys(targets):
        check_object(target)


def forbidden_resolver(text: str) -> str | None:
    """The first interpolation in a text that calls something that a configuration may not call."""
    calls = (match[1] for match in CALL.finditer(text))
    return next((name for name in calls if name not in RESOLVERS), None)


def identity(found: Any) -> str:
    """Where an object was defined: its module and qualified name."""
    function = inspect.unwrap(found) if inspect.isfunction(found) else found
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(found).__name__)}"


@cache
def conf_names() -> frozenset[str]:
    """Names of the project that files in conf/ mention, found in their text: reading it as YAML takes longer than the
    rest of a refusal."""
    pattern = re.compile(rf"\b{PACKAGE.name}(?:\.[A-Za-z_]\w*)+", re.ASCII)
    return frozenset(name for file in CONF.rglob("*.yaml") for name in pattern.findall(file.read_text("utf-8")))


@cache
def identities() -> dict[str, str]:
    """Module and qualified name of each library object that may be built."""
    targets = json.loads(TABLE.read_text(encoding="utf-8"))["targets"]
    return {name: entry["identity"] for name, entry in targets.items()}


def _import(target: str) -> Any:
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if error.name is None or not target.startswith(error.name):
                raise  # the module is there, and lacks another
            if split == 1:
                raise
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return found
    raise UnknownTargetError(f"{target} cannot be imported")


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield value["_target_"]
        for inner in value.values():
            yield from _targets(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _targets(inner)
