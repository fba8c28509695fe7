"""Checkpoints: bit for bit, whole or absent, and damage is found."""

from __future__ import annotations

import json
import os
import pickletools
import warnings

import pytest
import torch

from eggroll.errors import CheckpointError, RunWriteError
from eggroll.run import DamagedCheckpointWarning, RunDir, checkpoint


def tensor_file(path):
    return next(path.glob("tensors-*.safetensors"))


def truncate(path, count=5):
    data = tensor_file(path).read_bytes()
    tensor_file(path).write_bytes(data[:-count])


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_survives_bit_for_bit(run, dtype):
    width = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    pattern = torch.randint(0, high, (6, 4 * width), dtype=torch.uint8)  # NaN patterns and denormals included
    tensor = pattern.view(dtype)
    run.save_checkpoint(1, {"w": tensor}, {})
    loaded = run.latest_checkpoint().load()["w"]
    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded.view(torch.uint8), pattern)


def test_tied_sliced_transposed_empty_and_scalar_tensors(run):
    base = torch.randn(5, 7)
    tensors = {
        **{"base": base, "tied": base, "part": base[1:3, ::2], "turned": base.T},
        **{"empty": torch.zeros(0, 3), "also_empty": torch.zeros(0), "scalar": torch.tensor(3.5)},
        "trained": torch.nn.Parameter(base[0]),
    }
    run.save_checkpoint(1, tensors, {})
    loaded = run.latest_checkpoint().load()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name


def test_the_manifest_comes_back(run):
    manifest = {"optimizer": {"step": 3, "betas": (0.9, 0.999)}, "best": None, "name": "größer"}
    path = run.save_checkpoint(3, {"w": torch.ones(2)}, manifest)
    found = RunDir.open(run.path).latest_checkpoint()
    assert found.path == path
    assert found.generation == 3
    assert found.manifest == {"optimizer": {"step": 3, "betas": [0.9, 0.999]}, "best": None, "name": "größer"}


def test_the_file_says_which_noise_it_needs_and_what_the_tensors_are(run):
    path = run.save_checkpoint(3, {"w": torch.ones(2)}, {})
    header = json.loads((path / "manifest.json").read_text())
    assert header["noise_version"] == 1
    assert header["tensors"]["bytes"] == tensor_file(path).stat().st_size
    assert len(header["tensors"]["sha256"]) == 64


def test_nothing_is_pickled(run):
    path = run.save_checkpoint(1, {"w": torch.ones(2)}, {"a": [1]})
    for file in path.iterdir():
        with pytest.raises(ValueError, match=r"opcode|exhausted|pickle"):
            list(pickletools.genops(file.read_bytes()))
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]


def test_loaded_tensors_outlive_their_file(run):
    run.save_checkpoint(1, {"w": torch.arange(1000.0)}, {})
    loaded = run.latest_checkpoint().load()["w"]
    loaded += 1
    for generation in (2, 3):
        run.save_checkpoint(generation, {"w": torch.zeros(1000)}, {})
    assert torch.equal(loaded, torch.arange(1000.0) + 1)


def test_the_newest_are_kept(run):
    for generation in range(1, 6):
        run.save_checkpoint(generation, {"w": torch.tensor(generation)}, {}, keep=3)
    assert [generation for generation, _ in checkpoint.found(run.checkpoints)] == [3, 4, 5]
    run.save_checkpoint(6, {"w": torch.tensor(6)}, {})
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["generation-000005", "generation-000006"]


def test_keep_0_is_refused(run):
    with pytest.raises(ValueError, match=r"keep \(=0\) must be at least 1"):
        run.save_checkpoint(1, {}, {}, keep=0)


def test_more_than_six_digits_are_in_order(run):
    for generation in (999_999, 1_000_000):
        run.save_checkpoint(generation, {"w": torch.zeros(1)}, {})
    assert run.latest_checkpoint().generation == 1_000_000


def test_saving_a_generation_again_replaces_it(run):
    for value in (1.0, 2.0):
        path = run.save_checkpoint(4, {"w": torch.tensor(value)}, {"value": value})
    found = run.latest_checkpoint()
    assert found.load()["w"] == 2.0
    assert found.manifest == {"value": 2.0}
    assert len(list(path.iterdir())) == 2


def test_a_truncated_one_is_skipped_with_a_warning_that_says_so(run):
    for generation in (1, 2):
        path = run.save_checkpoint(generation, {"w": torch.full((100,), float(generation))}, {})
    size = tensor_file(path).stat().st_size
    truncate(path)
    with pytest.warns(DamagedCheckpointWarning) as caught:
        found = run.latest_checkpoint()
    assert found.generation == 1
    assert torch.equal(found.load()["w"], torch.ones(100))
    assert str(caught[0].message) == (
        "damaged checkpoints are skipped, the one of generation 1 is used instead:\n"
        f"  - generation-000002: {tensor_file(path).name} is truncated: {size - 5} of {size} bytes"
    )
    assert caught[0].filename == __file__


