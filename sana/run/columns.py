"""A run as one row: its facts, the settings of its command line, its numbers. No pandas: commands start fast."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sana.run.error import ConfigError
from sana.run.results import read_results
from sana.run.summary import is_number

LOWEST, HIGHEST = ":min", ":max"
EVALUATION = "eval/"
GPU_PEAK = "memory/peak_gpu_gib"  # of metrics.jsonl
FACTS = ("run", "status", "reason", "started", "seconds", "step", "commit", "dirty", "peak_rss_gib", "peak_gpu_gib",
         "gpus", "checkpoint", "checkpoints", "path")  # fmt: skip
NOT_SCORES = ("steps", "seconds", "peak_rss_gib", "n")
"""Numbers of a results.json that say what it cost."""
SUFFIX = ".ckpt"


def facts_of(row: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """The columns `FACTS` of a row of `sana.run.runs.load_runs`."""
    facts = {name: row.get(name) for name in FACTS}
    facts["run"] = os.path.relpath(row["path"], folder)
    facts["gpus"] = ", ".join(name or "?" for name in row["gpus"]) or None
    facts["peak_gpu_gib"] = row["highest"].get(GPU_PEAK)
    facts["checkpoints"] = [str(path) for path in checkpoints_of(row["path"])]
    return facts


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """What a run measured: ``name`` is the last value, ``name:min`` and ``name:max`` are extremes over the run, and
    ``eval/name`` stands in its results.json."""
    found = {name: value for name, value in row["metrics"].items() if is_number(value)}
    found |= {name + LOWEST: value for name, value in row["lowest"].items()}
    found |= {name + HIGHEST: value for name, value in row["highest"].items()}
    results = read_results(Path(row["path"]) / "results.json") or {}
    scores = {name: value for name, value in results.items() if name not in NOT_SCORES}
    if isinstance(results.get("metric"), str):
        scores[results["metric"]] = scores.pop("value", None)
    tasks = results.get("tasks")
    scores |= tasks if isinstance(tasks, dict) else {}
    return found | {EVALUATION + name: value for name, value in scores.items() if is_number(value)}


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """Setting -> value of a run's command line."""
    return dict(map(split_override, row["overrides"]))


def checkpoints_of(run: str | Path) -> list[Path]:
    """Checkpoints of a run, files or folders, by step; those that are being written are left out."""
    try:
        found = [path for path in (Path(run) / "checkpoints").iterdir() if path.suffix == SUFFIX]
    except OSError:
        return []
    return sorted(found, key=lambda path: (int(re.sub(r"\D", "", path.stem) or -1), path.name))


def differences(runs: list[str | Path]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, for those that are not the same in all; where a run lies is left out.

    Raises:
        ConfigError: a run without a readable config.yaml.
    """
    configs = []
    for run in runs:
        path = Path(run) / "config.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read ({type(error).__name__}); give directories of runs") from None
        configs.append(dict(_flat(content)))
    names = list(dict.fromkeys(name for config in configs for name in config))
    values = {name: [config.get(name) for config in configs] for name in names if not name.startswith("run.")}
    return {name: given for name, given in values.items() if any(value != given[0] for value in given)}


def split_override(text: str) -> tuple[str, Any]:
    """A setting of a command line as (key, value): ``+a.b=1e-3`` is ("a.b", 0.001), ``~a.b`` is ("a.b", "removed")."""
    key, sign, value = text.lstrip("+~").partition("=")
    if text.startswith("~"):
        return key, "removed"
    return key, _value(value) if sign else None


def _value(text: str) -> Any:
    word = text.strip()
    if word in ("null", "None", ""):
        return None
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    quoted = re.fullmatch(r"(['\"])(.*)\1", word, re.DOTALL)
    return quoted[2] if quoted else word


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else str(name))
