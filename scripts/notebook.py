"""Execute examples/eggroll.ipynb from its first cell to its last and write it back with its outputs.

    python scripts/notebook.py                          about two minutes on two free cores
    EGGROLL_NOTEBOOK_FAST=1 python scripts/notebook.py -o /tmp/out.ipynb    two generations of the language model

What is left out of the file: execution times and counts, so that a second run changes only what was computed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "eggroll.ipynb"
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What would fill a committed notebook with progress bars."""


def execute(notebook: Path = NOTEBOOK, *, cells: int | None = None, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells; what they print to standard error is dropped.

    Args:
        notebook: the file.
        cells: only the first ``cells`` cells; ``None`` for all.
        timeout: seconds that one cell may take.

    Raises:
        CellExecutionError: a cell raised.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    read = nbformat.read(notebook, as_version=4)
    read.cells = read.cells[:cells]
    NotebookClient(read, timeout=timeout, kernel_name="python3", record_timing=False).execute()
    for number, cell in enumerate((cell for cell in read.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return read


def main() -> int:
    """Execute the notebook; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=NOTEBOOK, help="where to write it (default: in place)")
    output = parser.parse_args().output
    start = time.perf_counter()
    try:
        executed = execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    nbformat.write(executed, output)
    print(f"{output}: every cell ran, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
