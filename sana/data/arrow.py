"""Arrow's arrays of numbers as numpy sees them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def numbers(array: pa.Array) -> np.ndarray:
    """The numbers (n,) of an array, read-only and without a copy.

    What pyarrow's own ``to_numpy`` gives; that imports pandas first, which takes most of a second at every start.

    Raises:
        ValueError: not an array of numbers of one to eight bytes, or one with nulls.
    """
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or array.null_count:
        raise ValueError(f"an array of numbers without nulls is needed, got {kind} with {array.null_count} nulls")
    sign = "f" if pa.types.is_floating(kind) else "i" if pa.types.is_signed_integer(kind) else "u"
    data = array.buffers()[1]
    dtype = np.dtype(f"{sign}{kind.bit_width // 8}")
    if data is None or not len(array):
        found = np.zeros(0, dtype)
    else:
        found = np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)
    found.flags.writeable = False
    return found
