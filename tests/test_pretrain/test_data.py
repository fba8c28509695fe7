"""Streams of bytes: files, folders, arrays, documents, windows, and what is refused."""

import sys
import types

import numpy as np
import pytest

from eggroll.errors import DataError
from eggroll.pretrain import data


def test_a_text_file_gives_its_last_tenth(text_file):
    corpus = data.load_corpus(str(text_file))
    text = text_file.read_bytes()
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == text
    assert len(corpus.validation) == len(text) // 10


def test_an_array_of_bytes(tmp_path):
    stream = np.arange(100, dtype=np.uint8)
    np.save(tmp_path / "a.npy", stream)
    np.save(tmp_path / "b.npy", stream.astype(np.int32))
    first, second = (data.load_corpus(str(tmp_path / name)) for name in ("a.npy", "b.npy"))
    assert np.array_equal(first.train, stream[:90])
    assert np.array_equal(second.validation, stream[90:])


def test_a_folder_with_its_own_parts(tmp_path):
    np.save(tmp_path / "train.npy", np.full(50, 7, np.uint8))
    (tmp_path / "val.txt").write_bytes(b"xyz")
    corpus = data.load_corpus(str(tmp_path))
    assert (len(corpus.train), corpus.validation.tobytes()) == (50, b"xyz")


def test_texts_in_a_folder_are_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"second")
    (folder / "a.txt").write_bytes(b"first")
    (folder / "more" / "c.txt").write_bytes(b"")
    (folder / "readme.md").write_bytes(b"not this")
    corpus = data.load_corpus(str(folder))
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"\0first\0second"
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert not list((tmp_path / "cache").rglob("*.part"))
    (folder / "a.txt").write_bytes(b"changed!")
    assert data.load_corpus(str(folder)).train.tobytes().startswith(b"\0changed!")


def test_a_hub_data_set_is_loaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path))
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"train": [{"text": "one"}, {"text": "two"}], "validation": [{"text": "é"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for _ in range(2):
        corpus = data.load_corpus("minipile")
        assert corpus.train.tobytes() == b"\0one\0two"
        assert corpus.validation.tobytes() == b"\0" + "é".encode()
    assert asked == [("JeanKaddour/minipile", None)]
    data.load_corpus("some/texts:small")
    assert asked[1:] == [("some/texts", "small")]


def test_a_column_of_a_hub_data_set(tmp_path, monkeypatch):
    """Rows without a text and texts that are no Unicode are taken as they come; a missing column is named."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path))
    rows = {"story": ["one", None, "two", "", "three four five six"], "label": [1, 2, 3, 4, 5]}
    table = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: table)
    corpus = data.load_corpus("some/stories", text_column="story")
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"\0one\0two\0three four five six"
    with pytest.raises(DataError, match=r"no column 'text'; its columns are story, label \(choose with --text_column"):
        data.load_corpus("some/stories")
    with pytest.raises(DataError, match="column 'label' holds int, not text"):
        data.load_corpus("some/stories", text_column="label")


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path))

    def load_dataset(name, config):
        raise ConnectionError("no route\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"'minipile' is neither a file .* hub: no route. Without a network, give a .txt"
    ):
        data.load_corpus("minipile")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros((3, 3), np.uint8), "must hold bytes: one dimension"),
        ("a.npy", np.zeros(9), "must hold bytes: one dimension, uint8; it holds float64"),
        ("a.npy", np.array([0, 50256]), "tokens from 0 to 50256; the vocabulary is that of bytes"),
        ("a.npy", np.zeros(0, np.uint8), "is empty"),
        ("a.npy", b"no array", "cannot be read"),
        ("a.txt", b"", "is empty"),
    ],
)
def test_files_that_hold_something_else(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        data.load_corpus(str(tmp_path / name))


def test_what_is_not_there(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no such file or folder \(looked in .*\). --data takes a .txt, .* such as minipile, tinystories",
    ):
        data.load_corpus("nowhere.txt")
    with pytest.raises(DataError, match=r"neither train\.npy nor"):
        data.load_corpus(str(tmp_path))


def test_text_that_is_shorter_than_a_window(text_file):
    corpus = data.load_corpus(str(text_file))
    corpus.check(len(corpus.validation))
    with pytest.raises(DataError, match=r"the validation part of .* has 440 bytes, fewer than one window of 441"):
        corpus.check(441)


def test_windows_are_hashed_from_their_address():
    stream = np.arange(200, dtype=np.uint8)
    starts = data.window_starts(stream, 4000, 11, seed=3, generation=5)
    assert (starts.min(), starts.max()) == (0, 189)
    assert np.array_equal(starts[:7], data.window_starts(stream, 7, 11, seed=3, generation=5))
    assert not np.array_equal(starts, data.window_starts(stream, 4000, 11, seed=3, generation=6))
    assert not np.array_equal(starts, data.window_starts(stream, 4000, 11, seed=4, generation=5))
    rows = data.windows(stream, starts[:3], 11)
    assert np.array_equal(rows, starts[:3, None] + np.arange(11))


def test_the_fingerprint_knows_other_data(text_file, tmp_path):
    first = data.load_corpus(str(text_file)).fingerprint()
    assert first == data.load_corpus(str(text_file)).fingerprint()
    other = tmp_path / "other.txt"
    other.write_bytes(text_file.read_bytes()[:-1] + b"!")
    assert data.load_corpus(str(other)).fingerprint() != first


def test_files_that_hold_nothing_readable(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.npy cannot be read: "):
        data.load_corpus(str(tmp_path / "empty.npy"))
    np.savez(tmp_path / "several.npz", a=np.zeros(3, np.uint8))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(DataError, match=r"several.npy holds several arrays \(.npz\); save the one of bytes"):
        data.load_corpus(str(tmp_path / "several.npy"))
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "folder" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"all 2 .txt files of the folder are empty"):
        data.load_corpus(str(tmp_path / "folder"))
