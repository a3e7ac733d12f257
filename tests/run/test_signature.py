"""Signatures read from source equal those that `inspect` finds after import."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sana.run.annotation import fits, parse_annotation, takes_mapping
from sana.run.compose import compose
from sana.run.groups import list_options
from sana.run.signature import TABLE, UnknownTargetError, find_signature

ROOT = Path(__file__).resolve().parents[2]


def targets_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["_target_"]} if isinstance(value.get("_target_"), str) else set()
        return own.union(*(targets_of(v) for v in value.values())) if value else own
    return set().union(*(targets_of(v) for v in value)) if isinstance(value, list) and value else set()


def used() -> list[str]:
    """Every target of the project's own that a recipe or an entry point names."""
    found = set()
    for line in (["model=" + m] for m in list_options("model")):
        found |= targets_of(compose("train", line).raw)
    for path in (ROOT / "conf").rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("_target_:"):
                found.add(line.split("_target_:")[1].split("#")[0].strip())
    return sorted(t for t in found if t.startswith("sana."))


@pytest.mark.parametrize("target", used())
def test_source_and_import_agree(target: str) -> None:
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name))
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is p.empty for p in real.parameters.values() if p.kind in kinds}
    found = find_signature(target)
    assert {name: p.required for name, p in found.parameters.items()} == named
    assert found.open == any(p.kind is p.VAR_KEYWORD for p in real.parameters.values())
    for parameter in real.parameters.values():
        if isinstance(parameter.annotation, str):
            annotation = found.parameters[parameter.name].annotation
            assert annotation is not None
            assert ast.unparse(annotation) == ast.unparse(ast.parse(parameter.annotation, mode="eval"))


SOURCE = """
from __future__ import annotations
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, NamedTuple, overload
import torch.nn as nn
from torch import nn as other

class Plain(nn.Module):
    pass

class Base:
    def __init__(self, a: int, b: float = 1.0, *, c: str = "x") -> None: ...

class Child(Base):
    def __init__(self, d: bool, **others) -> None:
        super().__init__(**others)

class Silent(Child):
    pass

class Open:
    def __init__(self, **anything) -> None: ...

@dataclass(frozen=True)
class Data:
    kind: ClassVar[str] = "k"
    x: int
    y: list[int] = field(default_factory=list)
    z: int = field(init=False, default=3)
    w: int = field(default=2)

@dataclass
class MoreData(Data):
    v: int = 0

class Pair(NamedTuple):
    left: int
    right: int = 0

@overload
def function(a: int) -> int: ...
@overload
def function(a: str, b: int = 0) -> str: ...
def function(a, b=0, /, c: int = 1, *args, d): ...

class Made:
    def __init__(self, a): ...
    @classmethod
    def load(cls, path: str, strict: bool = True) -> Made: ...
    @staticmethod
    def tiny(n: int = 1) -> Made: ...
    def method(self): ...

def _private(): ...
"""

EXPECTED = {
    "Plain": ({}, False),
    "Base": ({"a": True, "b": False, "c": False}, False),
    "Child": ({"a": True, "b": False, "c": False, "d": True}, False),
    "Silent": ({"a": True, "b": False, "c": False, "d": True}, False),
    "Open": ({}, True),
    "Data": ({"x": True, "y": False, "w": False}, False),
    "MoreData": ({"x": True, "y": False, "w": False, "v": False}, False),
    "Pair": ({"left": True, "right": False}, False),
    "function": ({"c": False, "d": True}, False),
    "Made.load": ({"path": True, "strict": False}, False),
    "Made.tiny": ({"n": False}, False),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from sana.run import signature

    folder = tmp_path / "sana"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "part.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(signature, "PACKAGE", folder)
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_of_definitions(name: str, package: Path) -> None:
    found = find_signature(f"sana.inner.part.{name}")
    assert ({n: p.required for n, p in found.parameters.items()}, found.open) == EXPECTED[name]


@pytest.mark.parametrize(
    "name",
    ["sana", "sana.inner", "sana.inner.part", "sana.inner.other.X", "sana.inner.part.Nothing", "sana.inner.part.nn",
     "sana.inner.part.Sequence", "sana.inner.part._private", "sana.inner.part.Made.method",
     "sana.inner.part.Made.__init__", "sana.inner.part.Base.x.y", "sanax.inner.part.Base", "os.system",
     "sana.inner.part.nn.Linear", "torch.load", "builtins.eval", "", "lightning.Trainer.fit"],
)  # fmt: skip
def test_what_may_not_be_built(name: str, package: Path) -> None:
    with pytest.raises(UnknownTargetError):
        find_signature(name)


def test_the_library_table_is_that_of_the_installed_libraries() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    installed = {name: metadata.version(name) for name in table["versions"]}
    if installed != table["versions"]:
        pytest.skip(f"the table is of {table['versions']}, installed are {installed}")
    spec = importlib.util.spec_from_file_location("make_table", ROOT / "scripts" / "make_library_signatures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table() == table


def test_names_passed_on_to_wandb_are_known() -> None:
    found = find_signature("lightning.pytorch.loggers.WandbLogger")
    assert {"project", "offline", "entity", "group", "tags"} <= set(found.parameters)
    assert not found.open


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1, -3], [True, 1.0, "1", None, [1]]),
        ("float", [1, 1.5], [True, "1e-3", None]),
        ("bool", [True], [1, "true", None]),
        ("str", ["a"], [1, True, None]),
        ("float | None", [None, 1, 0.5], ["x", True]),
        ("Optional[int]", [None, 2], [2.5]),
        ("Union[int, str]", [1, "a"], [1.5]),
        ("Literal['own', 'caption']", ["own"], ["both", 1, None]),
        ("Literal[1, 2]", [1], [True, 3]),
        ("Sequence[int]", [[1, 2], []], [[1, "a"], 3, "12"]),
        ("tuple[float, float]", [[0, 1.5]], [[0], [0, 1, 2], 1]),
        ("tuple[int, ...]", [[], [1, 2, 3]], [["a"]]),
        ("dict[str, int]", [{"a": 1}], [{"a": "b"}, []]),
        ("str | Path", ["x"], [3]),
        ("nn.Module", [{"_target_": "x"}], ["a", 3]),
        ("Callable[..., Tensor]", [{"_target_": "x"}], ["a", 3]),
        ("SomeClassOfOurs", [1, "a", {"_target_": "x"}], []),
        ("int", [{"_target_": "x"}], []),
    ],
)
def test_values_and_annotations(annotation: str, good: list[Any], bad: list[Any]) -> None:
    expression = parse_annotation(annotation)
    assert [fits(expression, value) for value in good] == [True] * len(good)
    assert [fits(expression, value) for value in bad] == [False] * len(bad)


def test_plain_mappings() -> None:
    assert takes_mapping(parse_annotation("Mapping[str, float] | None"))
    assert takes_mapping(parse_annotation("Any"))
    assert not takes_mapping(parse_annotation("OptimizerFactory"))
    assert not takes_mapping(parse_annotation("float"))
