"""Which recipe of conf/ weights belong to, and the training configuration that follows.

Tensors tell widths, depth and norms. Heads, flow shift, position and size are told by a header, a diffusers
configuration, a published name, or the user; else by the experiments of conf/ that the tensors fit, if these agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sana.checkpoint.diffusers_config import RATIO, hidden_ratio
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.header import read_header
from sana.checkpoint.published import RELEASES
from sana.checkpoint.source import Source
from sana.run.compose import Composed, compose
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.schema import check

KINDS = ("image/", "sprint/student_", "sprint/teacher_")  # of experiments: those of one-frame velocity networks
NAMED = "sprint/teacher_"  # taken where something names them: by their tensors alone they would be SANA-1.5
DECIDING = ("heads", "head_dim", "position", "interpolation", "time_scale", "flow_shift", "size")
STRUCTURE = ("width", "hidden", "text_channels", "in_channels", "patch")
NORMS = ("self_norm", "cross_norm", "text_norm", "guidance")
WORDS = ("position", "interpolation", "base", "size", "heads", "time_scale")
NETWORK = {
    "sana.network.sana.Sana", "sana.nn.block.Block", "sana.nn.linear_attention.LinearAttention",
    "sana.nn.cross_attention.CrossAttention", "sana.nn.mix_ffn.MixFFN", "sana.nn.embed.SinCos2d",
}  # fmt: skip


def facts_of(config: Mapping[str, Any], name: str | None = None) -> Facts:
    """The facts that a resolved training configuration states.

    Args:
        config: at least `model` and `size`; `timestep` for the flow shift.
        name: of the experiment.

    Raises:
        ConfigError: its network is none that the published layouts have.
    """
    net = config["model"].get("network")
    if not isinstance(net, Mapping) or not _is_plain(net):
        raise ConfigError("the recipe's network has parts that no published layout has names for")
    block = net["blocks"][0]
    mixer, cross = block["mixer"], block["cross"]
    norms, other = bool(mixer.get("qk_norm", False)), bool(cross.get("qk_norm", False))
    guidance = bool(net.get("guidance_embed", False))
    position, shift = net.get("position"), (config.get("timestep") or {}).get("shift")
    ratio = _ratio(config["model"].get("autoencoder"))
    patch = net.get("patch", 1)
    return Facts(
        family="sprint" if guidance else "sana15" if norms or other else "sana",
        depth=net["depth"],
        width=net["width"],
        hidden=int(block["ffn"].get("ratio", 2.5) * net["width"]),
        in_channels=net["in_channels"],
        patch=patch,
        text_channels=net["text_channels"],
        self_norm=norms,
        cross_norm=other,
        text_norm=net.get("text_norm", 0.01) is not None,
        guidance=guidance,
        base=None if ratio is None else config["size"] // ratio // patch,
        head_dim=mixer.get("head_dim", 32),
        heads=cross["heads"],
        position=position is not None,
        interpolation=None if position is None else float(position.get("interpolation", 1.0)),
        guidance_scale=0.1 if guidance else None,
        time_scale=float(net.get("time_scale", 1000.0)),
        size=config["size"],
        ratio=ratio,
        flow_shift=None if shift is None else float(shift),
        recipe=name,
    )


def match(source: Source, recipe: str | None = None) -> tuple[Facts, Composed, tuple[str, ...]]:
    """All facts of weights, the training configuration that builds what they belong to, and what the user should know.

    What is trusted, in this order: tensors; a header, sidecar or configuration that came with them; `recipe`; the name
    of a published file; the experiments of conf/ that fit.

    Args:
        source: opened weights.
        recipe: experiment of conf/ to take what the tensors do not tell from, such as "image/sana_600m_512px".

    Raises:
        ConfigError: no such recipe, the tensors contradict it, none fits, or several fit that differ.
    """
    facts, where, notes = source.facts, source.path, source.notes
    release = None if recipe or facts.release is None else RELEASES.get(facts.release.lower())
    if release is not None:
        facts = replace(
            facts,
            recipe=facts.recipe or release.recipe,
            size=facts.size or release.size,
            time_scale=release.time_scale,
            flow_shift=None if release.recipe else facts.flow_shift,  # diffusers' converter writes 3 for most sizes
        )
    name = recipe or facts.recipe
    if recipe is None and name not in _experiments() and _told(facts):
        name = None  # of another checkout; but a sidecar or header says all that the recipe would
    if name is not None:
        known = _experiments().get(name) or _experiments().get(KINDS[0] + name)
        if known is None:
            raise ConfigError(f"{where}: there is no recipe {name}; recipes: {', '.join(_experiments())}")
        facts = replace(facts, base=None)  # of a table that is computed anew, as the recipe says
        _agree(facts, known, where)
    else:
        known = _only(facts, where)
        if facts.flow_shift == 3.0 and known.flow_shift not in (None, 3.0) and source.layout == "diffusers":
            shift = f"{known.flow_shift:g}"
            notes += (
                "its scheduler says flow shift 3, as diffusers' converter writes for every size below 4096; "
                f"{known.recipe} was trained with {shift}: timestep.shift={shift} draws with that",
            )
    whole = _filled(facts, known)
    return whole, _composed(whole, known, source), notes


def _composed(facts: Facts, known: Facts, source: Source) -> Composed:
    """The known recipe with every setting that the facts say otherwise."""
    overrides = [f"experiment={known.recipe}"] if known.recipe else ["model=sana_600m"]
    settings = {
        "in_channels": "network.in_channels", "width": "network.width", "depth": "network.depth",
        "patch": "network.patch", "text_channels": "network.text_channels", "self_norm": "block.mixer.qk_norm",
        "head_dim": "block.mixer.head_dim", "cross_norm": "block.cross.qk_norm", "heads": "block.cross.heads",
        "guidance": "network.guidance_embed", "time_scale": "network.time_scale", "size": "size",
        "flow_shift": "timestep.shift",
    }  # fmt: skip
    for name, key in settings.items():
        value = getattr(facts, name)
        if value is not None and value != getattr(known, name):
            overrides.append(f"{key}={str(value).lower()}")
    if facts.hidden != int(2.5 * facts.width):
        overrides.append(f"block.ffn.ratio={hidden_ratio(facts)!r}")
    if facts.time_scale is not None and facts.time_scale <= 1:
        overrides.append("network.floor_time=false")
    if not facts.text_norm:
        overrides.append("network.text_norm=null")
    if not facts.position and known.position:
        overrides.append("network.position=null")
    elif facts.position and (facts.base, facts.interpolation, True) != (
        known.base,
        known.interpolation,
        known.position,
    ):
        overrides.append(
            "network.position={_target_:sana.nn.embed.SinCos2d,_partial_:true,"
            f"base:{facts.base},interpolation:{facts.interpolation}}}"
        )
    parts = source.pipeline
    if parts is not None and (parts / "text_encoder").is_dir():
        # Drawn as diffusers draws: it lower-cases and strips, and the null prompt keeps its own mask.
        overrides += [f"encoder.text.path='{_quoted(parts)}'", "encoder.text.lowercase=true", "encoder.text.strip=true"]
        overrides.append("model.null_mask=own")
    composed = compose("train", overrides)
    if parts is not None and (parts / "vae").is_dir():
        node = {"_target_": "sana.model.foreign.autoencoder", "folder": str(parts / "vae")}
        OmegaConf.set_struct(composed.config, False)
        composed.config.encoder.autoencoder = OmegaConf.create(node)
    check(composed)
    return composed


def _filled(facts: Facts, known: Facts) -> Facts:
    """Facts with what they leave open taken from a recipe."""
    own = facts.told()
    ratio, patch = facts.ratio or known.ratio or RATIO, facts.patch or known.patch or 1
    if facts.size is not None and facts.base is None:
        own["base"] = facts.size // ratio // patch
    if facts.size is None and facts.base is not None:
        own["size"] = facts.base * ratio * patch
    if facts.guidance and facts.time_scale is None:
        own["time_scale"] = 1.0
    filled = replace(known, **own)
    same = all(getattr(filled, name) == getattr(known, name) for name in (*STRUCTURE, *NORMS, "time_scale"))
    return replace(
        filled,
        recipe=known.recipe if same else None,
        interpolation=(filled.interpolation or 1.0) if filled.position else None,
        guidance_scale=(filled.guidance_scale or 0.1) if filled.guidance else None,
    )


def _agree(facts: Facts, known: Facts, where: Path) -> None:
    """Refuse a recipe whose network is another. Another depth is a pruned or grown variant, another width is not."""
    names = (*STRUCTURE, *NORMS, "heads", "head_dim")
    pairs = {name: (getattr(facts, name), getattr(known, name)) for name in names}
    wrong = [
        f"{name} is {mine} in the file, {theirs} in the recipe"
        for name, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None and mine != theirs
    ]
    if wrong:
        raise ConfigError(f"{where}: does not fit the recipe {known.recipe}: {'; '.join(wrong)}")


def _only(facts: Facts, where: Path) -> Facts:
    """The recipe that the facts fit: the only one, or one of several that say the same."""
    known_by_tensors = [known for name, known in _experiments().items() if not name.startswith(NAMED)]
    exact = [known for known in known_by_tensors if _fits(facts, known, (*STRUCTURE, *NORMS))]
    pool = exact or [known for known in known_by_tensors if _fits(facts, known, STRUCTURE)]
    if _told(facts):
        # A configuration came along and says everything; a recipe only lends the settings of training.
        fitting = [known for known in exact if _fits(facts, known, WORDS)]
        return next((known for known in fitting if known.depth == facts.depth), fitting[0] if fitting else _blank())
    if not pool:
        raise ConfigError(
            f"{where}: no recipe of conf/experiment/image has width {facts.width} with {facts.hidden} hidden and "
            f"{facts.text_channels} text channels, and tensors do not tell the number of heads; give recipe=NAME with "
            f'a recipe of your own, or write {{"heads": ..., "size": ..., "flow_shift": ...}} into {_sidecar(where)}'
        )
    if not exact and not facts.guidance and facts.time_scale is None:
        raise ConfigError(
            f"{where}: has q/k norms at width {facts.width}; the teachers of Sprint have them and see t, a SANA-1.5 "
            f'would see 1000 t, and tensors do not tell; write {{"time_scale": 1}} or 1000 into {_sidecar(where)}'
        )
    fitting = [known for known in pool if _fits(facts, known, WORDS)]
    fitting = fitting or [known for known in pool if _fits(facts, known, WORDS[:-1])]  # of Sprint: t itself, not 1000 t
    if not fitting:
        raise ConfigError(
            f"{where}: the recipes of its width ({', '.join(str(known.recipe) for known in pool)}) have other sizes "
            f"(its position table is {facts.base}x{facts.base}); give recipe=NAME"
        )
    alike = [known for known in fitting if known.depth == facts.depth] or fitting
    answers = {tuple(getattr(_filled(facts, known), name) for name in DECIDING) for known in alike}
    if len(answers) > 1:
        differ = [name for i, name in enumerate(DECIDING) if len({answer[i] for answer in answers}) > 1]
        names = ", ".join(str(known.recipe) for known in alike)
        raise ConfigError(
            f"{where}: its tensors fit {names}, which differ in {', '.join(differ)}; say which with recipe=NAME "
            f'(convert_checkpoint.py: --recipe NAME), or write {{"recipe": NAME}} into {_sidecar(where)}'
        )
    return alike[0]


def _told(facts: Facts) -> bool:
    """Whether nothing is left open that only a recipe could tell."""
    return facts.heads is not None and facts.size is not None and (facts.flow_shift is not None or facts.guidance)


def _fits(facts: Facts, known: Facts, names: tuple[str, ...]) -> bool:
    """Whether two sets of facts agree wherever both say something."""
    pairs = [(getattr(facts, name), getattr(known, name)) for name in names]
    return all(mine == theirs for mine, theirs in pairs if mine is not None and theirs is not None)


@cache
def _experiments() -> dict[str, Facts]:
    """Facts of every experiment whose network could have been published."""
    found = {}
    for name in list_options("experiment"):
        if name.startswith(KINDS):
            try:
                found[name] = facts_of(compose("train", [f"experiment={name}"]).resolved, name)
            except (ConfigError, KeyError):
                continue  # an experiment with a network of its own
    return found


def _blank() -> Facts:
    """The recipe that lends training settings where none fits."""
    return facts_of(compose("train", ["model=sana_600m"]).resolved)


def _is_plain(node: Any) -> bool:
    """Whether a network is made only of parts that published layouts have names for, all blocks alike."""
    if isinstance(node, Mapping):
        blocks = node.get("blocks")
        alike = not isinstance(blocks, list) or all(block == blocks[0] for block in blocks)
        return alike and node.get("_target_", next(iter(NETWORK))) in NETWORK and all(map(_is_plain, node.values()))
    return all(map(_is_plain, node)) if isinstance(node, list) else True


def _ratio(autoencoder: Any) -> int | None:
    """Pixels per latent pixel of an autoencoder's node, None where it is not known without building it."""
    if not isinstance(autoencoder, Mapping):
        return None
    widths = autoencoder.get("encoder_widths")
    if widths is None and "path" in autoencoder:
        try:
            widths = json.loads(read_header(autoencoder["path"]).metadata["config"])["encoder_widths"]
        except (CheckpointError, ValueError, KeyError):
            return None
    return 2 ** (len(widths) - 1) if isinstance(widths, list) else None


def _sidecar(where: Path) -> str:
    return str(where / "sana.json") if where.is_dir() else f"{where.name}.json"


def _quoted(path: Path) -> str:
    return str(path.resolve()).replace("\\", "\\\\").replace("'", "\\'")
