"""The report of how much each block of a network matters, and its picture. Read without torch.

``importance.json``::

    layout      "importance/1"
    values      BI of each block (`sana.network.importance`), in [0, 2]
    settings    what they depend on: digest of the checkpoint, weights, prompts, sampler, size, seed, precision
    checkpoint  the path that the weights had
    seconds     that it took; commit: of the code
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sana.run.error import ConfigError
from sana.run.records import to_json, write_atomically

LAYOUT = "importance/1"
NAME = "importance.json"
WIDTH, HEIGHT = 900, 320
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 40, 46
PAPER, INK, FAINT, RULE, MARK = (255, 255, 255), (32, 36, 44), (120, 126, 138), (228, 230, 235), (38, 100, 190)
DECADES = 4  # of the picture's axis at most: what lies lower is drawn at its end


@dataclass(frozen=True)
class Importance:
    """What a report says.

    Attributes:
        values: of the blocks in their order.
        settings: what the values depend on, "digest" of the checkpoint among it.
        checkpoint: where the weights were.
        seconds: that it took.
        commit: of the code, None where there is none.
    """

    values: list[float]
    settings: dict[str, Any]
    checkpoint: str = ""
    seconds: float = 0.0
    commit: str | None = None
    layout: str = field(default=LAYOUT)

    @property
    def digest(self) -> str | None:
        """Of the checkpoint."""
        return self.settings.get("digest")


def read_importance(path: str | Path, key: str = "importance") -> Importance:
    """A report.

    Args:
        path: the file, or the folder that it is in.
        key: of the setting, for messages.

    Raises:
        ConfigError: no such file, or no such report.
    """
    path = Path(path).expanduser()
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist; scripts/importance.py ckpt=WEIGHTS writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Importance(**content)
        numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in found.values)
        if found.layout != LAYOUT or not found.values or not numbers or not isinstance(found.settings, dict):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise ConfigError(f"{key}: {path} is no report of scripts/importance.py ({LAYOUT})") from None
    return found


def write_importance(folder: str | Path, found: Importance) -> Path:
    """Write the report and its picture into a folder; the path of the report, which is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = len(found.settings.get("prompts", ()))
    draw_importance(folder / "importance.png", found.values, f"Block importance over {prompts} prompts, all steps")
    write_atomically(folder / NAME, to_json(asdict(found), indent=2) + "\n")
    return folder / NAME


def same_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two sets of settings are the same once they are written."""
    return json.loads(to_json(ours)) == json.loads(to_json(theirs))


def draw_importance(path: str | Path, values: Sequence[float], title: str) -> Path:
    """A picture of the values by block, on a logarithmic axis.

    Values below 1e-4 of the greatest, those of identities among them, are rings at the lower end.
    """
    from PIL import Image, ImageDraw, ImageFont

    from sana.run.sidecar import replace_bytes

    font, large = ImageFont.load_default(13), ImageFont.load_default(16)
    top = 10.0 ** math.ceil(math.log10(max(*values, 1e-12)))
    positive = [v for v in values if v > 0]
    low = max(10.0 ** math.floor(math.log10(min(positive, default=top))), top * 10.0**-DECADES)
    low = min(low, top / 10)
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)

    def px(block: int) -> float:
        return LEFT + (block + 0.5) / len(values) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(top / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 10), title, INK, large)
    for power in range(round(math.log10(low)), round(math.log10(top)) + 1):
        y = py(10.0**power)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], RULE)
        draw.text((LEFT - 8, y), f"{10.0**power:g}", FAINT, font, anchor="rm")
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) / n <= 30)
    radius = max(3, min(6, (WIDTH - LEFT - RIGHT) // (4 * len(values))))
    for block, value in enumerate(values):
        x, y = px(block), py(value)
        below = value < low
        draw.line([(x, HEIGHT - BOTTOM), (x, y)], MARK)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], PAPER if below else MARK, MARK)
        if block % every == 0:
            draw.text((x, HEIGHT - BOTTOM + 8), str(block), FAINT, font, anchor="ma")
    draw.text((WIDTH - RIGHT, HEIGHT - 6), "block", FAINT, font, anchor="rs")
    draw.text((8, 14), "1 - cos", FAINT, font)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    replace_bytes(Path(path), data.getvalue())
    return Path(path)
