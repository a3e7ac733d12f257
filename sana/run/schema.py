"""The check of a composed configuration before anything is imported or built.

The constructor's signature is the schema: every key of a node must be an argument of what its `_target_`
names, every argument without default must be there, and numbers, strings, booleans and lists must be of the
annotated type. What a configuration may build at all is what `sana.run.signature` finds.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from sana.run.allow import check_name, forbidden_resolver
from sana.run.annotation import describe, fits, takes_mapping
from sana.run.compose import REFERENCE, Composed, Key, show
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.settings import ELSEWHERE
from sana.run.signature import Parameter, Signature, UnknownTargetError, all_targets, find_signature

SETTINGS = "sana.run.settings"
SECTIONS = {
    "train": "Train", "sample": "Sample", "eval": "Eval", "importance": "Importance", "quantise": "Quantise",
    "sweep": "Sweep",
}  # fmt: skip
OF_HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_"}
Problem = tuple[Key, str]  # where, and the line
CLASSES = {"Run", "Encoder", "Timestep", "Dtype", "Autoencoder"}  # of sana.run.settings
SECTION_TYPES = CLASSES | {"Node", "Nodes"}


def check(composed: Composed, *, complete: bool = True) -> None:
    """Refuse a configuration that cannot be built as it is written.

    Args:
        composed: what `sana.run.compose.compose` gave.
        complete: also refuse keys that still have to be given (``???``).

    Raises:
        ConfigError: one line per problem: key, what is wrong, the nearest thing that exists, and the file.
    """
    lines = _Checker(composed, complete).problems()
    if lines:
        raise ConfigError("\n".join(lines))


class _Checker:
    def __init__(self, composed: Composed, complete: bool) -> None:
        self.composed, self.complete = composed, complete
        self.keys = [show(key) for key in _leaves(composed.raw)]

    def problems(self) -> list[str]:
        section = find_signature(f"{SETTINGS}.{SECTIONS[self.composed.entry]}")
        calls = list(self.calls((), self.composed.raw))
        if calls:
            return [line for _, line in calls]
        found = list(self.section((), self.composed.raw, self.composed.resolved, section))
        wrong = {show(key) for key, _ in found}
        # A wrong value is reported where it is written, not again where it is referred to.
        return [line for key, line in found if self.reference(key) not in wrong]

    def calls(self, key: Key, raw: Any) -> Iterator[Problem]:
        """Interpolations that would make values out of what the check does not see."""
        if isinstance(raw, str):
            name = forbidden_resolver(raw)
            if name is not None:
                yield self.line(key, f"${{{name}:...}} may not be used; a config may refer to keys and to oc.env")
        elif isinstance(raw, Mapping):
            for name, inner in raw.items():
                yield from self.calls((*key, name), inner)
        elif isinstance(raw, list):
            for i, inner in enumerate(raw):
                yield from self.calls((*key, i), inner)

    def reference(self, key: Key) -> str | None:
        """The key that a value is a reference to."""
        value: Any = self.composed.raw
        for part in key:
            try:
                value = value[part]
            except (KeyError, TypeError):  # missing, or inside a reference
                return None
        return value[2:-1] if isinstance(value, str) and REFERENCE.fullmatch(value) else None

    def section(self, key: Key, raw: Any, value: Any, signature: Signature) -> Iterator[Problem]:
        """A mapping whose keys are stated in `sana.run.settings`."""
        for name in raw:
            at = (*key, name)
            if name not in signature.parameters:
                yield from self.unknown(at, raw[name], signature)
            else:
                yield from self.setting(at, raw[name], value[name], signature.parameters[name])
        yield from self.missing(key, raw, signature)

    def setting(self, key: Key, raw: Any, value: Any, parameter: Parameter) -> Iterator[Problem]:
        names = _names(parameter.annotation)
        inner = names & CLASSES
        if inner and isinstance(value, Mapping):
            yield from self.section(key, raw, value, find_signature(f"{SETTINGS}.{inner.pop()}"))
        elif "Nodes" in names and isinstance(value, Mapping):
            for name, node in value.items():
                if node is not None:
                    yield from self.node((*key, name), raw[name], node)
        elif "Node" in names and isinstance(value, Mapping):
            yield from self.node(key, raw, value)
        elif names & SECTION_TYPES and not (
            (value is None and "None" in names) or (value == "auto" and "str" in names)
        ):
            group = "/".join(map(str, key))
            hint = f"; write {group}={value}" if value in list_options(group) else ""
            yield self.line(key, f"{value!r} is a value, but this is a section of keys{hint}")
        else:
            yield from self.value(key, raw, value, parameter)

    def node(self, key: Key, raw: Any, value: Any) -> Iterator[Problem]:
        """A mapping with `_target_`."""
        if isinstance(raw, str) and REFERENCE.fullmatch(raw):
            return  # checked where it is written
        if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
            others = [name for name in self.inside_of(key[:-1]) if name != key[-1]]
            near = difflib.get_close_matches(str(key[-1]), others, 1, 0.6)
            wanted = f"did you mean {show((*key[:-1], near[0]))}?" if near else "it names what to build"
            yield self.line(key, f"_target_ is missing; {wanted}")
            return
        target = value["_target_"]
        try:
            signature = check_name(target)
        except UnknownTargetError as error:
            near = difflib.get_close_matches(target, list(all_targets()), 1, 0.6)
            yield self.line((*key, "_target_"), f"{error}{f'; did you mean {near[0]}?' if near else ''}")
            return
        given: Any = raw
        for name in given:
            at = (*key, name)
            home = ELSEWHERE.get(show(at))
            if name in OF_HYDRA:
                continue
            if home is not None:
                yield self.line(at, f"has no effect here; set {home} instead")
            elif name in signature.parameters:
                yield from self.value(at, given[name], value[name], signature.parameters[name])
            elif signature.open and name != "_args_":
                yield from self.inside(at, given[name], value[name])
            else:
                yield from self.unknown(at, given[name], signature)
        if value.get("_partial_") is not True:
            yield from self.missing(key, given, signature)

    def value(self, key: Key, raw: Any, value: Any, parameter: Parameter) -> Iterator[Problem]:
        """An argument."""
        if raw == "???":
            if self.complete:
                yield self.line(key, "has to be given")
        elif raw == "${run.dir}" and value is None:
            return  # known when the run's directory is made
        elif isinstance(value, str) and value.startswith("${oc.env:"):
            return  # known only when the run starts
        elif isinstance(value, Mapping) and "_target_" not in value and not takes_mapping(parameter.annotation):
            if not isinstance(raw, str):
                yield self.line(key, f"has no _target_{self.home(key)}")
        elif parameter.annotation is not None and not fits(parameter.annotation, value):
            shown = f"{value!r}"[:80]
            hint = f"; quote it: '{show(key)}=\"{value}\"'" if _wants_text(parameter, value) else ""
            yield self.line(key, f"{shown} is {_kind(value)}, expected {describe(parameter.annotation)}{hint}")
        else:
            yield from self.inside(key, raw, value)

    def home(self, key: Key) -> str:
        """A hint where a key was a reference before the command line wrote into it."""
        written = self.composed.written(key)
        if isinstance(written, str) and REFERENCE.fullmatch(written):
            return f": it refers to {written[2:-1]}, so set {written[2:-1]}.<key> instead"
        return ""

    def inside(self, key: Key, raw: Any, value: Any) -> Iterator[Problem]:
        """Nodes at any depth of lists and mappings."""
        if isinstance(raw, str):
            return  # text, or a reference that is checked where it points
        if isinstance(value, Mapping):
            if "_target_" in value:
                yield from self.node(key, raw, value)
            else:
                for name in value:
                    yield from self.inside((*key, name), raw[name], value[name])
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from self.inside((*key, i), raw[i], item)

    def missing(self, key: Key, raw: Any, signature: Signature) -> Iterator[Problem]:
        for name, parameter in signature.parameters.items():
            if parameter.required and name not in raw:
                yield self.line((*key, name), "is missing and has no default")

    def unknown(self, key: Key, raw: Any, signature: Signature) -> Iterator[Problem]:
        for leaf in _leaves(raw) or [()]:
            near = self.nearest(key, leaf, signature)
            known = f"known here: {', '.join(signature.parameters) or 'no key at all'}"
            yield self.line((*key, *leaf), f"unknown key; {f'did you mean {near}?' if near else known}")

    def nearest(self, key: Key, leaf: Key, signature: Signature) -> str | None:
        """The existing key that a wrong one most likely means: a sibling, or any key that ends alike."""
        wrong, home = show((*key, *leaf)), show(key[:-1])
        siblings = [show((*key[:-1], name)) for name in signature.parameters]
        if leaf:  # a section is misspelt: repair its name, then look for what is inside
            near = difflib.get_close_matches(str(key[-1]), list(signature.parameters), 1, 0.6)
            wrong, siblings = show((*key[:-1], near[0], *leaf)) if near else wrong, []
        others = [k for k in self.keys if k != show((*key, *leaf)) and not k.startswith(show(key) + ".")]
        end = wrong.rsplit(".", 1)[-1]

        def alike(known: str) -> float:
            ends = difflib.SequenceMatcher(None, end, known.rsplit(".", 1)[-1]).ratio()
            close = 0.2 if known in siblings or (leaf and known == wrong) else 0.0
            return ends + close + 0.1 * difflib.SequenceMatcher(None, wrong, known).ratio()

        best = max([*siblings, *others], key=alike, default=home)
        return best if alike(best) >= 0.8 else None

    def inside_of(self, key: Key) -> list[str]:
        """Names of the keys in a section."""
        value: Any = self.composed.resolved
        for part in key:
            value = value[part]
        return [str(name) for name in value] if isinstance(value, Mapping) else []

    def line(self, key: Key, what: str) -> Problem:
        return key, f"{show(key)}: {what} ({self.composed.origin(key)})"


def _leaves(value: Any) -> list[Key]:
    if isinstance(value, Mapping) and value:
        return [(name, *rest) for name, inner in value.items() for rest in _leaves(inner)]
    return [()]


def _names(annotation: ast.expr | None) -> set[str]:
    if annotation is None:
        return set()
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return names | {"None" for node in ast.walk(annotation) if isinstance(node, ast.Constant) and node.value is None}


def _wants_text(parameter: Parameter, value: Any) -> bool:
    return isinstance(value, int | float) and "str" in _names(parameter.annotation)


def _kind(value: Any) -> str:
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
