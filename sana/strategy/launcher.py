"""Starting the processes of one node, and noticing when one of them is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

GRACE = 30.0  # seconds in which a process has to notice the loss of another by itself
EVERY, SOON = 0.5, 2.0  # seconds between looks, and between the ends of processes of a run that comes to its end


class Launcher(_SubprocessScriptLauncher):
    """As Lightning's, but a lost process ends the others with a line that names it.

    Lightning's own watcher kills the first process at once and says nothing, so the run would end without a record.
    Here the others notice by the failing collective and end their records; who does not within `GRACE` seconds is
    ended.
    """

    @classmethod
    def of(cls, environment: ClusterEnvironment, processes: int, nodes: int) -> Launcher | None:
        """The launcher of a process that starts others or was started by one; None where torchrun or SLURM did."""
        external = environment.creates_processes_externally
        started = "SANA_STARTED_BY" in os.environ
        return cls(environment, processes, nodes) if not external or started else None

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes, then call the function in this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ["SANA_STARTED_BY"] = str(os.getpid())
            self._call_children_scripts()
            watch = self._lost_child
        else:
            watch = self._lost_parent
        ended = threading.Event()
        threading.Thread(target=_watch, args=(watch, ended), daemon=True).start()
        try:
            return function(*args, **kwargs)
        except Exception:
            time.sleep(EVERY)  # a collective fails before the system has said how its partner ended
            if what := watch():
                print(f"error: {what}", file=sys.stderr, flush=True)
            raise
        finally:
            ended.set()

    def _lost_child(self) -> str | None:
        for rank, process in enumerate(self.procs, 1):
            code = process.poll()
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"rank {rank} (process {process.pid}) {how}"
        return None

    def _lost_parent(self) -> str | None:
        parent = int(os.environ["SANA_STARTED_BY"])
        return f"rank 0 (process {parent}) is gone" if os.getppid() != parent else None


def _watch(lost: Callable[[], str | None], ended: threading.Event) -> None:
    while (what := lost()) is None:
        if ended.wait(EVERY):
            return
    if ended.wait(SOON):
        return  # this process was ending as well
    print(f"error: {what}; this process ends too", file=sys.stderr, flush=True)
    if not ended.wait(GRACE):
        os._exit(1)
