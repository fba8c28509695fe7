"""Small C libraries, compiled on first use with the machine's C compiler.

The sources need no headers but ``stdint.h`` and compile in a fraction of a second, where torch.compile takes half a
minute. A library is made for this process in a temporary directory, which is deleted once it is loaded: nothing is
kept, so nothing can be stale or for another machine. Whoever loads one has plain operations to fall back to.
"""

from __future__ import annotations

import ctypes
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eggroll._environment import NO_C, is_on, value

# The two -fno flags let the compiler use vector instructions for square roots and selections; neither changes a result.
COMMON = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TUNE = ("-march=native",)
COMPILERS = ("cc", "gcc", "clang")


def compiler_command() -> list[str]:
    """``$CC``, or the first compiler there is; empty if there is none."""
    named = value("CC")
    return shlex.split(named) if named else [path for path in map(shutil.which, COMPILERS) if path][:1]


def load(name: str, source: str, flags: Sequence[str]) -> ctypes.CDLL | str:
    """The loaded library of a C source, or the reason why there is none.

    Args:
        name: of the files, for messages of the compiler.
        source: of the library.
        flags: for the compiler, beside the common ones; ``-march=native`` is left out if the compiler refuses it.
    """
    if is_on(NO_C):
        return f"{NO_C} is set"
    compiler = compiler_command()
    if not compiler:
        return f"no C compiler found (looked for $CC, {', '.join(COMPILERS)})"
    try:
        with tempfile.TemporaryDirectory(prefix="eggroll-", ignore_cleanup_errors=True) as directory:
            code, shared = Path(directory, f"{name}.c"), Path(directory, f"{name}.so")
            code.write_text(source)
            for tune in (TUNE, ()):
                command = [*compiler, *COMMON, *flags, *tune, str(code), "-o", str(shared)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=not tune)
                if done.returncode == 0:
                    break
            return ctypes.CDLL(str(shared))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{' '.join(compiler)} could not make the library: {detail.strip()[-500:]}"
