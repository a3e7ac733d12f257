"""Arrow's numbers as numpy's: the same as pyarrow's own conversion gives, without pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from sana.data.arrow import numbers

KINDS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]


@pytest.mark.parametrize("kind", KINDS + FLOATS, ids=str)
def test_as_pyarrow_has_them(kind: pa.DataType) -> None:
    dtype = kind.to_pandas_dtype()
    array = pa.array(np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype), kind)
    for part in (array, array.slice(3), array.slice(2, 4), array.slice(8), array.slice(0, 0)):
        found, expected = numbers(part), part.to_numpy()
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0


def test_within_a_list_and_without_a_copy() -> None:
    lists = pa.array([[1, 2], [], [3]], pa.large_list(pa.int64()))
    assert numbers(lists.offsets).tolist() == [0, 2, 2, 3]
    assert numbers(lists.slice(1).offsets).tolist() == [2, 2, 3]
    array = pa.array(range(1000), pa.int64())
    assert numbers(array).__array_interface__["data"][0] == array.buffers()[1].address


@pytest.mark.parametrize("array", [pa.array([1, None]), pa.array(["a"]), pa.array([True])], ids=str)
def test_what_has_no_numbers_is_refused(array: pa.Array) -> None:
    with pytest.raises(ValueError, match="without nulls is needed"):
        numbers(array)


def test_pandas_is_not_imported() -> None:
    line = (
        "import sys, pyarrow as pa; from sana.data.arrow import numbers; "
        "numbers(pa.ipc.open_file(pa.BufferReader(sys.stdin.buffer.read())).get_batch(0)['a']); "
        "assert 'pandas' not in sys.modules"
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("a", pa.int64())])) as file:
        file.write_batch(pa.record_batch({"a": pa.array([1, 2])}))
    done = subprocess.run([sys.executable, "-c", line], input=sink.getvalue().to_pybytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
