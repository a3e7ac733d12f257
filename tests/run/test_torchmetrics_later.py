"""torchmetrics is whole when it is used, and not imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torchvision", "scipy.signal", "transformers", "torchmetrics.functional")

WHOLE = """
import torchmetrics
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
assert issubclass(torchmetrics.Accuracy, object) and torchmetrics.__version__
assert issubclass(FrechetInceptionDistance, torchmetrics.Metric)
import torchmetrics.metric, torchmetrics.collections
assert torchmetrics.Metric is torchmetrics.metric.Metric
assert torchmetrics.MetricCollection is torchmetrics.collections.MetricCollection
assert set(torchmetrics.__all__) <= set(dir(torchmetrics))
try:
    torchmetrics.nothing_of_this_name
except AttributeError:
    pass
else:
    raise SystemExit("an attribute out of nothing")
"""


def run(*lines: str) -> None:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", ["", "import lightning"])
def test_lightning_does_without_and_a_user_gets_all(before: str) -> None:
    run(
        "import sys",
        "from sana.run.torchmetrics_later import later",
        "later()",
        before,
        f"early = [name for name in {HEAVY!r} if name in sys.modules]",
        "assert not early, early",
        WHOLE,
        "assert 'torchmetrics.functional' in sys.modules",
    )


def test_another_layout_is_imported_as_ever() -> None:
    run(
        "import sana.run.torchmetrics_later as tested",
        "tested.HOMES = {'Metric': 'a_module_that_is_not_there'}",
        "tested.later()",
        "import lightning",
        WHOLE,
    )
