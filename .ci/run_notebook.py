"""Runs a notebook in its own folder from top to bottom; a cell that raises fails.

    python .ci/run_notebook.py [--save] NOTEBOOK

Saves nothing unless asked to: `--save` puts the new outputs into the file.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

parser = argparse.ArgumentParser()
parser.add_argument("path", type=Path)
parser.add_argument("--save", action="store_true")
arguments = parser.parse_args()
path = arguments.path

notebook = nbformat.read(path, as_version=4)
metadata = dict(notebook.metadata)
client = NotebookClient(
    notebook,
    timeout=240,
    kernel_name="python3",
    record_timing=False,
    resources={"metadata": {"path": str(path.parent)}},
)
try:
    client.execute()
except CellExecutionError as error:
    raise SystemExit(f"{path}: {error}") from None
if arguments.save:
    # The kernel describes itself there, down to the patch version of Python.
    notebook.metadata = nbformat.from_dict(metadata)
    nbformat.write(notebook, path)
num_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
print(f"{path}: {num_cells} code cells ran")
