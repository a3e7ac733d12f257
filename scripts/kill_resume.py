"""Proof from outside that a killed run loses nothing: real processes, SIGKILL at random moments, bitwise comparison.

    python scripts/kill_resume.py --kills 20 --strategy single
    python scripts/kill_resume.py --kills 20 --strategy fsdp --workers 2
    python scripts/kill_resume.py --warm                # in half the time: see below

A tiny recipe is trained once without interruption, and once more with the whole process group killed again and again,
each time started with the same command (`resume=auto`). The update after which a start is killed is drawn, so that
kills spread over the run; every other one waits for a save to begin. The last line says how many kills there were, how
many steps they cost, and whether parameters, moving average, optimizer states and the list of samples are equal bit
for bit, or what differs first. Exit code 0 if equal, 1 if not or if the run ended before all kills.

Most of the time goes into imports. With --warm this process imports what a run needs, and each start is a fork of it,
with the environment that torchrun would give each rank: real processes and real kills still, but no cold start.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECIPE = [
    "data.count=192", "data.held=16", "data.batch_size=12", "data.validation=4", "data.cache_text=true",
    "network.width=32", "network.depth=2", "block.cross.heads=1", "optimizer=came", "model.clip_norm=0.5",
    "trainer.accelerator=cpu", "trainer.precision=32-true", "callback.samples=null", "callback.validation=null",
    "callback.progress=null", "callback.records.every=1", "callback.bad_samples.every=1",
    "+callback.sample_ids._target_=sana.callback.sample_ids.SampleIds",
]  # fmt: skip
PATIENCE = 600.0  # seconds for one step
WARM = (
    "sana.model.image",
    "sana.model.load",
    "sana.run.begin",
    "sana.run.build",
    "sana.run.compose",
    "sana.data.module",
    "sana.strategy.replicated",
    "sana.strategy.sharded",
    "sana.callback.checkpoints",
    "transformers",
)


class Run(Protocol):
    """A started run, of one process or several in one group."""

    pid: int
    """Also the group's."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        ...


Launch = Callable[[list[str], TextIO], Run]


