"""What a command line says of choosing: best_of, judge, keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sana.run.error import ConfigError
from sana.run.groups import list_options


def check_choice(settings: Mapping[str, Any]) -> int | None:
    """How many images of each prompt are kept; None where nothing is chosen.

    Args:
        settings: of sample.py, resolved.

    Raises:
        ConfigError: one of best_of and judge without the other, a setting that has no effect, or numbers that do not
            go together.
    """
    best_of, judge, keep = settings["best_of"], settings.get("judge"), settings["keep"]
    if best_of is None:
        for key, idle in {"judge": judge is None, "keep": keep is None, "keep_all": not settings["keep_all"]}.items():
            if not idle:
                raise ConfigError(f"{key}: there is nothing to choose from; give best_of=N, or leave {key} out")
        return None
    if judge is None:
        raise ConfigError(f"best_of: nobody chooses; give judge= one of {', '.join(list_options('judge'))}")
    if settings["n"] is not None:
        raise ConfigError(f"n: has no effect with best_of={best_of}; keep says how many images remain")
    kept = 1 if keep is None else keep
    if best_of < 1 or not 1 <= kept <= best_of:
        raise ConfigError(f"keep: {kept} of best_of={best_of} images cannot be kept")
    return kept
