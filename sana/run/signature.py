"""What a `_target_` accepts, found without importing it.

The project's own targets are read from their source by `ast`; those of libraries come from
library_signatures.json, which `scripts/make_library_signatures.py` writes and a test compares with what is
installed. A target in neither place does not exist: this is also the list of what a configuration may name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from sana.run.annotation import parse_annotation

PACKAGE = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("library_signatures.json")


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor or function.

    Attributes:
        annotation: the type's expression, or None.
        required: whether it has no default.
    """

    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """Arguments by name.

    Attributes:
        parameters: in order; those that can only be given by position are left out.
        open: whether any other keyword is taken too.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


class UnknownTargetError(LookupError):
    """No such class or function among those that a configuration may name; the message says how far it was
    found."""


def find_signature(target: str) -> Signature:
    """Signature of a class, function or method by its dotted path.

    Raises:
        UnknownTargetError: nothing of that name may be built from a configuration.
    """
    if target.split(".", 1)[0] == PACKAGE.name:
        return _own(target)
    library = library_table()
    if target not in library:
        raise UnknownTargetError(f"{target} is not among the {len(library)} library names that a config may build")
    return library[target]


def is_class(target: str) -> bool:
    """Whether a name of the project is that of a class at the top of its module."""
    module, _, name = target.rpartition(".")
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and isinstance(_module(path).definitions.get(name), ast.ClassDef)


@lru_cache(maxsize=1)
def library_table() -> dict[str, Signature]:
    """Library targets by name."""
    table = {}
    for name, entry in json.loads(TABLE.read_text(encoding="utf-8"))["targets"].items():
        parameters = {
            key: Parameter(None if text is None else parse_annotation(text), required)
            for key, (text, required) in entry["parameters"].items()
        }
        table[name] = Signature(parameters, entry["open"])
    return table


def all_targets() -> Iterator[str]:
    """Every name that a configuration may build: public classes and functions of the project, then
    libraries'."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))
        for name in _module(path).definitions:
            if not name.startswith("_"):
                yield f"{module}.{name}"
    yield from library_table()


@dataclass(frozen=True)
class _Module:
    name: str
    definitions: dict[str, ast.ClassDef | ast.FunctionDef]
    imports: dict[str, str]


@cache
def _module(path: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    definitions, imports = {}, {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node  # of overloads, the last one is the real one
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        elif isinstance(node, ast.Import):
            for a in node.names:
                top = a.name.split(".")[0]
                imports[a.asname or top] = a.name if a.asname else top
    module = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))
    return _Module(module, definitions, imports)


def _own(target: str) -> Signature:
    parts = target.split(".")
    folder, rest = PACKAGE, parts[1:]
    while rest and (folder / rest[0]).is_dir():
        folder, rest = folder / rest[0], rest[1:]
    done = ".".join(parts[: len(parts) - len(rest)])
    if not rest:
        raise UnknownTargetError(f"{target} is a package, not a class or function")
    path = folder / f"{rest[0]}.py"
    if not path.is_file():
        raise UnknownTargetError(f"{target}: there is no module {done}.{rest[0]}")
    module, names = _module(path), rest[1:]
    if not names:
        raise UnknownTargetError(f"{target} is a module, not a class or function")
    if any(name.startswith("_") for name in names):
        raise UnknownTargetError(f"{target} is private")
    node = module.definitions.get(names[0])
    if node is None:
        raise UnknownTargetError(f"{target}: {module.name} defines no {names[0]}")
    if len(names) == 1:
        return _of_class(node, module) if isinstance(node, ast.ClassDef) else _of_function(node, module, bound=False)
    method = _method(node, names[1]) if isinstance(node, ast.ClassDef) and len(names) == 2 else None
    decorators = {ast.unparse(d) for d in method.decorator_list} if method else set()
    if method is None or not decorators & {"classmethod", "staticmethod"}:
        raise UnknownTargetError(f"{target}: {names[0]} has no class method {'.'.join(names[1:])}")
    return _of_function(method, module, bound="classmethod" in decorators)


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[-1] if found else None


def _of_function(node: ast.FunctionDef, module: _Module, *, bound: bool, base: Signature | None = None) -> Signature:
    arguments = node.args
    positional = arguments.args[1:] if bound and not arguments.posonlyargs else arguments.args
    first_default = len(positional) - len(arguments.defaults)
    parameters = {a.arg: Parameter(a.annotation, i < first_default) for i, a in enumerate(positional)}
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[a.arg] = Parameter(a.annotation, default is None)
    if arguments.kwarg is None:
        return Signature(parameters)
    if base is None:
        return Signature(parameters, open=True)
    return Signature({**base.parameters, **parameters}, base.open)  # **others go to the base class


def _of_class(node: ast.ClassDef, module: _Module) -> Signature:
    constructor = _method(node, "__init__")
    if constructor is not None:
        needs_base = constructor.args.kwarg is not None
        return _of_function(constructor, module, bound=True, base=_base(node, module) if needs_base else None)
    base = _base(node, module) or Signature()
    names = {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}
    if "dataclass" not in names and not any(ast.unparse(b).endswith("NamedTuple") for b in node.bases):
        return base
    fields = dict(base.parameters)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            settable, required = _field(item)
            if settable:
                fields[item.target.id] = Parameter(item.annotation, required)
    return Signature(fields)


def _field(item: ast.AnnAssign) -> tuple[bool, bool]:
    """Whether a dataclass field is an argument, and whether it is required."""
    if "ClassVar" in ast.unparse(item.annotation):
        return False, False
    if isinstance(item.value, ast.Call) and ast.unparse(item.value.func).split(".")[-1] == "field":
        options = {k.arg: k.value for k in item.value.keywords}
        init = options.get("init")
        settable = not (isinstance(init, ast.Constant) and init.value is False)
        return settable, not options.keys() & {"default", "default_factory"}
    return True, item.value is None


def _base(node: ast.ClassDef, module: _Module) -> Signature | None:
    """Signature of the first base class that is known, None if there is none."""
    for base in node.bases:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        head, _, tail = text.partition(".")
        if not tail and isinstance(own := module.definitions.get(head), ast.ClassDef):
            return _of_class(own, module)
        full = ".".join(filter(None, (module.imports.get(head, head), tail)))
        try:
            return find_signature(full)
        except UnknownTargetError:
            continue
    return None
