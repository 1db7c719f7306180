"""The notebook: it is what its text says, and every cell runs."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/explore.ipynb"
COMMAND = "python -m experiments.docs --notebook"
SECONDS = 240  # for one cell, to end one that hangs; all of them take 30 s on two idle CPU cores


def sources(notebook: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Kind, text and tags of each cell."""
    return [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in notebook["cells"]
    ]


def test_notebook_is_made_from_its_text():
    there = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    made = json.loads(jupytext.writes(jupytext.read(NOTEBOOK.with_suffix(".py")), fmt="ipynb"))
    assert sources(there) == sources(made), f"make it anew: {COMMAND}"


def test_outputs_are_those_of_one_run_small_and_without_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds
    assert not any("widget" in kind for kind in kinds)  # sliders are dead without a kernel
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"/(home|tmp|root|Users)/", text)
    assert len(text) < 500_000


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
