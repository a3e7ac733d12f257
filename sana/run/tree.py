"""A composed configuration as a tree on the console."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from sana.optimizer.schedule import scale_lr
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
        shown = f"  [cyan]{escape(str(target))}[/]" if target else ""
        branch = tree.add(f"[bold]{escape(key)}[/]{shown}{escape(_rate(value))}")
        for name, inner in raw.items():
            if name not in ("_target_", "_partial_", "_convert_"):
                _grow(branch, str(name), inner, value[name])
    elif isinstance(raw, list) and any(isinstance(item, dict | list) for item in value):
        branch = tree.add(f"[bold]{escape(key)}[/]")
        for i, item in enumerate(raw):
            _grow(branch, str(i), item, value[i])
    else:
        tree.add(f"{escape(key)}: {escape(str(value))}")


def _rate(value: Any) -> str:
    """The learning rate that the batch rule makes, with its numbers."""
    if value.get("_target_") != "sana.optimizer.schedule.scale_lr":
        return ""
    try:
        rate = scale_lr(**{key: number for key, number in value.items() if not key.startswith("_")})
    except (TypeError, ValueError):  # said when it is built
        return ""
    batch, base = value["batch"], value.get("base", 256)
    return f"  {rate:.6g}: {value['lr']} at batch {base}, rule {value.get('rule', 'sqrt')} at batch {batch}"
