"""A composed configuration as a tree on the console."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from sana.run.compose import REFERENCE, Composed


def print_tree(composed: Composed, console: Console | None = None) -> None:
    """Print all settings; references to other sections are shown as such, and so is what reads the
    environment."""
    tree = Tree(f"[bold]conf/{composed.entry}.yaml[/] {escape(' '.join(composed.overrides))}")
    for key, value in composed.raw.items():
        _grow(tree, str(key), value, composed.resolved[key])
    (console or Console()).print(tree)


def _grow(tree: Tree, key: str, raw: Any, value: Any) -> None:
    if isinstance(raw, str) and REFERENCE.fullmatch(raw) and isinstance(value, dict | list):
        tree.add(f"{escape(key)}: [dim]{escape(raw)}[/]")
    elif isinstance(raw, dict):
        target = raw.get("_target_")
        branch = tree.add(f"[bold]{escape(key)}[/]" + (f"  [cyan]{escape(str(target))}[/]" if target else ""))
        for name, inner in raw.items():
            if name not in ("_target_", "_partial_", "_convert_"):
                _grow(branch, str(name), inner, value[name])
    elif isinstance(raw, list) and any(isinstance(item, dict | list) for item in value):
        branch = tree.add(f"[bold]{escape(key)}[/]")
        for i, item in enumerate(raw):
            _grow(branch, str(i), item, value[i])
    else:
        tree.add(f"{escape(key)}: {escape(str(value))}")
