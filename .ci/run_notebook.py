"""Runs a notebook in its own folder from top to bottom; a cell that raises fails. Saves nothing."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
client = NotebookClient(
    notebook,
    timeout=240,
    kernel_name="python3",
    resources={"metadata": {"path": str(path.parent)}},
)
try:
    client.execute()
except CellExecutionError as error:
    sys.exit(f"{path}: {error}")
num_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
print(f"{path}: {num_cells} code cells ran")
