"""``-m``: one run per combination of comma-separated values.

Hydra's sweeper makes the combinations and its launcher goes through them, but each job is a process of its
own with fixed settings. So the ranks that a job starts never see the sweep, and no job inherits another's
state.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sana.run.compose import hydra_over_conf, normalise, parse_override
from sana.run.error import ConfigError
from sana.run.launch import run_job
from sana.run.records import create_directory
from sana.run.saved import prepare

# Where launchers and sweepers come from: Hydra and its plugins. No configuration file can put other code
# there.
PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")


def sweep(entry: str, overrides: Sequence[str]) -> int:
    """Run every combination, one after the other, in ``<run.folder>/<run.name>/<date>_<time>_<n>/<job>``.

    Returns:
        0, or 1 if a job failed; the others are run all the same.

    Raises:
        ConfigError: a combination that does not pass the check; then no job is started.
    """
    jobs = combinations(overrides)
    checked = [prepare(entry, job) for job in jobs]
    folder = create_directory(checked[0].config.run.folder, checked[0].config.run.name)
    print(f"{len(jobs)} runs in {folder}", flush=True)
    failed = []

    def run(config: DictConfig) -> None:
        job = HydraConfig.get()
        fixed = [str(o).lstrip("+") for o in job.overrides.task]
        code = run_job(entry, [*fixed, f"run.dir={job.runtime.output_dir}"])
        if code:
            failed.append((job.job.num, code))

    with hydra_over_conf() as loader:
        texts = [*normalise(overrides), f"hydra.sweep.dir={folder}", "hydra.mode=MULTIRUN"]
        _check_plugins(loader.load_configuration(entry, texts, RunMode.MULTIRUN))
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun(entry, run, texts, with_log_configuration=False)
    for number, code in failed:
        print(f"run {number} failed with exit code {code}: {folder / str(number)}", flush=True)
    return 1 if failed else 0


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """The settings of each job of a grid.

    Raises:
        ConfigError: an interval or another search, which a grid cannot enumerate.
    """
    parsed = [parse_override(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: a grid needs values separated by commas, not an interval")
    return BasicSweeper.split_arguments(parsed, None)[0]


def _check_plugins(config: DictConfig) -> None:
    settings = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(settings, dict)
    for part in ("launcher", "sweeper"):
        target = str((settings.get(part) or {}).get("_target_"))
        if not target.startswith(PLUGINS):
            raise ConfigError(f"hydra.{part}._target_: {target} is neither Hydra's nor one of its plugins")
    if settings.get("callbacks"):
        raise ConfigError("hydra.callbacks: not used here; callbacks of training go into callback=...")
