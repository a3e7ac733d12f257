"""What is ready to run: a command line composed, filled from an earlier run where it refers to one, and
checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.published import RELEASES, warning_for
from sana.checkpoint.record import kind_of_quant, read_quantisation, read_record
from sana.run.compose import Composed, compose, masked_environment, parse_override, show
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.lineage import AUTO
from sana.run.older import current
from sana.run.recipe import training_of
from sana.run.records import is_first_rank
from sana.run.runs import Found, find_checkpoint, find_weights, read_overrides
from sana.run.schema import check
from sana.run.starting import check_start

OF_SCORING = ("images", "metadata", "reference", "features", "allow_small_n", "output", "device", "metric")

# Places that have to be there before the run, unless they are addresses; other data modules make theirs.
FP8_TRAIN = "sana.quant.fp8_train.fp8_train"
EXISTING = {"sana.data.module.ShardsData": "folder"}


def prepare(entry: str, overrides: Sequence[str] = (), *, rerun: str | Path | None = None) -> Composed:
    """Compose and check a command line.

    Args:
        entry: "train", "sample" or "eval".
        overrides: the command line; sampling and evaluation take what it leaves open from the run of `ckpt`.
        rerun: directory of a run whose settings come first.

    Raises:
        ConfigError: whatever the run could not start with, one line per problem.
    """
    changed = [text for text in overrides if not parse_override(text).key_or_group.startswith("run.")]
    if rerun is not None:
        overrides = [*overrides_of(rerun), *overrides]
    composed = compose(entry, overrides)
    planned = composed.config.get("dry_run") is True
    if entry == "eval" and composed.config.get("images") is not None:
        _check_images_only(composed)
    elif entry != "train":
        composed = fill_from_run(composed)
    check(composed, complete=not planned)
    if rerun is not None and not changed:
        _same_as(Path(rerun), composed)
    if entry == "train" and not planned:
        _check_places(composed)
    return composed


def overrides_of(run: str | Path) -> list[str]:
    """The command line of an earlier run without the directory it was told to use.

    Raises:
        ConfigError: no such run.
    """
    if not (Path(run) / "overrides.yaml").is_file():
        raise ConfigError(f"--rerun: {run} is not the directory of a run (no overrides.yaml)")
    return [text for text in read_overrides(run) if parse_override(text).key_or_group != "run.dir"]


def load_saved(run: str | Path) -> Composed:
    """The configuration that a run was started with, checked like a fresh one.

    Raises:
        ConfigError: no config.yaml, or one that this version of the code cannot build.
    """
    path = Path(run) / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a configuration")
    saved = Composed("train", OmegaConf.create(current(content)), ())
    try:
        check(saved)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return saved


def training(found: Found, recipe: str | None = None) -> Composed:
    """The training configuration behind weights: of their run, in the file's header, or the recipe that they fit.

    Args:
        found: from `sana.run.runs.find_weights`.
        recipe: experiment of conf/ to take what published files do not tell from.

    Raises:
        ConfigError: there is none, or none that this version of the code can build.
    """
    if found.of_run:
        return load_saved(found.home)
    try:
        record = read_record(found.path) if found.path.suffix == ".safetensors" else None
        if record is not None and record.recipe is not None:
            release = RELEASES.get(str(record.facts.get("release")).lower())
            if bad := warning_for(release):
                warnings.warn(f"{found.path}: {bad}", stacklevel=2)
            return training_of(record, found.path)
        from sana.checkpoint.source import open_source  # the original files need torch to be read
        from sana.run.match import match

        _, composed, notes = match(open_source(found.path), recipe)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"ckpt: {error}") from None
    for note in notes:
        warnings.warn(f"{found.path}: {note}", stacklevel=2)
    return composed


def training_behind(config: DictConfig) -> Composed:
    """The training configuration behind what a command draws with: of its `ckpt`; or, where only the plan is asked for
    and there are no weights, that of `recipe`, the name of an experiment or of a model in conf/.

    Args:
        config: of sample.py, eval.py or a tool like them.

    Raises:
        ConfigError: neither is given, or one leads nowhere.
    """
    planned, recipe = config.get("dry_run") is True, config.get("recipe")
    if not OmegaConf.is_missing(config, "ckpt") and config.ckpt is not None:
        return training(find_weights(str(config.ckpt)), recipe)
    if planned and recipe is not None:
        for group in ("experiment", "model"):
            if recipe in list_options(group):
                return compose("train", [f"{group}={recipe}"])
        known = ", ".join([*list_options("experiment"), *list_options("model")])
        raise ConfigError(f"recipe: there is no experiment or model {recipe}; there are {known}")
    other = ", or images=FOLDER to score what was made elsewhere" if "images" in config else ""
    other = ", or recipe=NAME to plan without weights" if planned else other
    raise ConfigError(f"ckpt: has to be given: a checkpoint, or the directory of a run{other}")


def fill_from_run(composed: Composed) -> Composed:
    """Sampling and evaluation: take the flow shift, the size and the sampler of training where none is given.

    Raises:
        ConfigError: `ckpt` is not given or leads to no run.
    """
    config = composed.config.copy()
    saved = training_behind(config).config
    if composed.entry != "train" and (composed.resolved.get("quant") or {}).get("_target_") == FP8_TRAIN:
        raise ConfigError("quant: fp8_train is for train.py; its weights are in full precision and need none to draw")
    _check_quantised_once(composed)
    if saved.get("timestep") is None or saved.get("sampler") is None:
        named = "recipe" if OmegaConf.is_missing(config, "ckpt") or config.ckpt is None else "ckpt"
        raise ConfigError(f"{named}: {config[named]} is {saved.model._target_}, which does not draw from prompts")
    OmegaConf.set_struct(config, False)
    if config.get("size") is None:
        config.size = saved.size
    if config.timestep.get("shift") is None:
        config.timestep.shift = saved.timestep.get("shift", 1.0)  # students of Sprint know angles, without a shift
    chosen = config.get("sampler")
    if chosen is None or "_target_" not in chosen:
        config.sampler = OmegaConf.merge(saved.sampler, chosen or {})
        shifted = "shift" in config.sampler.grid
        if shifted and not _set_on_command_line(composed, "sampler.grid.shift"):
            OmegaConf.update(config, "sampler.grid.shift", "${timestep.shift}")
    return Composed(composed.entry, config, composed.overrides)


def _check_quantised_once(composed: Composed) -> None:
    """Refuse to quantise what is.

    Raises:
        ConfigError: the checkpoint is quantised and `quant` is given.
    """
    config = composed.config
    if config.get("quant") is None or OmegaConf.is_missing(config, "ckpt") or config.ckpt is None:
        return
    found = find_weights(str(config.ckpt))
    quant = None if found.of_run else read_quantisation(found.path)
    if quant is not None and composed.entry != "quantise":  # which has a line of its own
        raise ConfigError(f"quant: {config.ckpt} is quantised already ({kind_of_quant(quant)}); leave quant out")


def _check_images_only(composed: Composed) -> None:
    """Scoring alone: what belongs to drawing has no effect, so it is refused.

    Raises:
        ConfigError: such a setting.
    """
    for text in composed.overrides:
        key = parse_override(text).key_or_group
        if key.split(".")[0] not in OF_SCORING:
            raise ConfigError(
                f"{text}: has no effect with images=, where nothing is drawn; settings there: {', '.join(OF_SCORING)}"
            )


def _set_on_command_line(composed: Composed, key: str) -> bool:
    return any(parse_override(text).key_or_group == key for text in composed.overrides)


def _check_trained_in(composed: Composed) -> None:
    """A quantisation for training is one that trains, here and with this recipe.

    Raises:
        ConfigError: it is not.
    """
    origin, target = composed.origin(("quant",)), composed.resolved["model"]["_target_"]
    if composed.resolved["quant"]["_target_"] != FP8_TRAIN:
        raise ConfigError(
            "quant: training is in full precision, or with products in FP8 (quant=fp8_train); quantise for sample.py "
            f"and eval.py ({origin})"
        )
    if target != "sana.model.image.ImageModule":
        raise ConfigError(
            f"quant: fp8_train trains velocities (sana.model.image.ImageModule); {target} takes derivatives or parts "
            f"that have no FP8 products ({origin})"
        )
    if find_spec("torchao") is None:
        raise ConfigError(f"quant: fp8_train needs torchao, which is not installed: pip install torchao ({origin})")


def _check_places(composed: Composed) -> None:
    """Folders and files that the run reads, and the directory that it would write into."""
    values = composed.resolved
    if values.get("quant") is not None:
        _check_trained_in(composed)
    key = EXISTING.get(values["data"]["_target_"])
    if key is not None:
        places = values["data"][key]
        for place in [places] if isinstance(places, str) else places:
            if "://" not in place and not Path(place).exists():
                raise ConfigError(
                    f"data.{key}: {place} does not exist; give a folder of images or of WebDataset shards "
                    f"({composed.origin(('data', key))})"
                )
    if values["resume"] not in (None, AUTO):
        find_checkpoint(values["resume"], key="resume")
    check_start(composed)
    directory = values["run"]["dir"]
    if values["resume"] == AUTO and directory is not None and (Path(directory) / "status.json").is_file():
        return
    if directory is not None and is_first_rank() and Path(directory).is_dir() and any(Path(directory).iterdir()):
        raise ConfigError(f"run.dir: {directory} is in use (not empty); choose another, or leave run.dir out")


def _same_as(run: Path, composed: Composed) -> None:
    """A run that is repeated without changes has the settings of the first, whatever became of conf/ meanwhile."""
    old = current(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    before, now = dict(_flat(old)), dict(_flat(composed.resolved))
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith("run.") and before.get(key) != now.get(key):
            raise ConfigError(
                f"--rerun: conf/ has changed: {key} was {before.get(key)!r} and would be {now.get(key)!r}; "
                f"check out the commit in {run / 'environment.json'}"
            )


def _flat(value: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield show(key), value
        return
    for name, inner in items:
        yield from _flat(inner, (*key, name))


def to_yaml(composed: Composed) -> str:
    """Text of config.yaml: resolved, except what reads the environment."""
    with masked_environment():
        return yaml.safe_dump(composed.resolved, sort_keys=False, allow_unicode=True, width=110)
