"""Which settings of a run's directory are believed: none that runs code, unless this user asked for it on this machine.

A run's directory may come from anyone. Some settings run code that is not eggroll's: a reward that is a lambda, a file
or a module, ``--trust-remote-code``, an environment's module (``runs_code`` in :func:`eggroll.core.settings.setting`).
They come from the command line of the command that runs the code. So that a user need not type them again for every
``--resume``, a run that is started here gets a seal in ``environment.json``: an HMAC of these settings with a key that
only this user can read. Settings that were changed, or that another user or another machine wrote, have no valid seal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from eggroll._command import typed
from eggroll.core.settings import about, flag_of, may_change
from eggroll.errors import RunError
from eggroll.run.run_dir import RunDir

SEAL = "code_seal"
"""The key of ``environment.json`` that holds the seal."""


def code_of(options: Any) -> dict[str, Any]:
    """The settings among ``options`` whose values run code that is not eggroll's."""
    found = {}
    for field in dataclasses.fields(options):
        rule, value = about(type(options), field.name).get("runs_code"), getattr(options, field.name)
        if rule is not None and rule(value):
            found[field.name] = value
    return found


def seal(options: Any) -> dict[str, str]:
    """The entry of ``environment.json`` for a run with ``options``; empty if there is nothing to seal, or no key."""
    key = None if not _remembered(options) else _key()
    return {} if key is None else {SEAL: _digest(options, key)}


def believed(options: Any, run: RunDir) -> Any:
    """``options``, which were read from a run's directory, without what would run code that nobody here asked for."""
    dropped = dict(code_of(options))
    if _is_sealed(options, run):
        for name in _remembered(options):
            del dropped[name]
    return without(options, dropped)


def without(options: Any, names: Any) -> Any:
    """``options`` with the defaults of ``names``, apart from those that have none."""
    defaults = {field.name: field.default for field in dataclasses.fields(options) if field.name in names}
    return dataclasses.replace(options, **defaults)


def check_resumed(before: Any, options: Any, run: RunDir, command: str) -> None:
    """Refuse to resume without code that the run had and that ``options`` do not ask for.

    What a resumed run may do without (``--ray-address``) is a warning.

    Raises:
        RunError: the message says what is missing and has the command with it.
    """
    had = code_of(before)
    missing = [name for name, value in had.items() if getattr(options, name) != value and _is_default(options, name)]
    optional = [name for name in missing if name in may_change(options)]
    for name in optional:
        warnings.warn(
            f"the run in {run.path} used {_words(name, had[name])}, which is not taken from a run's directory, as it "
            "may run code or act in your name: add it to the command if it is still wanted",
            stacklevel=3,
        )
    needed = [name for name in missing if name not in optional]
    if needed:
        used = " and ".join(_words(name, had[name]) for name in needed)
        raise RunError(
            f"this run used {used}, which runs code, and a run's directory is not trusted with that: it may come from "
            "someone else, or have been changed. If you trust the code, add it to the command:\n"
            f"  {_command(command, before, options, run, needed)}"
        )


def check_replayed(options: Any, run: RunDir, to: int | None, *, trust_remote_code: bool) -> Any:
    """The options for a replay, which needs no reward: only code that it cannot do without, if that is allowed.

    Raises:
        RunError: the run had such code and it is not allowed; the message has the command that allows it.
    """
    end = "" if to is None else f" --to {to}"
    command = f"{typed()} replay {_quoted(str(run.path))}{end}"
    return without_reward(options, command, trust_remote_code=trust_remote_code)


def without_reward(options: Any, command: str, *, trust_remote_code: bool) -> Any:
    """The options for what needs a run's model and no reward, without code that is not needed for that.

    Args:
        options: of the run.
        command: what was typed, for the message.
        trust_remote_code: code that cannot be done without is allowed.

    Raises:
        RunError: the run had such code and it is not allowed; the message has the command that allows it.
    """
    code = code_of(options)
    needed = [name for name in code if about(type(options), name).get("always_ask")]
    if needed and not trust_remote_code:
        used = " and ".join(_words(name, code[name]) for name in needed)
        raise RunError(
            f"this run used {used}, which runs code, and a run's directory is not trusted with that. If you trust the "
            f"code, add --trust-remote-code: {command} --trust-remote-code"
        )
    return without(options, set(code) - set(needed))


def _remembered(options: Any) -> dict[str, Any]:
    code = code_of(options).items()
    return {name: value for name, value in code if not about(type(options), name).get("always_ask")}


def _is_sealed(options: Any, run: RunDir) -> bool:
    found = run.environment.get(SEAL)
    if not isinstance(found, str) or not found.isascii():
        return False
    key = _key(make=False)
    return key is not None and hmac.compare_digest(found, _digest(options, key))


def _digest(options: Any, key: bytes) -> str:
    # The same words mean other code in another folder: relative paths and modules hold only where they were typed.
    code = {name: [str(value), _place(str(value))] for name, value in sorted(_remembered(options).items())}
    return hmac.new(key, json.dumps(code).encode(), hashlib.sha256).hexdigest()


def _place(value: str) -> str:
    anywhere = value.strip().startswith(("lambda", "{")) or Path(value).expanduser().is_absolute()
    return "" if anywhere else os.getcwd()


def _key(*, make: bool = True) -> bytes | None:
    """This user's key, made when it is first needed; ``None`` if it cannot be kept, or is not this user's alone."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    with suppress(OSError, RuntimeError):  # no home
        path = Path(state).expanduser() / "eggroll" / "key"
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.write(descriptor, secrets.token_bytes(32))
                finally:
                    os.close(descriptor)
        facts = path.stat()
        if hasattr(os, "getuid") and (facts.st_uid != os.getuid() or facts.st_mode & 0o077):
            return None
        key = path.read_bytes() if facts.st_size == 32 else b""
        return key if len(key) == 32 else None
    return None


def _is_default(options: Any, name: str) -> bool:
    fields = {field.name: field for field in dataclasses.fields(options)}
    return bool(getattr(options, name) == fields[name].default)


def _command(command: str, before: Any, options: Any, run: RunDir, needed: list[str]) -> str:
    """The command as it was given, as far as it is not what the run says anyway, with what it lacks."""
    words = [command, "--resume", _quoted(str(run.path))]
    words += [_words(name, getattr(before, name)) for name in needed]
    for field in dataclasses.fields(before):
        value = getattr(options, field.name)
        if field.name not in ("resume", *needed) and value != getattr(before, field.name):
            words.append(_words(field.name, value))
    return " ".join(words)


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(name) if value else f"--no-{flag_of(name).removeprefix('--')}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([flag_of(name), *(_quoted(str(item)) for item in values)])


def _quoted(text: str) -> str:
    """A word as a shell takes it; one with control characters, which a terminal would obey, as a JSON string."""
    return shlex.quote(text) if text.isprintable() else json.dumps(text)
