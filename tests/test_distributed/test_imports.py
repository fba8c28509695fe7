"""Who loads what: the package costs nothing, and ray is for the files that are named after it."""

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "eggroll"


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_package_loads_neither_torch_nor_ray():
    code = "import sys, eggroll.distributed as d; dir(d); print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    assert printed(code) == "set()\n"


def test_a_pool_loads_no_torch():
    code = "import sys; from eggroll.distributed import LocalPool, RayPool; print({'torch', 'ray'} & set(sys.modules))"
    assert printed(code) == "set()\n"


def test_only_files_named_after_ray_ask_for_it():
    asking = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"""require\(\s*["']ray|import_module\(["']ray""", path.read_text(encoding="utf-8"))
    }
    assert asking == {f"distributed/ray_{name}.py" for name in ("actor", "cluster", "place", "pool")}
