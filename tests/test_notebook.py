"""The notebook of the documentation runs from top to bottom."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_shapes.ipynb"


@pytest.mark.filterwarnings("ignore")  # of jupyter, about itself
def test_the_notebook_runs_and_ends_with_a_picture(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient").NotebookClient(
        nbformat.read(NOTEBOOK, as_version=4), timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    outputs = [cell.outputs for cell in client.execute().cells if cell.cell_type == "code"]
    text = "".join(output.get("text", "") for cell in outputs for output in cell)
    assert "layer3" in text
    assert "mIoU 0." in text
    assert any("image/png" in output.get("data", {}) for output in outputs[-1])
