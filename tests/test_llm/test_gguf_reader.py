"""GGUF files are parsed once during a load, and to what gguf itself makes of them."""

import gguf
import numpy as np
import pytest
from tiny_models import write_gguf
from transformers import modeling_gguf_pytorch_utils as names

from eggroll import llm
from eggroll.errors import ModelError
from eggroll.llm.models.gguf_reader import parsed_once


@pytest.fixture
def path(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def write_fields(path):
    """A file without tensors, with a field of every kind."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("a.strings", ["", "é", "a b", "x" * 300])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_float64("a.number", 0.25)
    writer.add_bool("a.flag", True)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


@pytest.mark.parametrize("write", [write_gguf, write_fields])
def test_the_fields_are_those_of_gguf(write, tmp_path):
    path = write(tmp_path / "a.gguf")
    own = gguf.GGUFReader(path)
    with parsed_once():
        fast = gguf.GGUFReader(path)
    assert type(fast) is not type(own)
    assert list(fast.fields) == list(own.fields)
    for name, field in own.fields.items():
        found = fast.fields[name]
        assert (found.offset, found.types, found.data) == (field.offset, field.types, field.data)
        assert [part.dtype for part in found.parts] == [part.dtype for part in field.parts]
        assert all(np.array_equal(a, b) for a, b in zip(found.parts, field.parts, strict=True))
    for found, tensor in zip(fast.tensors, own.tensors, strict=True):
        assert (found.name, found.data_offset) == (tensor.name, tensor.data_offset)
        np.testing.assert_array_equal(found.data, tensor.data)


def test_a_load_parses_once(path, monkeypatch):
    parsed = []
    before = gguf.GGUFReader.__init__

    def counted(self, *args, **kwargs):
        parsed.append(args)
        before(self, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    replaced = (gguf.GGUFReader, names.load_gguf_checkpoint, gguf.get_tensor_name_map)
    for quantize in ("auto", "none"):
        parsed.clear()
        llm.load(str(path), dtype="float32", quantize=quantize)
        assert len(parsed) == 1
    assert (gguf.GGUFReader, names.load_gguf_checkpoint, gguf.get_tensor_name_map) == replaced


def test_what_is_handed_out_is_nobody_elses_and_a_changed_file_is_parsed_again(path, tmp_path):
    with parsed_once():
        reader = gguf.GGUFReader(path)
        with parsed_once():
            assert gguf.GGUFReader(str(path)) is reader
        first = names.load_gguf_checkpoint(path)
        first["config"].clear()
        assert names.load_gguf_checkpoint(path)["config"]["hidden_size"] == 64
        write_fields(tmp_path / "other.gguf").replace(path)
        assert "a.strings" in gguf.GGUFReader(path).fields


@pytest.mark.parametrize("kept", [200, 203, 208])
def test_a_file_that_ends_early_is_refused(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"tokenizer.ggml.tokens") + kept])
    with parsed_once(), pytest.raises(ValueError, match="the file ends within an array of 256 strings"):
        gguf.GGUFReader(path)
    with pytest.raises(ModelError, match=r"the model in .* cannot be loaded"):
        llm.load(str(path))
