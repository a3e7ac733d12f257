"""``hydra/launcher=ray``: runs of a sweep as Ray tasks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sana.run.job import ROOT, run_job


class RayLauncher(Launcher):
    """Each run is one task, on the cluster that RAY_ADDRESS names or on this machine; they share the file system.

    Args:
        cpus: of one run.
        gpus: of one run; Ray sets its CUDA_VISIBLE_DEVICES.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self.cpus, self.gpus = cpus, gpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is needed: a job is found by its directory."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and wait for all of them.

        Args:
            job_overrides: the last setting of each is its run.dir.
            initial_job_idx: not used.
        """
        try:
            import ray
        except ImportError:
            raise ImportError("hydra/launcher=ray needs Ray: pip install 'sana-lab[ray]'") from None
        if not ray.is_initialized():
            paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            here: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, **here)
            if threading.current_thread() is threading.main_thread():  # only there did Ray take it from the sweep
                signal.signal(signal.SIGTERM, handler)
        # In its main thread a worker of Ray can take signals, as `run_job` does.
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_calls=1)(_run)
        folders = [Path(overrides[-1].split("=", 1)[1]) for overrides in job_overrides]
        results = ray.get([remote.remote(str(path.parent), int(path.name)) for path in folders])
        return [_returned(list(o), status) for o, status in zip(job_overrides, results, strict=True)]


def _run(folder: str, number: int) -> str:
    return run_job(Path(folder), number).status


def _returned(overrides: list[str], status: str) -> JobReturn:
    done = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    done.return_value = status
    return done
