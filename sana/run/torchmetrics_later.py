"""Runs torchmetrics' ``__init__`` when something of it is used, not when Lightning is imported.

Lightning names two of its classes, and for these the package imports all that it has: torchvision, scipy.signal, the
text models of transformers, matplotlib. That is a fifth of the seconds before the first update.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
HOMES = {"Metric": "metric", "MetricCollection": "collections"}
"""What Lightning takes from the package, and the modules that have it, which need nothing else."""


class _Later(ModuleType):
    """The package before its ``__init__`` has run: any name that it lacks has it run now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


def later() -> None:
    """From here on the package's ``__init__`` runs at the first use of anything but `HOMES`.

    Nothing is changed where the package is missing or there already, or is laid out in another way than we know.
    """
    spec = None if PACKAGE in sys.modules else find_spec(PACKAGE)
    if spec is None:
        return
    module = module_from_spec(spec)
    module.__class__ = _Later
    sys.modules[PACKAGE] = module
    try:
        # "utilities" comes first: it and "metric" import each other, and only in this order.
        module.__dict__.update(_logger=logging.getLogger(PACKAGE))
        module.__dict__.update(__version__=import_module(f"{PACKAGE}.__about__").__version__)
        import_module(f"{PACKAGE}.utilities")
        found = {name: getattr(import_module(f"{PACKAGE}.{home}"), name) for name, home in HOMES.items()}
        module.__dict__.update(found)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
