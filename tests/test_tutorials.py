"""The tutorials of the documentation run from start to end, and show pictures."""

from pathlib import Path

import pytest

TUTORIALS = sorted(Path(__file__).parent.parent.glob("docs/tutorials/*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path):
    jupytext = pytest.importorskip("jupytext", reason="the extra docs brings it")
    nbclient = pytest.importorskip("nbclient", reason="the extra docs brings it")
    pytest.importorskip("ipykernel", reason="the extra docs brings it")
    notebook = jupytext.read(path)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=400, resources=where).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert "image/png" in shown
