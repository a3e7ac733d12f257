"""Execute the notebooks from a clean start: python scripts/run_notebooks.py [01 03 ...] [--out FOLDER]

They train their own small runs below FOLDER/runs. FOLDER (a temporary one that is removed, unless given) gets the
executed notebooks and every figure as a PNG; the notebooks in the project stay without outputs. The first error ends
it, with its cell.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
TIMEOUT = 1200  # seconds for one cell


def execute(path: Path, out: Path) -> float:
    """Run one notebook, write it and its figures into a folder, and say how long it took.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: what was executed until then is written all the same.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    begun = time.monotonic()

    def tell(cell: Any, cell_index: int) -> None:
        if sys.stdout.isatty() and cell_index in cells:
            done = cells.index(cell_index)
            spent = time.monotonic() - begun
            print(f"\r{path.stem}: cell {done + 1} of {len(cells)}, {spent:.0f} s", end="\033[K", flush=True)

    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        on_cell_start=tell,
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(ROOT)}},
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, out / path.name)
        save_figures(notebook, out / "figures", path.stem)
        if sys.stdout.isatty():
            print("\r\033[K", end="")
    return time.monotonic() - begun


def save_figures(notebook: Any, folder: Path, stem: str) -> None:
    """Every picture among the outputs, as ``<notebook>_<cell>_<n>.png``."""
    folder.mkdir(exist_ok=True)
    for i, cell in enumerate(notebook.cells):
        pictures = [o["data"]["image/png"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        for n, picture in enumerate(pictures):
            (folder / f"{stem}_{i:02d}_{n}.png").write_bytes(base64.b64decode(picture))


def main() -> int:
    """Run what is asked for; 0, or 1 after the first error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="numbers or beginnings of names, such as 01; none: all")
    parser.add_argument("--out", help="where executed notebooks, figures and runs go")
    given = parser.parse_args()
    paths = sorted(FOLDER.glob("[0-9]*.ipynb"))
    chosen = [path for path in paths if not given.names or any(path.name.startswith(name) for name in given.names)]
    if not chosen:
        print(f"no notebook is named so; there are: {', '.join(path.stem for path in paths)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="notebooks_") as temporary:
        out = Path(given.out or temporary).absolute()
        out.mkdir(parents=True, exist_ok=True)
        os.environ["SANA_NOTEBOOK_RUNS"] = str(out / "runs")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        begun = time.monotonic()
        for n, path in enumerate(chosen, start=1):
            try:
                seconds = execute(path, out)
            except (CellExecutionError, CellTimeoutError, DeadKernelError, AssertionError) as error:
                # nbclient answers some deaths of a kernel with an assertion of its own
                print(f"{path.relative_to(ROOT)}: {str(error) or 'the kernel died'}", file=sys.stderr)
                return 1
            print(f"{path.stem}: {seconds:.0f} s ({n} of {len(chosen)})", flush=True)
        print(f"{len(chosen)} notebooks in {time.monotonic() - begun:.0f} s" + (f", in {out}" if given.out else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