def test_a_changed_byte_is_found(run):
    run.save_checkpoint(1, {"w": torch.ones(100)}, {})
    path = run.save_checkpoint(2, {"w": torch.ones(100)}, {})
    data = bytearray(tensor_file(path).read_bytes())
    data[-3] ^= 1
    tensor_file(path).write_bytes(data)
    with pytest.warns(DamagedCheckpointWarning, match="was changed after it was written: its SHA-256 is not that"):
        assert run.latest_checkpoint().generation == 1


def test_load_checks_once_more(run):
    path = run.save_checkpoint(2, {"w": torch.ones(100)}, {})
    found = run.latest_checkpoint()
    truncate(path)
    with pytest.raises(CheckpointError, match=r"generation-000002 cannot be used: tensors-.* is truncated.*Remove its"):
        found.load()
    tensor_file(path).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\)"):
        found.load()


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", '{"format": 1}', "null"])
def test_a_damaged_manifest_is_skipped(run, text):
    run.save_checkpoint(1, {"w": torch.ones(1)}, {})
    path = run.save_checkpoint(2, {"w": torch.ones(1)}, {})
    (path / "manifest.json").write_text(text)
    with pytest.warns(DamagedCheckpointWarning, match=r"generation-000002: .*manifest.json is missing or damaged"):
        assert run.latest_checkpoint().generation == 1


def test_if_all_are_damaged_the_error_says_why_for_each_and_names_the_way_out(run):
    paths = [run.save_checkpoint(generation, {"w": torch.ones(9)}, {}) for generation in (1, 2)]
    for path in paths:
        truncate(path)
    with pytest.raises(CheckpointError) as caught:
        run.latest_checkpoint()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"none of the checkpoints in {run.checkpoints} can be used:"
    assert lines[1].startswith("  - generation-000002: tensors-")
    assert lines[2].startswith("  - generation-000001: tensors-")
    assert lines[3] == (
        f"Nothing is lost: move {run.checkpoints} away, and --resume rebuilds the weights from the base model and "
        "updates.jsonl"
    )


def test_a_damaged_one_does_not_count_among_those_that_are_kept(run):
    run.save_checkpoint(1, {"w": torch.ones(9)}, {})
    truncate(run.save_checkpoint(2, {"w": torch.ones(9)}, {}))
    run.save_checkpoint(3, {"w": torch.ones(9)}, {}, keep=2)
    assert [generation for generation, _ in checkpoint.found(run.checkpoints)] == [1, 3]


def test_one_of_another_run_is_not_taken(run, tmp_path):
    other = RunDir.create(tmp_path / "other", {})
    other.save_checkpoint(7, {"w": torch.ones(1)}, {}).rename(run.checkpoints.parent / "moved")
    run.save_checkpoint(1, {"w": torch.zeros(1)}, {})
    (run.path / "moved").rename(run.checkpoints / "generation-000007")
    with pytest.warns(DamagedCheckpointWarning, match="generation-000007 belongs to another run"):
        assert run.latest_checkpoint().generation == 1


def test_one_of_another_noise_version_is_refused(run, monkeypatch):
    run.save_checkpoint(1, {"w": torch.ones(1)}, {})
    monkeypatch.setattr(checkpoint, "NOISE_VERSION", 2)
    with pytest.raises(CheckpointError, match="written with version 1 of the noise specification, this eggroll draws"):
        run.latest_checkpoint()


def test_a_directory_without_manifest_is_no_checkpoint(run):
    (run.checkpoints / "generation-000003").mkdir(parents=True)
    assert run.latest_checkpoint() is None
    run.save_checkpoint(1, {"w": torch.ones(1)}, {})
    assert [path.name for path in run.checkpoints.iterdir()] == ["generation-000001"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_save_leaves_the_one_before_and_no_rest(run, monkeypatch, failing):
    run.save_checkpoint(1, {"w": torch.ones(3)}, {})

    def broken(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, failing, broken)
    with pytest.raises(RunWriteError, match="the disk is full"):
        run.save_checkpoint(2, {"w": torch.zeros(3)}, {})
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.latest_checkpoint().generation == 1
    assert [path.name for path in run.checkpoints.iterdir()] == ["generation-000001"]


def test_the_tensor_file_is_as_readable_as_the_manifest(run):
    path = run.save_checkpoint(1, {"w": torch.ones(3)}, {})
    assert tensor_file(path).stat().st_mode == (path / "manifest.json").stat().st_mode


def test_whether_a_checkpoint_is_there(run, tmp_path):
    assert not run.has_checkpoint(1)
    path = run.save_checkpoint(1, {"w": torch.ones(3)}, {})
    assert run.has_checkpoint(1)
    assert not run.has_checkpoint(2)
    other = RunDir.create(tmp_path / "other", {})
    path.rename(other.save_checkpoint(2, {}, {}).parent / path.name)
    assert not other.has_checkpoint(1)
    path = run.save_checkpoint(1, {"w": torch.ones(3)}, {})
    truncate(path)
    assert not run.has_checkpoint(1)
