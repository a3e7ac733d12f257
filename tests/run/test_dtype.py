"""fp16 is refused, part by part, with the reason."""

from __future__ import annotations

import pytest

from sana.run.dtype import check_dtypes
from sana.run.error import ConfigError


@pytest.mark.parametrize("precision", ["auto", "bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_what_is_allowed(precision: str, dtype: str) -> None:
    check_dtypes(precision, dtype, dtype)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("16-mixed", "auto", "auto"), "precision: 16-mixed is refused: the sums of linear attention"),
        (("auto", "float16", "auto"), "dtype.autoencoder: float16 is refused: DC-AE's activations overflow"),
        (("auto", "auto", "fp16"), "dtype.text: fp16 is refused: Gemma-2's activations overflow"),
        (("64-true", "auto", "auto"), "precision: '64-true' is not one of auto, bf16-mixed"),
        (("auto", "int8", "auto"), "dtype.autoencoder: 'int8' is not one of auto, bfloat16, float32"),
    ],
)
def test_what_is_refused(values: tuple[str, str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_dtypes(*values)
