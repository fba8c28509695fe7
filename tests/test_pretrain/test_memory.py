"""What a run is about to take is said before it takes it, and refused where it cannot fit."""

import numpy as np
import pytest

from eggroll.errors import MemoryBudgetError
from eggroll.lifecycle import memory
from eggroll.pretrain import PretrainOptions
from eggroll.pretrain.kind import KIND


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 120, 4000).astype(np.uint8).tobytes())
    return str(path)


@pytest.mark.parametrize(("precision", "passes"), [("int8", "20,834 passes of 48"), ("fp32", "3,907 passes of 256")])
def test_a_million_members_are_announced(precision, passes, data, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: (16 * 10**9, 10**9))
    options = PretrainOptions(data=data, population_size=1_000_000, hidden=64, n_layers=2, precision=precision)
    lines = KIND.plan(options).describe(None)
    expected = f"a generation is at most 16,000,000 bytes in {passes} members; about "
    line = next(line for line in lines if line.startswith(expected))
    assert line.endswith(" MB of memory")


@pytest.mark.parametrize(
    "given", [{"population_size": 100_000_000}, {"hidden": 16384}, {"precision": "fp32", "members_per_forward": 10**6}]
)
def test_what_cannot_fit_is_refused_before_anything_is_made(given, data, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: (10**9, 10**9))
    options = PretrainOptions(data=data, **{"population_size": 1_000_000, "hidden": 64, **given})
    message = (
        r"a population of [\d,]+ members of 6 layers x \d+ needs \d+\.\d+ GB \(weights and update .*, scores of all "
        r"members .*\), and this machine has 1\.00 GB\. Ways out: .*a smaller population \(-p\); a smaller model"
    )
    with pytest.raises(MemoryBudgetError, match=message):
        KIND.plan(options)
