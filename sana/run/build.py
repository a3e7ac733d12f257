"""Building what a checked configuration describes."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sana.run.allow import check_nodes
from sana.run.compose import one_line
from sana.run.error import ConfigError
from sana.run.signature import UnknownTargetError


def build(node: DictConfig | None, name: str, **arguments: Any) -> Any:
    """Call a node's `_target_`, and those inside it, with plain lists and dictionaries; None stays None.

    Args:
        node: from a configuration that passed `sana.run.schema.check`.
        name: of the node, for messages.
        arguments: more arguments of the outermost call.

    Raises:
        ConfigError: a `_target_` may not be built, or a constructor refused its settings or did not find its files; one
            line. Anything else a constructor raises is a defect and leaves as it is.
    """
    if node is None:
        return None
    try:
        check_nodes(OmegaConf.to_container(node, resolve=True))
    except UnknownTargetError as error:
        raise ConfigError(f"{name}: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {one_line(error)}") from error
    try:
        return instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise ConfigError(f"{name}: {one_line(error)}") from error
        if isinstance(cause, ValueError | OSError) or type(cause).__module__.startswith("sana."):
            raise ConfigError(f"{name}: {one_line(cause)}") from error
        raise cause from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {one_line(error)}") from error


def build_all(nodes: DictConfig | None, name: str) -> dict[str, Any]:
    """The nodes of a section by name; those that are null are left out."""
    return {str(key): build(node, f"{name}.{key}") for key, node in (nodes or {}).items() if node is not None}
