"""Composing configurations, checking them, and the records a run leaves behind and how to read them.

``from sana.run import load_runs, load_metrics, load_curves, over_seeds`` reads them into pandas (`sana.run.frame`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana.run.frame import load_curves, load_metrics, load_runs, over_seeds

__all__ = ["load_curves", "load_metrics", "load_runs", "over_seeds"]


def __getattr__(name: str) -> Any:
    """What needs pandas, imported when it is asked for: starting a run does not."""
    if name in __all__:
        from sana.run import frame

        return getattr(frame, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
