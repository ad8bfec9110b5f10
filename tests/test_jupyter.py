"""The steps in a notebook that a real Jupyter kernel runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .toy import Toy

CELLS = (
    "import calib; calib.open_cache('train')",
    "head = calib.fit_head('crt', 'train', 'models/crt/1', steps=20, rows_per_step=32); head",
    "calib.judge_head(head, 'val')",
    "study = calib.tune_heads('train', 'val', 'study', '2', methods=('crt', 'natural'), steps=4); study",
    "calib.compare_heads(['models/crt/1', study.head], 'val', replicates=10)",
    "calib.calibrate_head(study.head, 'val', 'models/chosen/1')",
    "calib.load_head('models/nothing/1')",
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ten_lines_show_tables_and_bars(tmp_path: Path) -> None:
    Toy().write(tmp_path / "train")
    Toy(mode="test", most=40, images=20).write(tmp_path / "val")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    client = NotebookClient(notebook, timeout=240, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    *shown, refused = [c.outputs for c in notebook.cells]
    for outputs in shown:
        assert [o.output_type for o in outputs if o.output_type != "stream"] == ["execute_result"], outputs
    html = [next(o for o in outputs if o.output_type == "execute_result").data["text/html"] for outputs in shown]
    assert all("<table>" in h for h in html)
    assert "crt" in html[1] and "AP" in html[2] and "natural" in html[3] and "AP" in html[4] and "D-ECE" in html[5]
    bars = "".join(o.text for o in shown[1] if o.output_type == "stream")
    assert "100%" in bars and "20/20" in bars
    error = next(o for o in refused if o.output_type == "error")
    assert error.ename == "MissingFileError" and "models/nothing/1" in error.evalue
