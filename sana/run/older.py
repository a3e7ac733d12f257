"""Settings that older versions wrote into config.yaml, as this one knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GONE = (("model", "accumulate"), ("data", "accumulate"))  # follows from data.micro_batch now
NEW = {"init": None, "allow_partial": False, "kernels": "auto"}


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved training configuration without keys that are gone, and with those that came since."""
    result = {**NEW, **config}
    for section, key in GONE:
        if isinstance(result.get(section), Mapping) and key in result[section]:
            result[section] = {name: value for name, value in result[section].items() if name != key}
    return result
