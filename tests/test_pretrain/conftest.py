"""Backends that can be used here, and text that has something to learn in it."""

import pytest
import torch

from eggroll.pretrain import PretrainOptions
from eggroll.pretrain.engines import library


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["c", "torch"])
def backend(request):
    if request.param == "c" and isinstance(library.load(), str):
        pytest.skip(f"no C library here: {library.load()}")
    return request.param


@pytest.fixture
def text_file(tmp_path):
    """4 KiB of a text in which every byte follows from the one before."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcd efgh. " * 400)
    return path


@pytest.fixture
def options(text_file, tmp_path):
    return PretrainOptions(
        data=str(text_file), hidden=16, n_layers=1, population_size=64, generations=6, tokens=6, context=3,
        eval_every=2, checkpoint_every=2, sample_every=2, sample_length=5, momentum_shift=2,
        output=str(tmp_path / "run"),
        noise_table_size=1 << 16, report_to="none",
    )  # fmt: skip
