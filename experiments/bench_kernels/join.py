"""One results.json of what run.sh has measured: the keys of the blocks first, then the tiny recipe's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = ("blocks", "recipe")


def main(folder: Path) -> None:
    """Join those of NAMES, where they are there, and remove them."""
    results: dict[str, object] = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.exists():
            one = json.loads(path.read_text(encoding="utf-8"))
            numbers = {key: value for key, value in one.items() if isinstance(value, float)}
            results |= numbers | {name: {key: value for key, value in one.items() if key not in numbers}}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name in NAMES:
        (folder / f"{name}.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
