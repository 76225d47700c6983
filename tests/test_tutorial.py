"""tutorial.ipynb: committed with its figures, and a run of it today tells the same numbers."""
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

import rectify

PATH = rectify.HERE / "tutorial.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def printed(notebook, name):
    """The JSON that the notebook printed as `name = {...}`."""
    texts = [o.text for cell in notebook.cells if cell.cell_type == "code"
             for o in cell.outputs if o.output_type == "stream"]
    return json.loads(re.search(rf"^{name} = (.*)$", "".join(texts), re.M)[1])


def test_it_is_committed_with_its_figures(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    figures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 15 and PATH.stat().st_size < 4e6
    assert max(len(cell.source.splitlines()) for cell in code) <= 12
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]


def test_it_runs_and_tells_the_same_numbers(notebook, tmp_path):
    """In an empty folder beside the scripts, from top to bottom, within the tolerances that it
    states.
    """
    for name in ("rectify.py", "distill.py", "export.py", "README.md"):
        (tmp_path / name).symlink_to(rectify.HERE / name)
    told, tolerance = printed(notebook, "headline"), printed(notebook, "tolerance")
    NotebookClient(notebook, timeout=1800, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    now = printed(notebook, "headline")
    assert now.keys() == told.keys() == tolerance.keys()
    for name, value in told.items():
        assert abs(now[name] - value) <= tolerance[name], (
            f"{name}: {now[name]} today, {value} in the notebook")
