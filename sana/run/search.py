"""Which runs a sweep makes: all combinations of a grid, or what Optuna proposes.

Both give one job after the other and are told what became of it; both know after a restart what was done before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from sana.run.compose import parse_override
from sana.run.error import ConfigError
from sana.run.job import DONE, Job, judge, read_job, write_job

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

STORAGES = {"journal": "study.journal", "sqlite": "study.db"}
SPACE = "a,b,c, 'interval(low,high)', 'tag(log,interval(low,high))' or 'range(start,stop,step)'"


@dataclass
class Search:
    """Settings of every sweep; see conf/sweep/grid.yaml.

    Raises:
        ValueError: a number is out of range.
    """

    metric: str | None = "val/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    value: Literal["last", "best"] = "last"
    parallel: int = 1
    devices: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ValueError(f"sweep.parallel: at least one run at a time, got {self.parallel}")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"sweep.devices: at least one GPU per run, or null, got {self.devices}")

    def record(self) -> dict[str, Any]:
        """What sweep.json keeps of the search."""
        judged = {"metric": self.metric, "direction": self.direction, "value": self.value}
        return {"search": type(self).__name__.lower(), **judged, "needs_value": False, "prune": False}

    def samples(self, overrides: Sequence[str]) -> list[list[str]]:
        """Settings of runs that have to pass the check before anything is started.

        Raises:
            ConfigError: a setting with several values that this search cannot make values of.
        """
        raise NotImplementedError

    def open(self, folder: Path, overrides: Sequence[str]) -> None:
        """Begin the sweep in its directory, or go on with it."""
        raise NotImplementedError

    def jobs(self) -> Iterator[Job]:
        """The jobs to run now, each made when it is asked for."""
        raise NotImplementedError

    def tell(self, job: Job) -> None:
        """A job has ended."""

    def missing(self) -> int:
        """Jobs to run now."""
        raise NotImplementedError


@dataclass
class Grid(Search):
    """Every combination of comma-separated values."""

    def samples(self, overrides: Sequence[str]) -> list[list[str]]:
        """All jobs."""
        return combinations(overrides)

    def open(self, folder: Path, overrides: Sequence[str]) -> None:
        """Find what is missing or failed."""
        self._folder, self._jobs = folder, []
        varied = {o.key_or_group for o in map(parse_override, overrides) if o.is_sweep_override()}
        for number, fixed in enumerate(combinations(overrides)):
            job = read_job(folder, number)
            if job is not None and job.status == "running":  # its watcher was killed
                job = write_job(folder, judge(folder, self.record(), replace(job, code=None)))
            if job is None or job.status not in DONE:
                pairs = (text.lstrip("+").split("=", 1) for text in fixed)
                params = {key: value for key, value in pairs if key in varied}
                self._jobs.append(write_job(folder, Job(number, fixed, params=params)))

    def jobs(self) -> Iterator[Job]:
        """Those that are missing or failed; what an earlier attempt left moves aside."""
        for job in self._jobs:
            run = self._folder / str(job.number)
            if run.exists():
                n = 1
                while (aside := run.with_name(f"{run.name}_attempt{n}")).exists():
                    n += 1
                run.rename(aside)
            yield job

    def missing(self) -> int:
        return len(self._jobs)


@dataclass
class Optuna(Search):
    """Optuna's TPE, with pruning by the median of the other runs; see conf/sweep/optuna.yaml.

    Trials that fail or are killed are tried again with the same settings when the command is issued again. The study
    lies beside the runs; a trial's number is the name of its run's directory.
    """

    trials: int = 20
    seed: int = 0
    startup: int = 8
    prune: bool = True
    prune_after: int = 0
    storage: Literal["journal", "sqlite"] = "journal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials < 1 or self.startup < 1 or self.prune_after < 0:
            raise ValueError(
                f"sweep: trials {self.trials} and startup {self.startup} are at least 1, "
                f"prune_after {self.prune_after} at least 0"
            )
        if self.metric is None:
            raise ValueError("sweep.metric: Optuna needs a number of metrics.jsonl to go by, such as val/loss")
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError("sweep=optuna needs Optuna: pip install 'sana-lab[sweep]'") from None

    def record(self) -> dict[str, Any]:
        own = {key: asdict(self)[key] for key in ("seed", "startup", "prune", "prune_after", "storage")}
        return {**super().record(), "needs_value": True, **own}

    def samples(self, overrides: Sequence[str]) -> list[list[str]]:
        """The lowest point of the space, and the others that differ from it in one setting."""
        fixed, space = split_space(overrides)
        if not space:
            raise ConfigError(f"sweep=optuna: no setting has several values; write {SPACE} for one")
        ends = {key: _ends(distribution) for key, distribution in space.items()}
        lowest = {key: texts[0] for key, texts in ends.items()}
        points = [lowest] + [{**lowest, key: text} for key, texts in ends.items() for text in texts[1:]]
        return [[*fixed, *(f"{key}={text}" for key, text in point.items())] for point in points]

    def open(self, folder: Path, overrides: Sequence[str]) -> None:
        """Open the study; take up what runs of a killed sweep came to, and queue what has to be tried again."""
        from optuna.trial import TrialState

        self._folder = folder
        self._fixed, self._space = split_space(overrides)
        self._study = open_study(folder, self.record(), self.seed)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            job = read_job(folder, trial.number)
            if job is None:  # killed between asking and writing
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                if job.status in ("running", "waiting"):
                    job = write_job(folder, judge(folder, self.record(), replace(job, code=None)))
                self.tell(job)
        trials = self._study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        self._missing = max(0, self.trials - len(done))
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if self._missing and trial.state == TrialState.FAIL and trial.params and trial.number not in retried:
                self._study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})

    def jobs(self) -> Iterator[Job]:
        """One proposal after the other, each made with all results that are known by then."""
        for _ in range(self._missing):
            trial = self._study.ask(self._space)
            params = {key: _text(value) for key, value in trial.params.items()}
            fixed = [*self._fixed, *(f"{key}={text}" for key, text in params.items())]
            yield write_job(self._folder, Job(trial.number, fixed, params=params))

    def tell(self, job: Job) -> None:
        from optuna.trial import TrialState

        if job.status == "finished":
            self._study.tell(job.number, job.value)
        else:
            state = TrialState.PRUNED if job.status == "pruned" else TrialState.FAIL
            self._study.tell(job.number, state=state)

    def missing(self) -> int:
        return self._missing


def open_study(folder: Path, settings: Mapping[str, Any], seed: int = 0) -> Study:
    """The study of a sweep, made where it is not there yet."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STORAGES[settings["storage"]]
    if settings["storage"] == "journal":
        storage: Any = JournalStorage(JournalFileBackend(str(path)))
    else:
        storage = f"sqlite:///{path.resolve()}"
    pruner: Any = optuna.pruners.NopPruner()
    if settings["prune"]:
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=settings["startup"], n_warmup_steps=settings["prune_after"]
        )
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction=settings["direction"],
        pruner=pruner,
        load_if_exists=True,
    )
    # Its random numbers start anew with every call of the command: not with those that made the trials there are.
    with _quiet():
        study.sampler = optuna.samplers.TPESampler(
            seed=seed + 1000 * len(study.get_trials(deepcopy=False)),
            n_startup_trials=settings["startup"],
            constant_liar=True,
            multivariate=False,
        )
    return study


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """The settings of each job of a grid.

    Raises:
        ConfigError: an interval or another search, which a grid cannot enumerate.
    """
    parsed = [parse_override(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.input_line}: a grid needs values separated by commas, not an interval; or sweep=optuna"
            )
    return BasicSweeper.split_arguments(parsed, None)[0]


