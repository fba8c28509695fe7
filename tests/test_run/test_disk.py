"""What a run takes on the disk."""

import pytest
import torch

from eggroll.run import disk


@pytest.fixture
def saved(five):
    for generation in (4, 5):
        five.save_checkpoint(generation, {"w": torch.zeros(1000)}, {})
    return five


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_large_checkpoints_of_a_finished_run_are_thinned_out(saved, monkeypatch):
    disk.thin_checkpoints(saved)
    assert names(saved) == ["generation-000004", "generation-000005"]  # small ones cost nothing
    monkeypatch.setattr(disk, "LARGE", 8000)
    disk.thin_checkpoints(saved)
    assert names(saved) == ["generation-000005"]
    disk.thin_checkpoints(saved)
    assert saved.latest_checkpoint().generation == 5


def test_a_damaged_newest_checkpoint_does_not_cost_the_other(saved, monkeypatch):
    monkeypatch.setattr(disk, "LARGE", 0)
    (file,) = (saved.checkpoints / "generation-000005").glob("*.safetensors")
    file.write_bytes(b"short")
    disk.thin_checkpoints(saved)
    assert names(saved) == ["generation-000004", "generation-000005"]


def test_bytes(saved, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/big").write_bytes(bytes(10**6))
    (saved.path / "link").symlink_to(tmp_path / "elsewhere")
    assert 8000 < disk.bytes_of(saved.checkpoints) < disk.bytes_of(saved.path) < 50_000
    assert [disk.size(count) for count in (1500, 3.44e6, 1.42e9)] == ["2 kB", "3.4 MB", "1.4 GB"]
