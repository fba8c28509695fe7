"""MNIST for the recipes: from a folder of IDX files, the hub, or in its place the digits that scikit-learn ships."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from eggroll._environment import data_directory
from eggroll._optional import require
from eggroll.errors import DataError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MEAN, STD = 0.1307, 0.3081
HUB = "ylecun/mnist"
VALIDATION = 5000
"""Images of the training set, at its end, that are held out to watch a run; the test set is used once, at the end."""


@dataclass(frozen=True)
class Images:
    """Images ``(count, 28, 28)`` float32, normalised, and labels ``(count,)`` int64, on one device."""

    name: str
    source: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def digest(self) -> str:
        """What tells these images and labels from others."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.validation, *self.test):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def minibatch(self, size: int, seed: int, generation: int) -> tuple[Tensor, Tensor]:
        """A fresh minibatch for a generation: a function of seed and generation, so that runs can be resumed."""
        images, labels = self.train
        index = np.random.default_rng((seed, generation)).integers(0, len(images), size)
        chosen = torch.from_numpy(index).to(images.device)
        return images[chosen], labels[chosen]


def load(data: str | None, device: torch.device) -> Images:
    """MNIST from ``data``, from ``$EGGROLL_DATA_DIR`` (or its folder ``mnist``), from the hub, or digits in its place.

    Raises:
        DataError: ``data`` was given and holds no MNIST, or a file is damaged.
    """
    folder = _folder(data)
    if folder is not None:
        source = f"from {folder}"
        raw = {part: tuple(_read(folder, file) for file in files) for part, files in FILES.items()}
    else:
        found = _from_hub()
        if isinstance(found, str):
            return _digits(device, found)
        source, raw = f"from the hub ({HUB})", found
    for part, (pictures, digits) in raw.items():
        if len(pictures) != len(digits) or len(digits) < 2:
            raise DataError(f"MNIST {source}: the {part} set has {len(pictures)} images and {len(digits)} labels")
    (images, labels), test = (_tensors(*raw[part], device) for part in ("train", "test"))
    held = len(images) - min(VALIDATION, len(images) // 2)
    return Images("MNIST", source, (images[:held], labels[:held]), (images[held:], labels[held:]), test)


def _folder(data: str | None) -> Path | None:
    given = Path(data) if data else data_directory()
    if given is None:
        return None
    for folder in (given, given / "mnist", given / "MNIST" / "raw"):
        if all(_path(folder, file) for files in FILES.values() for file in files):
            return folder
    if data is None:
        return None
    wanted = ", ".join(file for files in FILES.values() for file in files)
    raise DataError(
        f"--data {data} holds no MNIST: expected there or in its folder mnist {wanted}, each as it is or .gz"
    )


def _path(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _read(folder: Path, file: str) -> NDArray[np.uint8]:
    """An IDX file: two zero bytes, the type (8: bytes), the number of dimensions, their sizes, the numbers."""
    path = _path(folder, file)
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); download it again") from error
    dims = content[3] if len(content) > 3 and content[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * dims
    sizes = np.frombuffer(content[4:start], ">u4").astype(int) if len(content) >= start else np.zeros(dims, int)
    numbers = np.frombuffer(content[start:], np.uint8)
    if dims not in (1, 3) or numbers.size != int(np.prod(sizes)):
        raise DataError(f"{path} is no IDX file of bytes, or is cut short ({len(content)} bytes); download it again")
    return numbers.reshape(sizes)


def _from_hub() -> dict[str, tuple[Any, Any]] | str:
    """MNIST from the hub, or why it is not to be had from there."""
    from eggroll.llm.models.hub import offline_if_unreachable

    try:
        datasets = require("datasets", extra="recipes")
        with offline_if_unreachable() as reachable:
            found = datasets.load_dataset(HUB)
        return {
            part: (np.stack([np.asarray(image) for image in found[part]["image"]]), np.asarray(found[part]["label"]))
            for part in FILES
        }
    except ImportError:
        return "the package datasets, which gets it from the hub, is not installed"
    except Exception as error:
        # The hub's client raises errors of many kinds (its own, those of its HTTP library, of files in its cache).
        return f"the hub did not give it ({type(error).__name__})" if reachable else "the hub cannot be reached"


def _tensors(images: NDArray[Any], labels: NDArray[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.array(images)).to(device).float().div_(255).sub_(MEAN).div_(STD)
    return x, torch.from_numpy(np.asarray(labels).astype(np.int64)).to(device)


def _digits(device: torch.device, reason: str) -> Images:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn ships, scaled up: 1,200 to train, 197 validation, 400 test."""
    digits = require("sklearn.datasets", extra="recipes").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = torch.from_numpy(digits.images[order]).float().unsqueeze(1) / 16
    images = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).squeeze(1)
    images = images.sub_(MEAN).div_(STD).to(device)
    labels = torch.from_numpy(digits.target[order].astype(np.int64)).to(device)
    parts = [(images[part], labels[part]) for part in (slice(0, 1200), slice(1200, 1397), slice(1397, None))]
    source = f"of scikit-learn, as no MNIST was found ({reason}): results are not comparable with MNIST's"
    return Images("digits", source, *parts)
