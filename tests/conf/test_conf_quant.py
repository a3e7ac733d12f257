"""Every quantisation can be chosen for drawing and evaluation, and says in its file what it leaves alone."""

from __future__ import annotations

import pytest
import yaml

from sana.run.error import ConfigError
from sana.run.groups import CONF, list_options
from sana.run.saved import prepare

FORMATS = [name for name in list_options("quant") if name != "none"]
ACTIVATIONS = {"int8", "fp8", "nvfp4"}


def test_the_formats_are_there() -> None:
    assert ACTIVATIONS | {"int8_weight", "w4a16"} <= set(FORMATS)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS | {"int8_weight", "w4a16"}))
def test_a_format_can_be_chosen_and_changed(name: str) -> None:
    for entry, line in (("sample", ["ckpt=scenes", "prompt=a star"]), ("eval", ["ckpt=scenes"])):
        chosen = prepare(entry, [*line, f"quant={name}"]).resolved["quant"]
        assert chosen["_target_"] == f"sana.quant.{name}.{name}"
        changed = prepare(entry, [*line, f"quant={name}", "+quant.include=[blocks.*]"]).resolved["quant"]
        assert changed["include"] == ["blocks.*"]
        with pytest.raises(ConfigError, match=r"quant\.exlude"):
            prepare(entry, [*line, f"quant={name}", "+quant.exlude=[final.*]"])
    with pytest.raises(ConfigError, match="training is in full precision"):
        prepare("train", [f"quant={name}"])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_what_stays_in_high_precision_is_in_the_file(name: str) -> None:
    """Embeddings of patches, times and captions, the modulation, the last layer, keys and values of the caption."""
    options = yaml.safe_load((CONF / "quant" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert options["exclude"] == ["*_embed.*", "modulation.*", "final.*", "*.cross.kv"]