def split_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Settings that are fixed, and the distribution of each that has several values.

    Raises:
        ConfigError: several values of a kind that Optuna has no distribution for.
    """
    fixed, space = [], {}
    for override in map(parse_override, overrides):
        if override.is_sweep_override():
            space[override.key_or_group] = _distribution(override)
        else:
            fixed.append(str(override.input_line))
    return fixed, space


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, text = override.value(), override.input_line
    try:
        if isinstance(sweep, IntervalSweep):
            low, high, log = sweep.start, sweep.end, "log" in sweep.tags
            if low is None or high is None:
                raise ValueError("an interval has two ends")
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(low, high, log=log)
        if isinstance(sweep, RangeSweep):
            numbers = list(sweep.range())
            if not numbers:
                raise ValueError("an empty range")
            if all(isinstance(number, int) for number in numbers):
                return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(sweep.step))
            return FloatDistribution(float(numbers[0]), float(numbers[-1]), step=float(sweep.step))
        if override.is_discrete_sweep():
            return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise ConfigError(f"{text}: {error}; write {SPACE}") from None
    raise ConfigError(f"{text}: not a space that can be searched; write {SPACE}")


def _ends(distribution: Any) -> list[str]:
    if hasattr(distribution, "choices"):
        return [_text(choice) for choice in distribution.choices]
    return list(dict.fromkeys([_text(distribution.low), _text(distribution.high)]))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
