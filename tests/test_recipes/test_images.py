"""MNIST from a folder, the hub, or scikit-learn's digits in its place; and files that are damaged."""

import gzip
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eggroll.errors import DataError
from eggroll.recipes import images

CPU = torch.device("cpu")


def idx(numbers):
    head = bytes([0, 0, 8, numbers.ndim]) + b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    return head + numbers.tobytes()


@pytest.fixture
def mnist(monkeypatch):
    """A small MNIST: 30 images to train, 5 of them held out, 10 to test; label = first pixel."""
    monkeypatch.setattr(images, "VALIDATION", 5)
    monkeypatch.delenv("EGGROLL_DATA_DIR", raising=False)
    rng = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 30), ("test", 10)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        pixels = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        pixels[:, 0, 0] = labels
        made[part] = (pixels, labels)
    return made


def write(folder, made, *, gzipped):
    folder.mkdir(parents=True, exist_ok=True)
    for part, files in images.FILES.items():
        for file, numbers in zip(files, made[part], strict=True):
            content = idx(numbers)
            if gzipped:
                (folder / f"{file}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / file).write_bytes(content)


def check(found, made):
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [25, 5, 10]
    every = torch.cat([found.train[0], found.validation[0]])
    pixels = every * images.STD + images.MEAN
    np.testing.assert_allclose(pixels.numpy() * 255, made["train"][0], atol=1e-3)
    assert torch.equal(found.test[1], torch.from_numpy(made["test"][1].astype(np.int64)))
    assert (every.dtype, found.train[1].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("place", ["", "mnist"])
def test_a_folder_of_idx_files(tmp_path, mnist, gzipped, place, monkeypatch):
    write(tmp_path / place, mnist, gzipped=gzipped)
    check(images.load(str(tmp_path), CPU), mnist)
    monkeypatch.setenv("EGGROLL_DATA_DIR", str(tmp_path))
    found = images.load(None, CPU)
    check(found, mnist)
    assert (found.name, found.source) == ("MNIST", f"from {tmp_path / place}")


def test_a_minibatch_is_a_function_of_seed_and_generation(tmp_path, mnist):
    write(tmp_path, mnist, gzipped=True)
    found = images.load(str(tmp_path), CPU)
    first, labels = found.minibatch(8, seed=1, generation=2)
    again, _ = found.minibatch(8, seed=1, generation=2)
    other, _ = found.minibatch(8, seed=1, generation=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    restored = (first[:, 0, 0] * images.STD + images.MEAN) * 255
    assert torch.equal(restored.round().long(), labels)


def test_the_hub(mnist, monkeypatch):
    """What stands in here for a hub that cannot be reached gives what ``datasets`` gives: images and labels."""
    asked = []
    split = {part: {"image": list(pixels), "label": list(labels)} for part, (pixels, labels) in mnist.items()}
    fake = SimpleNamespace(load_dataset=lambda name: asked.append(name) or split, config=None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = images.load(None, CPU)
    check(found, mnist)
    assert asked == ["ylecun/mnist"]
    assert (found.name, found.source) == ("MNIST", "from the hub (ylecun/mnist)")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ImportError("datasets"), "is not installed"), (RuntimeError("closed"), r"RuntimeError|cannot be reached")],
)
def test_why_the_hub_did_not_give_it(error, reason, monkeypatch):
    def fails(name, **_):
        raise error

    if isinstance(error, ImportError):
        monkeypatch.setattr(images, "require", fails)
    else:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails, config=None))
    assert re.search(reason, images._from_hub())


def test_a_small_data_set_is_halved(tmp_path, mnist, monkeypatch):
    monkeypatch.setattr(images, "VALIDATION", 5000)
    write(tmp_path, mnist, gzipped=True)
    found = images.load(str(tmp_path), CPU)
    assert (len(found.train[0]), len(found.validation[0])) == (15, 15)


def test_digits_take_the_place_of_mnist_and_it_is_said(monkeypatch):
    monkeypatch.delenv("EGGROLL_DATA_DIR", raising=False)
    monkeypatch.setattr(images, "_from_hub", lambda: "some reason")
    found = images.load(None, CPU)
    assert found.name == "digits"
    assert "of scikit-learn, as no MNIST was found (some reason)" in found.source
    assert [tuple(part[0].shape) for part in (found.train, found.validation, found.test)] == [
        (1200, 28, 28), (197, 28, 28), (400, 28, 28),
    ]  # fmt: skip
    assert found.train[0].min() == pytest.approx(-images.MEAN / images.STD)
    assert set(found.test[1].tolist()) == set(range(10))


def test_files_that_are_not_there_or_damaged(tmp_path, mnist):
    with pytest.raises(
        DataError, match=r"holds no MNIST: expected there or in its folder mnist train-images-idx3-ubyte"
    ):
        images.load(str(tmp_path / "nowhere"), CPU)
    write(tmp_path, mnist, gzipped=True)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    damaged = bytearray(labels.read_bytes())
    damaged[12:20] = bytes(8)
    for content, text in [
        (bytes(damaged), "cannot be read .*; download it again"),
        (gzip.compress(idx(mnist["train"][1][:-1])), "the train set has 30 images and 29 labels"),
        (labels.read_bytes()[:-9], "cannot be read .*; download it again"),
        (gzip.compress(idx(mnist["train"][1])[:-4]), r"is no IDX file of bytes, or is cut short \(34 bytes\)"),
        (gzip.compress(b"<html>"), "is no IDX file"),
    ]:
        labels.write_bytes(content)
        with pytest.raises(DataError, match=text):
            images.load(str(tmp_path), CPU)


def test_the_real_mnist(data_dir):
    found = images.load(str(data_dir), CPU)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [55000, 5000, 10000]
    assert found.train[0].mean().abs() < 0.01
    assert found.train[0].std() == pytest.approx(1.0, abs=0.01)
    assert torch.bincount(found.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
