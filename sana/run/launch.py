"""The command line of train.py, sample.py, eval.py and some of scripts/: help, compose, check, plan, sweep, run.

Until a configuration has passed its check nothing heavy is imported: help and refusals take a second.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sana.allocator import DRAWING, TRAINING, keep_pages
from sana.checkpoint.error import CheckpointError
from sana.run.error import ConfigError, RunError
from sana.run.groups import groups_of, list_options
from sana.run.torchmetrics_later import later

if TYPE_CHECKING:
    from sana.run.compose import Composed

Task = Callable[["Composed"], int | None]

# Settings that are prose: what stands behind the sign is the text, commas and quotes included.
PROSE = {"sample": ("prompt", "negative"), "importance": ("prompt",), "quantise": ("prompt",)}
FILES = {"importance": "scripts/importance.py", "quantise": "scripts/quantise.py"}  # of other entries it is <entry>.py
QUOTED = re.compile(r"""\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\[.*\]""", re.DOTALL)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
FAILED = 1  # exit code: the run began and failed, and one line says why
REFUSED = 2  # exit code: the run did not start, and one line says why
EXAMPLES = {
    "train": """\
python train.py                                              the tiny recipe on the embedded scenes
python train.py model=sana_1600m strategy=fsdp dry_run=true  what a big run would need, on any machine
python train.py experiment=image/sana_600m_1024px data.folder=/my/shards
python train.py debug=overfit                                one batch again and again (limit, profiler, fdr)
python train.py -m seed=1,2 trainer.max_steps=20             two runs, one after the other
python train.py -m sweep=optuna sweep.trials=20 'optimizer.lr=tag(log,interval(1e-4,1e-1))'
python train.py run.dir=runs/mine resume=auto                start, or go on where it was stopped, however that was
python train.py --rerun runs/tiny/2026-01-31_12-00-00_0      the same settings again""",
    "sample": """\
python sample.py ckpt=runs/tiny/2026-01-31_12-00-00_0 prompt="a red circle left of a blue square" n=8
python sample.py ckpt=... prompt=prompts.txt n=4 out=pictures grid=true      (stop it and run it again: it goes on)
python sample.py ckpt=... prompt=prompts.jsonl best_of=32 keep=4 judge=verifier judge.weights=PATH out=chosen
python sample.py ckpt=... prompt="..." width=1920 height=1080 sampler=flow_euler sampler.pag_scale=2
python sample.py dry_run=true recipe=image/sana_1600m_1024px quant=int8_weight     (what memory it takes, anywhere)""",
    "quantise": """\
python scripts/quantise.py ckpt=scenes quant=int8_weight out=scenes_int8.safetensors
python sample.py ckpt=scenes_int8.safetensors prompt="a red circle left of a blue square"
python scripts/quantise.py ckpt=... quant=svdquant_w4a4 prompt=prompts.txt out=FILE.safetensors""",
    "eval": """\
python eval.py ckpt=runs/tiny/2026-01-31_12-00-00_0
python eval.py ckpt=... metric=[geneval_scenes,fid_scenes] sampler.steps=10
python eval.py images=pictures metadata=evaluation_metadata.jsonl metric=[geneval] metric.geneval.detector.weights=PATH
python eval.py images=pictures reference=photographs features=PATH metric=[fid,kid] output=fid.json""",
    "importance": """\
python scripts/importance.py ckpt=scenes out=importance
python train.py init=scenes start=prune start.importance=importance/importance.json network.depth=4
python scripts/importance.py ckpt=... prompt=prompts.txt sampler.steps=10
torchrun --nproc-per-node 8 scripts/importance.py ckpt=...""",
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
        entry: "train", "sample", "eval", "importance" or "quantise"; conf/<entry>.yaml is composed.
        task: does the work, given a configuration that passed the check.
        arguments: the command line, sys.argv's where None.

    Returns:
        The exit code: 0, 2 for what could not start or be read, 1 for a run that a known fault ended (one line on
            stderr each), 130 after ctrl-C, 75 where a run was told to end and should be started again. Other errors
            are raised.
    """
    try:
        given = read_arguments(entry, sys.argv[1:] if arguments is None else arguments)
        if given.help:
            print(help_text(entry))
            return 0
        return _run(entry, task, given)
    except ConfigError as error:
        print(without_secrets(f"{entry}.py: {error}".replace("\n", f"\n{entry}.py: ")), file=sys.stderr)
        return REFUSED
    except (RunError, CheckpointError) as error:
        print(f"{entry}.py: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def without_secrets(text: str) -> str:
    """The text without values of environment variables whose names say that they are secret."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text


def _run(entry: str, task: Task, given: Arguments) -> int:
    if given.multirun:
        from sana.run.sweep import sweep

        return sweep(entry, given.overrides)
    from sana.run.choose import chosen
    from sana.run.records import is_first_rank
    from sana.run.saved import prepare

    for text in given.overrides:
        if text.lstrip("+").startswith(("sweep=", "sweep.")):
            raise ConfigError(f"{text}: settings of a sweep need -m")
    composed = prepare(entry, given.overrides, rerun=given.rerun)
    why = None
    if entry == "train":
        composed, why = chosen(composed)
    if given.show:
        from sana.run.tree import print_tree

        print_tree(composed)
        return 0
    if entry == "train" and composed.config.dry_run:
        from sana.run.plan import print_plan

        print_plan(composed)
        return 0
    if entry == "sample" and composed.config.dry_run:
        from sana.run.drawing_plan import print_drawing_plan

        print_drawing_plan(composed)
        return 0
    if entry == "train" and is_first_rank():
        from sana.run.plan import switches

        for line in switches(composed):
            print(line, flush=True)
    if why is not None and is_first_rank():
        print(why, flush=True)
    keep_pages(TRAINING if entry == "train" else DRAWING)
    later()
    return task(composed) or 0


def help_text(entry: str) -> str:
    """Usage, examples and the choices of an entry point."""
    lines = [
        f"usage: python {FILES.get(entry, entry + '.py')} [options] [group=option ...] [section.key=value ...]",
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
            "  -m, --multirun   one run per combination of comma-separated values; the same command again goes on",
            "                   with what is missing or failed; sweep=optuna searches, sweep.parallel=2: two at a time",
            "  --rerun DIR      the settings of an earlier run; further settings change them",
        ]
    return "\n".join(lines)
