"""sample.py for tests that call it often."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# One process for all calls, because starting one takes seconds; without the types that the tests check elsewhere.
SERVER = """
import contextlib, io, json, sys
import sample
from sana.run.launch import launch
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = launch("sample", sample.sample, json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def sample():
    """sample.py's command line: arguments -> exit code, standard output, standard error."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(*arguments):
            print(json.dumps(arguments), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()
