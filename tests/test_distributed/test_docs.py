"""docs/cluster.md and the job files beside it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "cluster.md").read_text(encoding="utf-8")


def test_the_pages_example_runs():
    """With its workers in this process: what Ray adds is tested beside."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "workers=4)" in block
    names = {}
    exec(compile(block.replace("workers=4)", "workers=2, local=True)"), "docs/cluster.md", "exec"), names)
    history = names["found"].history
    assert history[-1]["fitness_mean"] > history[0]["fitness_mean"]


def test_job_files_are_whole_and_linked():
    yaml = pytest.importorskip("yaml")
    for name in ("slurm.sbatch", "rayjob.yaml"):
        assert f"(cluster/{name})" in PAGE
    job = yaml.safe_load((DOCS / "cluster" / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    constraints = (DOCS.parent / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in constraints
    bash = shutil.which("bash")
    if bash is not None:
        subprocess.run([bash, "-n", str(DOCS / "cluster" / "slurm.sbatch")], check=True)
