"""The two scorers, and the words they share, are as they were when the first model was judged.

A change to them makes every number measured before incomparable. To freeze them anew, on purpose and with
an entry in experiments/LOG.md, run

    python tests/metric/test_scenes_frozen.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "sana" / "metric" / "scenes_frozen.json"
FILES = ("sana/scenes.py", "sana/metric/scenes.py", "sana/metric/scenes_second.py")


def digests() -> dict[str, str]:
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in FILES}


def test_scorers_are_frozen() -> None:
    assert digests() == json.loads(FROZEN.read_text()), "a scorer has changed: see the first lines of this file"


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(digests(), indent=1) + "\n")
