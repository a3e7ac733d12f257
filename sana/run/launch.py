"""The command line of train.py, sample.py and eval.py: help, compose, check, plan, sweep, run.

Until a configuration has passed its check nothing heavy is imported: help and refusals take a second.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana.allocator import DRAWING, TRAINING, keep_pages
from sana.run.error import ConfigError
from sana.run.groups import groups_of, list_options

if TYPE_CHECKING:
    from sana.run.compose import Composed

Task = Callable[["Composed"], int | None]

# Settings that are prose: what stands behind the sign is the text, commas and quotes included.
PROSE = {"sample": ("prompt", "negative")}
QUOTED = re.compile(r"""\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\[.*\]""", re.DOTALL)
REFUSED = 2  # exit code: the run did not start, and one line says why
EXAMPLES = {
    "train": """\
python train.py                                              the tiny recipe on the embedded scenes
python train.py model=sana_1600m strategy=fsdp dry_run=true  what a big run would need, on any machine
python train.py experiment=image/sana_600m_1024px data.folder=/my/shards
python train.py -m seed=1,2 trainer.max_steps=20             two runs, one after the other
python train.py --rerun runs/tiny/2026-01-31_12-00-00_0      the same settings again""",
    "sample": """\
python sample.py ckpt=runs/tiny/2026-01-31_12-00-00_0 prompt="a red circle left of a blue square" n=8
python sample.py ckpt=... prompt=prompts.txt n=4 out=pictures grid=true      (stop it and run it again: it goes on)
python sample.py ckpt=... prompt="..." width=1920 height=1080 sampler=flow_euler sampler.pag_scale=2""",
    "eval": """\
python eval.py ckpt=runs/tiny/2026-01-31_12-00-00_0
python eval.py ckpt=... metric=[geneval_scenes,fid_scenes] sampler.steps=10
python eval.py images=pictures metadata=evaluation_metadata.jsonl metric=[geneval] metric.geneval.detector.weights=PATH
python eval.py images=pictures reference=photographs features=PATH metric=[fid,kid] output=fid.json""",
}


@dataclass(frozen=True)
class Arguments:
    """The command line: settings, and what to do with them."""

    overrides: tuple[str, ...]
    help: bool = False
    show: bool = False
    multirun: bool = False
    rerun: str | None = None


def read_arguments(entry: str, arguments: Sequence[str]) -> Arguments:
    """Tell options from settings.

    Raises:
        ConfigError: an option that does not exist.
    """
    overrides, flags, rerun, rest = [], set(), None, list(arguments)
    names = {"-h": "help", "--help": "help", "--cfg": "show", "-m": "multirun", "--multirun": "multirun"}
    if entry != "train":
        names = {name: flag for name, flag in names.items() if flag != "multirun"}
    while rest:
        word = rest.pop(0)
        if word in names:
            flags.add(names[word])
        elif entry == "train" and word.split("=")[0] == "--rerun":
            if "=" not in word and not rest:
                raise ConfigError("--rerun needs the directory of a run")
            rerun = word.split("=", 1)[1] if "=" in word else rest.pop(0)
        elif word.startswith("-"):
            raise ConfigError(f"{word}: no such option; options: {', '.join([*names, '--rerun'])}, settings: key=value")
        else:
            overrides.append(quote_prose(word, PROSE.get(entry, ())))
    return Arguments(tuple(overrides), "help" in flags, "show" in flags, "multirun" in flags, rerun)


def quote_prose(word: str, keys: Sequence[str]) -> str:
    """A setting whose value is prose, quoted so that Hydra takes it as it is; others, and values that are quoted or a
    list already, as they are."""
    key, sign, value = word.partition("=")
    if not sign or key.lstrip("+") not in keys or value in ("", "???"):
        return word
    if QUOTED.fullmatch(value):
        return word
    # Before a quote, and at the end, a backslash counts twice in Hydra's grammar; elsewhere it is itself.
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'{key}="{text}"'


def launch(entry: str, task: Task, arguments: Sequence[str] | None = None) -> int:
    """Run an entry point.

    Args:
        entry: "train", "sample" or "eval"; conf/<entry>.yaml is composed.
        task: does the work, given a configuration that passed the check.
        arguments: the command line, sys.argv's where None.

    Returns:
        The exit code: 0, 2 for what could not start or be read (one line on stderr), 130 after ctrl-C. Other errors are
            raised.
    """
    try:
        given = read_arguments(entry, sys.argv[1:] if arguments is None else arguments)
        if given.help:
            print(help_text(entry))
            return 0
        return _run(entry, task, given)
    except ConfigError as error:
        print(f"{entry}.py: {error}".replace("\n", f"\n{entry}.py: "), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


def _run(entry: str, task: Task, given: Arguments) -> int:
    if given.multirun:
        from sana.run.sweep import sweep

        return sweep(entry, given.overrides)
    from sana.run.saved import prepare

    composed = prepare(entry, given.overrides, rerun=given.rerun)
    if given.show:
        from sana.run.tree import print_tree

        print_tree(composed)
        return 0
    if entry == "train" and composed.config.dry_run:
        from sana.run.plan import print_plan

        print_plan(composed)
        return 0
    keep_pages(TRAINING if entry == "train" else DRAWING)
    return task(composed) or 0


def help_text(entry: str) -> str:
    """Usage, examples and the choices of an entry point."""
    lines = [
        f"usage: python {entry}.py [options] [group=option ...] [section.key=value ...]",
        "",
        "examples:",
    ]
    lines += [f"  {line}" for line in EXAMPLES[entry].splitlines()]
    lines += ["", "groups (* is what is chosen now; a model or experiment may choose otherwise):"]
    for group, chosen in groups_of(entry).items():
        options = [
            f"{o}*" if o == chosen or (isinstance(chosen, list) and o in chosen) else o for o in list_options(group)
        ]
        lines.append(f"  {group + '=':22} {', '.join(options)}")
    lines += [
        "",
        "options:",
        "  -h, --help       this text",
        "  --cfg            print the composed settings and stop",
    ]
    if entry == "train":
        lines += [
            "  -m, --multirun   one run per combination of comma-separated values",
            "  --rerun DIR      the settings of an earlier run; further settings change them",
        ]
    return "\n".join(lines)


def run_job(entry: str, overrides: Sequence[str]) -> int:
    """Run an entry point in a process group of its own and wait for it; ctrl-C is passed on. Returns its exit
    code."""
    script = Path(__file__).resolve().parents[2] / f"{entry}.py"
    process = subprocess.Popen([sys.executable, str(script), *overrides], start_new_session=True)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