def main() -> int:
    """Train, kill, compare; 0 if equal."""
    options = parser().parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="kill_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    command = [
        sys.executable, str(ROOT / "train.py"), *RECIPE, f"data.folder={folder / 'data'}", "resume=auto",
        f"trainer.max_steps={options.steps}", f"callback.checkpoints.every={options.every}",
        f"strategy={options.strategy}", f"trainer.devices={options.ranks if options.strategy != 'single' else 1}",
        f"data.num_workers={options.workers}", *options.overrides,
    ]  # fmt: skip
    try:
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            say(start, "the run without interruption")
            launch = warm_launch(options.ranks if options.strategy != "single" else 1) if options.warm else cold_launch
            code = wait(launch([*command, f"run.dir={folder / 'straight'}"], log))
            if code:
                print(f"kill_resume: the run without interruption failed with exit code {code}; see {log.name}")
                return 1
            tormented = [*command, f"run.dir={folder / 'killed'}"]
            lost, kills = torment(tormented, folder / "killed", options, launch, log, start)
        difference = compare(folder / "straight", folder / "killed", options.steps)
        left = len(list((folder / "killed" / "checkpoints").glob("*.tmp")))
        print(
            f"kill_resume: strategy {options.strategy}, {options.workers} workers, {kills} kills, {sum(lost)} steps "
            f"lost (at most {max(lost, default=0)} at once, a save every {options.every}), {left} temporary files "
            f"left, {time.monotonic() - start:.0f} s: {difference or 'equal bit for bit'}"
        )
        if kills < options.kills:
            print(f"kill_resume: the run ended after {kills} of {options.kills} kills: give it more --steps")
        return 1 if difference or left or kills < options.kills else 0
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=5, help="(%(default)s)")
    made.add_argument("--strategy", default="single", help="single, ddp, fsdp or hsdp (%(default)s)")
    made.add_argument("--ranks", type=int, default=2, help="processes of ddp and fsdp (%(default)s)")
    made.add_argument("--workers", type=int, default=0, help="data workers per process (%(default)s)")
    made.add_argument("--steps", type=int, default=60, help="updates of the run (%(default)s)")
    made.add_argument("--every", type=int, default=5, help="updates between saves (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    made.add_argument("--folder", help="keep runs and log here")
    made.add_argument("--warm", action="store_true", help="fork each start from this process, all imports done")
    made.add_argument("overrides", nargs="*", help="more settings of train.py")
    return made


def cold_launch(command: list[str], log: TextIO) -> Run:
    """Start a run in a process group of its own, as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=environment)


def warm_launch(ranks: int) -> Launch:
    """What starts runs as forks of this process, which imports all that they need first."""
    for name in WARM:
        importlib.import_module(name)

    def launch(command: list[str], log: TextIO) -> Run:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log.flush()
        pids: list[int] = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(command, log, rank, ranks, port, pids[0] if pids else 0)
            if rank == 0:
                os.setpgid(pid, pid)  # here as in the child: whichever comes first
            pids.append(pid)
        return Forked(pids)

    return launch


def _be_rank(command: list[str], log: TextIO, rank: int, ranks: int, port: int, group: int) -> None:
    """In a fork: run the script of `command` as one rank, and end without this process's own ending."""
    code = 1
    try:
        os.setpgid(0, group)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.chdir(ROOT)
        if ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"kill_resume_{port}"}
            os.environ.update({name: str(value) for name, value in names.items()})
        sys.argv = command[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """Processes forked as the ranks of one run, the first one leading their group."""

    def __init__(self, pids: list[int]) -> None:
        self.pid, self._left, self._code = pids[0], set(pids), 0

    def _reap(self, options: int) -> int | None:
        for pid in list(self._left):
            found, status = os.waitpid(pid, options)
            if found:
                self._left.remove(pid)
                self._code = self._code or os.waitstatus_to_exitcode(status)
        return None if self._left else self._code

    def poll(self) -> int | None:
        """The first exit code that is not 0, once all have ended."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """The same, waiting for it."""
        return self._reap(0) or 0


def wait(process: Run) -> int:
    """Its exit code; the group goes with this process."""
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def torment(
    command: list[str], run: Path, options: argparse.Namespace, launch: Launch, log: TextIO, start: float
) -> tuple[list[int], int]:
    """Kill and start again until the kills are used up, then let it end; steps lost by each, and kills.

    The update after which a start is killed is drawn so that the kills spread over the whole run.
    """
    draw, lost = random.Random(options.seed), []
    while len(lost) < options.kills:
        saved, aimed = saved_step(run), len(lost) % 2 == 1
        reach = 2 * (options.steps - saved) / (options.kills - len(lost))
        last = len(lost) + 1 == options.kills
        latest = options.steps - (2 if last and not aimed else 2 * options.every)
        target = min(saved + 1 + int(draw.uniform(0.0, reach)), max(latest, saved + 1))
        process = launch(command, log)
        pace = await_step(process, run, target)
        if pace is not None:
            end = time.monotonic() + (PATIENCE if aimed else draw.uniform(0.0, pace))
            while time.monotonic() < end and process.poll() is None:
                if aimed and list((run / "checkpoints").glob("*.tmp")):
                    time.sleep(draw.uniform(0.0, 0.15))
                    break
                time.sleep(0.002)
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if ended and code:
            raise SystemExit(f"kill_resume: a start failed by itself with exit code {code}; see {log.name}")
        if ended:
            break
        lost.append(max(last_step(run) - saved_step(run), 0))
        say(
            start,
            f"kill {len(lost)}{' in a save' if aimed else ''} at update {last_step(run)}, saved {saved_step(run)}",
        )
    code = wait(launch(command, log))  # also after a kill in the last save: it cleans up
    if code:
        raise SystemExit(f"kill_resume: the resumed run failed with exit code {code}; see {log.name}")
    return lost, len(lost)


def await_step(process: Run, run: Path, target: int) -> float | None:
    """Seconds per step, once a row of this start reached an update; None if the process ended before."""
    end, known, begun = time.monotonic() + PATIENCE, modified(run), None
    while process.poll() is None:
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"kill_resume: no step within {PATIENCE:.0f} s")
        if modified(run) != known:
            known, step = modified(run), last_step(run)
            if begun is None or step <= begun[0]:
                begun = (step, time.monotonic())
            if step >= target:
                return (time.monotonic() - begun[1]) / max(step - begun[0], 1) or 0.1
        time.sleep(0.002)
    return None


def modified(run: Path) -> tuple[int, int]:
    """When and to what size metrics.jsonl was last written."""
    try:
        facts = (run / "metrics.jsonl").stat()
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size


def last_step(run: Path) -> int:
    """Update of the last whole row of metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def saved_step(run: Path) -> int:
    """Update of the newest checkpoint."""
    from sana.checkpoint.run_folder import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    return found[0][0] if found else 0


def compare(one: Path, two: Path, step: int) -> str | None:
    """The first difference of two runs at an update, None if all is equal."""
    import torch

    from sana.callback.sample_ids import read_ids
    from sana.checkpoint.run_folder import place_of, read_state, verify
    from sana.checkpoint.sharded import open_pieces

    places = [place_of(run / "checkpoints", step) for run in (one, two)]
    for place in places:
        verify(place)
    facts = [read_state(place) for place in places]
    for key in ("updates", "samples_seen", "ema", "optimizer"):
        if facts[0][key] != facts[1][key]:
            return f"{key} differs: {facts[0][key]} and {facts[1][key]}"
    left, right = (open_pieces(place, ("model", "ema", "optimizer")).tensors() for place in places)
    if left.keys() != right.keys():
        return f"names differ, such as {sorted(left.keys() ^ right.keys())[0]}"
    for name in left:
        if not torch.equal(left[name], right[name]):
            worst = float((left[name].double() - right[name].double()).abs().max())
            return f"{name} differs first, by up to {worst:.3g}"
    ids = [read_ids(run) for run in (one, two)]
    for a, b in zip(*ids, strict=False):
        if a != b:
            return f"samples differ first at update {a[0]}: {a[2][:3]} and {b[2][:3]}"
    return None if len(ids[0]) == len(ids[1]) else f"{len(ids[0])} and {len(ids[1])} micro-batches were trained on"


def say(start: float, what: str) -> None:
    print(f"[{time.monotonic() - start:6.1f} s] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
