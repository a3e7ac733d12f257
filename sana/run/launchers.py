"""How the runs of a sweep are started: here, some at a time with devices of their own, or through a launcher of Hydra.

``hydra/launcher=submitit_slurm`` (hydra-submitit-launcher) makes them tasks of SLURM, ``submitit_local`` tries the same
without a cluster, ``ray`` makes them Ray tasks; their settings are ``hydra.launcher.<key>``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from sana.run.compose import hydra_over_conf
from sana.run.environment import gpus, usable_cores
from sana.run.error import ConfigError
from sana.run.job import ROOT, Job, read_job, run_job, write_job

HERE = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
RAY = "sana.run.ray_launcher.RayLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
ALLOWED = (HERE, RAY, f"{SUBMITIT}.SlurmLauncher", f"{SUBMITIT}.LocalLauncher")

Tell = Callable[[Job], None]


class Launcher(Protocol):
    """Starts runs."""

    def run(self, folder: Path, jobs: Iterator[Job], tell: Tell) -> None:
        """Run all jobs; each is asked for when there is room for it, and told when it has ended."""
        ...


def find_launcher(entry: str, overrides: Sequence[str], parallel: int, devices: int | None) -> Launcher:
    """The launcher of a command line.

    Args:
        entry: "train".
        overrides: ``hydra/launcher=...`` and ``hydra.launcher.key=...``.
        parallel: runs at a time; of Hydra's launchers: runs submitted together.
        devices: GPUs of one run on this machine; None shares all.

    Raises:
        ConfigError: there is no such launcher, it must not be used, or there are too few GPUs.
    """
    with hydra_over_conf() as loader:
        names = loader.get_group_options("hydra/launcher")
        chosen = [text.split("=", 1)[1] for text in overrides if text.lstrip("+").startswith("hydra/launcher=")]
        for name in chosen:
            if name not in names:
                lacking = "; pip install 'sana-lab[sweep]' brings it" if name.startswith("submitit") else ""
                raise ConfigError(f"hydra/launcher={name}: no such launcher ({', '.join(sorted(names))}){lacking}")
        config = loader.load_configuration(entry, [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    target = settings.get("_target_") if isinstance(settings, dict) else None
    if target not in ALLOWED:
        raise ConfigError(f"hydra.launcher._target_: {target} is not one of {', '.join(ALLOWED)}")
    if config.hydra.get("callbacks"):
        raise ConfigError("hydra.callbacks: not used here; callbacks of training go into callback=...")
    if target != HERE:
        return Batches(config, parallel)
    return Slots(parallel, share_devices(parallel, devices))


def share_devices(parallel: int, devices: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each slot; None where nothing has to be said.

    Raises:
        ConfigError: there are fewer GPUs than the runs would use.
    """
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = [name for name in said.split(",") if name] if said is not None else [str(i) for i in range(len(gpus()))]
    if not here or (parallel == 1 and devices is None):
        return [None] * parallel
    each = len(here) // parallel if devices is None else devices
    if each < 1 or each * parallel > len(here):
        raise ConfigError(
            f"sweep.parallel: {parallel} runs with {max(each, 1)} GPU(s) each need more than the {len(here)} there are"
        )
    return [",".join(here[k * each : (k + 1) * each]) for k in range(parallel)]


class Slots:
    """Runs on this machine, as many at a time as there are slots.

    Args:
        parallel: number of slots.
        devices: of each.
    """

    def __init__(self, parallel: int, devices: Sequence[str | None]) -> None:
        self.parallel, self.devices = parallel, list(devices)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()

    def run(self, folder: Path, jobs: Iterator[Job], tell: Tell) -> None:
        """Run all jobs. SIGTERM and ctrl-C end the runs and leave the rest for the next time."""
        free = list(range(self.parallel))[::-1]
        busy: dict[Future[Job], int] = {}

        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        kept = signal.signal(signal.SIGTERM, stop)
        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                try:
                    job = next(jobs, None)
                    while busy or job is not None:
                        while free and job is not None:
                            slot = free.pop()
                            job = write_job(folder, replace(job, devices=self.devices[slot]))
                            print(f"run {job.number} starts: {job.settings()}", flush=True)
                            busy[pool.submit(self._one, folder, job)] = slot
                            job = next(jobs, None) if free else None
                        for future in wait(busy, return_when=FIRST_COMPLETED).done:
                            free.append(busy.pop(future))
                            tell(future.result())
                        if job is None:
                            job = next(jobs, None)
                except BaseException:
                    self._end()
                    raise
        finally:
            signal.signal(signal.SIGTERM, kept)

    def _one(self, folder: Path, job: Job) -> Job:
        """Start the process that watches a run, and wait for it."""
        environment = dict(os.environ)
        # Without an installed package the watcher has to find this one, wherever it is called from.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        if self.parallel > 1 and job.devices is None:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.parallel)))
        command = [sys.executable, "-m", "sana.run.job", str(folder), str(job.number)]
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        self._processes.add(process)
        if self._stopped.is_set():
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._processes.discard(process)
        ended = read_job(folder, job.number)
        if ended is None or ended.status in ("running", "waiting"):
            reason = f"the process that watched it ended with code {code}"
            return write_job(folder, replace(job, status="killed", reason=reason))
        return ended

    def _end(self) -> None:
        self._stopped.set()
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


class Batches:
    """Runs through a launcher of Hydra: some are submitted together, and all are waited for.

    Args:
        config: composed for a multirun; its `hydra.launcher` says which.
        size: runs submitted together. A search learns from a batch before it proposes the next.
    """

    def __init__(self, config: DictConfig, size: int) -> None:
        self.config, self.size = config, size

    def run(self, folder: Path, jobs: Iterator[Job], tell: Tell) -> None:
        """Run all jobs, batch by batch."""
        while batch := [job for _, job in zip(range(self.size), jobs, strict=False)]:
            for job in batch:
                print(f"run {job.number} is submitted: {job.settings()}", flush=True)
            self._submit(folder, batch)
            for job in batch:
                ended = read_job(folder, job.number)
                if ended is None or ended.status in ("running", "waiting"):
                    ended = write_job(folder, replace(job, status="killed", reason="its task left no record"))
                tell(ended)

    def _submit(self, folder: Path, batch: Sequence[Job]) -> None:
        with hydra_over_conf() as loader:
            config = self.config.copy()
            with open_dict(config):
                config.hydra.sweep.dir, config.hydra.sweep.subdir = str(folder), "."
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            arguments = {"hydra_context": context, "task_function": task, "config": config}
            if config.hydra.launcher._target_ == RAY:
                launcher = instantiate(config.hydra.launcher)
                launcher.setup(**arguments)
            else:
                launcher = Plugins.instance().instantiate_launcher(**arguments)
            # A task composes anew, so what `config` says of Hydra's own directories is said again.
            place = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=."]
            texts = [[*job.overrides, *place, f"run.dir={folder / str(job.number)}"] for job in batch]
            try:
                launcher.launch(texts, initial_job_idx=batch[0].number)
            except Exception as error:
                # What a task did is in its record; this is about the launcher: no cluster, a lost task.
                if all((read_job(folder, job.number) or job).status == "waiting" for job in batch):
                    raise ConfigError(f"hydra.launcher: {type(error).__name__}: {error}") from error


def task(config: DictConfig) -> str:
    """What a launcher's task does, wherever it runs: one job of a sweep, found by its directory."""
    directory = next(str(o).split("=", 1)[1] for o in HydraConfig.get().overrides.task if str(o).startswith("run.dir="))
    path = Path(directory)
    return run_job(path.parent, int(path.name)).status
