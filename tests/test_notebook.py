"""The notebook: it is what its text says, and every cell runs."""

import json
import os
from pathlib import Path
from typing import Any

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/explore.ipynb"
COMMAND = "jupytext --to ipynb --update docs/explore.py"
SECONDS = 240  # for one cell, to end one that hangs; all of them take 30 s on two idle CPU cores


def without_ids(notebook: dict[str, Any]) -> dict[str, Any]:
    """Returns the notebook without the names of its cells, which jupytext draws at random."""
    cells = [{key: value for key, value in cell.items() if key != "id"} for cell in notebook["cells"]]
    return {**notebook, "cells": cells}


def test_notebook_is_made_from_its_text():
    """Without outputs or execution counts, therefore: the text has none."""
    there = without_ids(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    made = without_ids(json.loads(jupytext.writes(jupytext.read(NOTEBOOK.with_suffix(".py")), fmt="ipynb")))
    assert there == made, f"make it anew: {COMMAND}"
    code = [cell for cell in there["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    """As for a reader whose Jupyter runs in docs/; nothing is installed, no cache is left in HOME."""
    import nbclient  # of the `notebook` extra
    import nbformat

    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    (tmp_path / "tmp").mkdir()
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), "PIP_NO_INDEX": "1"}
    for attempt in (1, 2):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",  # jupyter_client starts it with the Python that runs here
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        )
        try:
            client.execute(env=environment)  # raises what a cell raises
            break
        except nbclient.exceptions.CellTimeoutError:
            # On a busy machine an answer about a widget was lost now and then: the kernel idle, the client
            # waiting.
            if attempt == 2:
                raise
    assert not (tmp_path / ".cache/mobilellm_jax").exists()
    # A widget shows what its function raises, and no cell fails for it.
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    shown = [output for widget in widgets for output in widget["state"].get("outputs", ())]
    assert [output["output_type"] for output in shown] == ["display_data"] * 2, shown
