"""The header of this project's own file of weights, which says how to build what it holds. Read without torch.

Tensors bear the names of `sana.network.sana.Sana`; what other layouts store beside the network (the null caption, a
position table, a loss-weighting head) is kept under ``extra.`` and its native name. The header's metadata:

    layout    "sana/1"
    recipe    JSON: the complete resolved training configuration, as in a run's config.yaml; paths are relative to the
              project. Absent where only tensors were at hand.
    facts     JSON: what is known apart from a recipe (family, flow shift, size, where the weights came from)
    weights   "ema" or "live"
    updates   number of updates that the weights have seen
    quant     JSON, of a quantised file only. "quant": what was asked for, as in a configuration; "layers": name of a
              layer -> its format ("kind") and the settings that it is built with, see `sana.quant.rebuild`. The file
              holds such layers' own tensors and cannot be trained on; nunchaku's layout alone can be made of it, and of
              SVDQuant's layers only.
    xxh3_128  JSON: name of a tensor -> checksum of its bytes, compared when the tensor is read; older files have none
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import read_header

LAYOUT = "sana/1"
EXTRA = "extra."


@dataclass(frozen=True)
class Record:
    """What the header of a consolidated file says beside names and shapes."""

    recipe: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    updates: int | None = None
    quant: dict[str, Any] | None = None

    def metadata(self) -> dict[str, str]:
        """As safetensors stores it: text by text."""
        said = {"format": "pt", "layout": LAYOUT, "facts": json.dumps(self.facts)}
        if self.recipe is not None:
            said["recipe"] = json.dumps(self.recipe)
        if self.weights is not None:
            said["weights"] = self.weights
        if self.updates is not None:
            said["updates"] = str(self.updates)
        if self.quant is not None:
            said["quant"] = json.dumps(self.quant)
        return said


def read_record(path: str | Path) -> Record | None:
    """The record of a consolidated file, read without torch; None for other safetensors files.

    Raises:
        CheckpointError: the file is damaged, or its record is not what this version writes.
    """
    return parse_record(read_header(path).metadata, path)


def read_quantisation(path: str | Path) -> dict[str, Any] | None:
    """How the weights of a file are quantised, as its record says it; None where they are not.

    Raises:
        CheckpointError: see `read_record`.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    record = read_record(path)
    return None if record is None else record.quant


def check_unquantised(record: Record | None, path: str | Path) -> None:
    """Refuse a quantised file where full precision is needed.

    Raises:
        CheckpointError: it is one.
    """
    if record is not None and record.quant is not None:
        raise CheckpointError(
            f"{path}: its weights are quantised ({kind_of_quant(record.quant)}), which serves sample.py and eval.py "
            "only; give the weights that it was made of"
        )


def kind_of_quant(quant: Mapping[str, Any]) -> str:
    """The formats in a record's `quant`, by name."""
    return ", ".join(dict.fromkeys(str(layer["kind"]) for layer in quant["layers"].values()))


def parse_record(metadata: Mapping[str, str], path: str | Path) -> Record | None:
    """The record in a header's metadata, None where there is none.

    Raises:
        CheckpointError: another version of the layout, or no JSON.
    """
    layout = metadata.get("layout")
    if layout is None:
        return None
    if layout != LAYOUT:
        raise CheckpointError(f"{path}: layout {layout!r}; this version reads {LAYOUT!r}")
    try:
        recipe = json.loads(metadata["recipe"]) if "recipe" in metadata else None
        facts = json.loads(metadata.get("facts", "{}"))
        updates = int(metadata["updates"]) if "updates" in metadata else None
        quant = json.loads(metadata["quant"]) if "quant" in metadata else None
        if not isinstance(recipe, dict | None) or not isinstance(facts, dict) or not _is_quant(quant):
            raise ValueError
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the record in its header is damaged") from None
    return Record(recipe, facts, metadata.get("weights"), updates, quant)


def _is_quant(quant: Any) -> bool:
    """Whether this is a record's `quant`, or None."""
    if quant is None:
        return True
    layers = quant.get("layers") if isinstance(quant, dict) else None
    if not isinstance(layers, dict) or not layers or not isinstance(quant.get("quant"), dict):
        return False
    return all(isinstance(layer, dict) and isinstance(layer.get("kind"), str) for layer in layers.values())
