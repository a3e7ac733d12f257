"""Every recipe that conf/ can name composes, passes the schema check, and says what was published."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from sana.run.compose import compose
from sana.run.groups import CONF, groups_of, list_groups, list_options
from sana.run.saved import prepare
from sana.run.schema import check

MODELS, STRATEGIES, EXPERIMENTS = (list_options(group) for group in ("model", "strategy", "experiment"))
IMAGE = [name for name in EXPERIMENTS if name.startswith("image/")]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_every_strategy(model: str, strategy: str) -> None:
    prepare("train", [f"model={model}", f"strategy={strategy}", "quant=none", "dry_run=true"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_with_every_strategy(experiment: str) -> None:
    for strategy in STRATEGIES:
        prepare("train", [f"experiment={experiment}", f"strategy={strategy}", "dry_run=true"])


@pytest.mark.parametrize("group", sorted(set(groups_of("train")) - {"model", "experiment", "strategy"}))
def test_every_option_of_every_group(group: str) -> None:
    for option in list_options(group):
        # Angles have no shift, which the samplers of flows take from the timestep.
        also = ["sampler=scm"] if (group, option) == ("timestep", "trig") else []
        composed = compose("train", [f"{group}={option}", *also])
        if group == "logger":
            composed = compose("train", [f"{group}={option}", "run.dir=somewhere"])
        if group == "start" and option.startswith("grow"):
            composed = compose("train", [f"{group}={option}", "start.kept=3"])
        check(composed)


def test_the_command_of_the_readme_composes() -> None:
    prepare("train", ["model=sana_1600m", "strategy=fsdp", "data=shards", "quant=none", "dry_run=true"])


def test_every_group_can_be_chosen_somewhere() -> None:
    chosen = {group for entry in ("train", "sample", "eval", "sweep") for group in groups_of(entry)}
    assert set(list_groups()) <= chosen


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.relative_to(CONF).as_posix())
def test_every_file_says_what_it_is(path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), "the first line is a comment"
    yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_begins_with_command_paper_and_expected_number(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    head = "\n".join(line for line in text.split("defaults:")[0].splitlines() if line.startswith("#"))
    assert f"python train.py experiment={experiment}" in head
    assert re.search(r"^# Paper: .*arXiv:\d{4}\.\d{5}", head, re.M)
    assert re.search(r"^# Expected\b.*(\d|no number)", head, re.M)


# Spec 6.2, 6.5 and 1.3: file -> optimizer, its rate at batch 256, flow shift, pixels, base and interpolation of the
# position table (2K and 4K), q/k norm.
PUBLISHED = {
    "image/sana_600m_512px": ("sana.optimizer.came.CAME", 1e-4, 3.0, 512, None, False),
    "image/sana_600m_1024px": ("sana.optimizer.came.CAME", 1e-4, 4.0, 1024, None, False),
    "image/sana_1600m_512px": ("sana.optimizer.came.CAME", 1e-4, 3.0, 512, None, False),
    "image/sana_1600m_1024px": ("sana.optimizer.came.CAME", 1e-4, 3.0, 1024, None, False),
    "image/sana_1600m_2048px": ("sana.optimizer.came.CAME", 1e-4, 3.0, 2048, (64, 1.0), False),
    "image/sana_1600m_4096px": ("sana.optimizer.came.CAME", 1e-4, 6.0, 4096, (128, 2.0), False),
    "image/sana15_1600m_1024px": ("sana.optimizer.came.CAME", 2e-5, 3.0, 1024, None, True),
    "image/sana15_4800m_1024px": ("sana.optimizer.came_8bit.CAME8bit", 2e-5, 3.0, 1024, None, True),
}


def test_every_published_stage_has_a_recipe() -> None:
    assert set(PUBLISHED) == set(IMAGE) - {"image/tiny", "image/scenes"}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_hyper_parameters(experiment: str) -> None:
    target, rate, shift, size, table, norm = PUBLISHED[experiment]
    values = compose("train", [f"experiment={experiment}"]).resolved
    optimizer, network, block = values["optimizer"], values["network"], values["block"]
    assert (optimizer["_target_"], optimizer["lr"]["lr"], optimizer["lr"]["base"]) == (target, rate, 256)
    assert optimizer["lr"]["batch"] == values["data"]["batch_size"]
    assert optimizer["lr"]["rule"] == "sqrt"
    assert (optimizer["betas"], optimizer["eps"]) == ([0.9, 0.999, 0.9999], [1e-30, 1e-16])
    assert optimizer["weight_decay"] == 0
    assert (optimizer.get("block", 2048), optimizer.get("min_size", 16384)) == (2048, 16384)
    assert (values["timestep"]["mean"], values["timestep"]["std"], values["timestep"]["steps"]) == (0, 1, 1000)
    assert values["timestep"]["shift"] == values["sampler"]["grid"]["shift"] == shift
    assert values["schedule"] == {"_target_": "sana.optimizer.schedule.constant", "warmup": 2000}
    assert (values["model"]["clip_norm"], values["model"]["caption_dropout"]) == (0.1, 0.1)
    assert values["model"]["null_mask"] == "caption"
    assert (network["text_norm"], network["checkpoint_every"], network["floor_time"]) == (0.01, 1, True)
    assert (network["in_channels"], network["text_channels"], network["time_scale"]) == (32, 2304, 1000)
    position = network["position"]
    assert (None if position is None else (position["base"], position["interpolation"])) == table
    assert (block["mixer"]["qk_norm"], block["cross"]["qk_norm"]) == (norm, norm)
    assert (block["mixer"]["head_dim"], block["ffn"]["ratio"]) == (32, 2.5)
    assert values["size"] == size == values["callback"]["samples"]["size"]
    assert values["encoder"]["text"]["max_tokens"] == 300
    assert values["trainer"]["precision"] == "bf16-mixed"


SPRINT = {"sprint/student_600m": (1152, 28, 16), "sprint/student_1600m": (2240, 20, 20)}


@pytest.mark.parametrize("experiment", SPRINT)
def test_published_hyper_parameters_of_sprint(experiment: str) -> None:
    """Spec A.1, A.4 to A.7."""
    width, depth, heads = SPRINT[experiment]
    values = compose("train", [f"experiment={experiment}"]).resolved
    network, block, model, optimizer = (values[key] for key in ("network", "block", "model", "optimizer"))
    assert (network["width"], network["depth"], block["cross"]["heads"]) == (width, depth, heads)
    assert (network["time_scale"], network["floor_time"], network["guidance_embed"]) == (1.0, False, True)
    assert (block["mixer"]["qk_norm"], block["cross"]["qk_norm"]) == (True, True)
    assert (optimizer["_target_"], optimizer["lr"]["lr"], optimizer["lr"]["rule"]) == (
        "sana.optimizer.came.CAME", 2e-6, None,
    )  # fmt: skip
    assert model["discriminator_optimizer"] == optimizer
    assert (optimizer["betas"], optimizer["eps"]) == ([0.9, 0.999, 0.9999], [1e-30, 1e-16])
    assert (values["schedule"]["warmup"], model["discriminator_schedule"]["warmup"]) == (5000, 0)
    times = [(model[key]["mean"], model[key]["std"]) for key in ("timestep", "fake_timestep", "noise_timestep")]
    assert times == [(0.2, 1.6), (0.2, 1.6), (-0.6, 1.0)]
    assert (model["fake_timestep"]["largest"], model["fake_timestep"]["top"]) == (0.5, 1.5708)
    assert (model["guidance"], model["tangent_warmup"]) == ([4.0, 4.5, 5.0], 2000)  # 4000 steps of both kinds
    assert (model["scm_weight"], model["adversarial_weight"], model["r1_weight"]) == (1.0, 0.5, 0.0)
    assert (model["discriminator"]["layers"], model["discriminator"]["group"]) == ([2, 8, 14, 19], 8)
    assert (model["clip_norm"], model["mismatch"], values["data"]["batch_size"]) == (0.1, True, 8 * 16)
    assert (values["sampler"]["steps"], values["sampler"]["guidance"]) == (2, 4.5)


def test_the_published_adamw_variant() -> None:
    optimizer = compose("train", ["experiment=image/sana_1600m_1024px", "optimizer=adamw"]).resolved["optimizer"]
    assert optimizer["_target_"] == "torch.optim.AdamW"
    assert (optimizer["lr"]["lr"], optimizer["betas"]) == (1e-4, [0.9, 0.999])
    assert (optimizer["eps"], optimizer["weight_decay"]) == (1e-8, 0.01)


def test_the_command_line_wins_over_experiment_and_experiment_over_model() -> None:
    values = compose("train", ["experiment=image/sana_600m_1024px", "optimizer=adamw", "timestep.shift=5"]).resolved
    assert values["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert values["timestep"]["shift"] == 5
    assert values["network"]["width"] == 1152
    assert values["trainer"]["max_steps"] == 52000
    other = compose("train", ["experiment=image/sana_600m_1024px", "network=sana_1600m"]).resolved
    assert (other["network"]["width"], other["block"]["cross"]["heads"]) == (2240, 20)


def test_no_arguments_are_the_tiny_recipe() -> None:
    plain, named = compose("train").resolved, compose("train", ["experiment=image/tiny"]).resolved
    assert plain == named
    assert plain["data"]["_target_"] == "sana.data.module.ScenesData"
    assert plain["block"]["mixer"]["qk_norm"]
    assert plain["block"]["cross"]["qk_norm"]
    assert not plain["network"]["floor_time"]
    assert plain["timestep"]["steps"] is None
    assert plain["model"]["ema_decay"] is not None


def test_the_tiny_network_fits_its_encoders() -> None:
    values = compose("train").resolved
    root = CONF.parent
    numbers = json.loads((root / values["encoder"]["text"]["path"] / "config.json").read_text(encoding="utf-8"))
    assert values["network"]["text_channels"] == numbers["hidden_size"]
    from sana.encoder.autoencoder.dc_ae import load

    autoencoder = load(root / values["encoder"]["autoencoder"]["path"])
    assert values["network"]["in_channels"] == autoencoder.channels
    assert values["size"] % (autoencoder.ratio * values["network"]["patch"]) == 0


def test_growing_and_pruning_are_the_paper_s() -> None:
    """Spec 8.2 and 8.3: 18 of 20 blocks stay and 42 are new, 8-bit CAME; 40 and 20 of 60 stay, 100 updates."""
    grown = compose("train", ["experiment=sana15/grow_1600m_to_4800m"]).resolved
    assert (grown["start"]["kept"], grown["network"]["depth"]) == (18, 60)
    assert grown["start"]["growth"] == {"_target_": "sana.network.growth.Constant", "scale": 0.0}
    assert grown["optimizer"]["_target_"] == "sana.optimizer.came_8bit.CAME8bit"
    assert (grown["optimizer"]["lr"]["lr"], grown["data"]["batch_size"], grown["trainer"]["max_steps"]) == (
        1e-4, 1024, 100_000,
    )  # fmt: skip
    for name, depth in (("3200m", 40), ("1600m", 20)):
        pruned = compose("train", [f"experiment=sana15/prune_4800m_to_{name}"]).resolved
        assert (pruned["network"]["depth"], pruned["trainer"]["max_steps"]) == (depth, 100)
        assert pruned["block"]["mixer"]["qk_norm"]
