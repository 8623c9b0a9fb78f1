"""The notebook of examples/ runs as it stands, and shows what its results are."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does; return the value of an expression at its end."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs_and_its_results_show_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names: dict[str, Any] = {}
    shown = []
    for cell in code_cells():
        value = run_cell("".join(cell["source"]), names)
        shown.append(value)
        stored = [output["data"] for output in cell["outputs"] if "data" in output]
        assert [hasattr(value, "_repr_html_") for _ in stored] == ["text/html" in data for data in stored]
    text = capsys.readouterr().out
    assert {type(value).__name__ for value in shown} >= {"PackResult", "Inspection", "Tensor"}
    assert "did you mean '*.o_proj' (4 tensors)?" in text
    assert "def read_lines(path):" in text
    assert "28 layers on reference" in text
    assert (tmp_path / "packed" / "fp8pack.json").is_file()


def test_the_stored_outputs_are_of_a_run_from_the_top() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result"}
