"""Whether a value written in YAML fits a parameter's annotation, decided on the annotation's syntax alone.

Only what YAML can express is judged: numbers, strings, booleans, null, lists and mappings. Names that are not
    known
here (a project's own classes and aliases) accept anything.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

SEQUENCES = {"list", "List", "Sequence", "Iterable", "Collection", "MutableSequence"}
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping"}
BUILT = {
    "Callable",
    "Module",
    "Tensor",
    "dtype",
    "device",
    "Optimizer",
}  # only a `_target_` can make one of these
NAMED = (ast.Name, ast.Attribute)
TEXT = {"str", "Path", "PathLike"}


def parse_annotation(text: str) -> ast.expr | None:
    """The expression of an annotation given as text, or None where it is no expression."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def fits(annotation: ast.expr | None, value: Any) -> bool:
    """Whether `value` is of the annotated type; ints are floats, booleans are not ints, and a missing or
    unknown annotation takes everything. A mapping with `_target_` fits everywhere: what it makes is not known
    yet."""
    if annotation is None or (isinstance(value, Mapping) and "_target_" in value):
        return True
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return fits(parse_annotation(text), value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _fits_name(name, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(left, value) or fits(right, value)
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inside):
            items = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
            return _fits_generic(name, items, value)
    return True


def takes_mapping(annotation: ast.expr | None) -> bool:
    """Whether a plain mapping may be what is meant; not so for names that are not known here."""
    if annotation is None:
        return True
    names = {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(annotation) if isinstance(n, NAMED)}
    return bool(names & (MAPPINGS | {"Any", "object"}))


def _fits_name(name: str, value: Any) -> bool:
    if name == "None":
        return value is None
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name in TEXT:
        return isinstance(value, str)
    if name in SEQUENCES or name in ("tuple", "Tuple"):
        return isinstance(value, list)
    if name in MAPPINGS:
        return isinstance(value, Mapping)
    if name in BUILT:
        return isinstance(value, list | Mapping)
    return True


def _fits_generic(name: str, items: list[ast.expr], value: Any) -> bool:
    if name == "Literal":
        # 1 == True in Python, but not in a recipe.
        return any(
            isinstance(item, ast.Constant) and item.value == value and type(item.value) is type(value) for item in items
        )
    if name == "Optional":
        return value is None or fits(items[0], value)
    if name == "Union":
        return any(fits(item, value) for item in items)
    if name in SEQUENCES:
        return isinstance(value, list) and all(fits(items[0], v) for v in value)
    if name in ("tuple", "Tuple"):
        if not isinstance(value, list):
            return False
        if len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is ...:
            return all(fits(items[0], v) for v in value)
        return len(value) == len(items) and all(fits(i, v) for i, v in zip(items, value, strict=True))
    if name in MAPPINGS:
        return isinstance(value, Mapping) and all(fits(items[1], v) for v in value.values())
    if name == "Annotated":
        return fits(items[0], value)
    if name in BUILT or name in ("Float", "Int", "Bool"):
        return isinstance(value, list | Mapping)
    return True


def describe(annotation: ast.expr) -> str:
    """The annotation as a reader would write it, such as "int | None" or "one of 'own', 'caption'"."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).split(".")[-1] == "Literal":
        items = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return "one of " + ", ".join(ast.unparse(item) for item in items)
    return ast.unparse(annotation)
