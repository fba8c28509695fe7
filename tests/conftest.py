"""What all tests share: no network, no deadlines, and the optional folder with data sets."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# before any Hugging Face library is imported: a test must not depend on a hub that may or may not be reachable
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A command takes fewer threads on a busy machine, and sums are then rounded otherwise.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

# An activated environment: programs are called by their names in what is printed.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

# The key that seals runs is made in this folder, not in the user's own.
if "XDG_STATE_HOME" not in os.environ:
    _state = tempfile.mkdtemp(prefix="eggroll-state-")
    atexit.register(shutil.rmtree, _state, ignore_errors=True)
    os.environ["XDG_STATE_HOME"] = _state

# What a shell starts in the background ignores SIGINT, and tests of Ctrl-C send it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Many tests compile the same programs: each is compiled once in a run of the suite, whatever process it is in. The
# directory is the session's own, because entries are tied to versions and to the machine.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="eggroll-jax-cache-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# A busy machine is no failure; and CI must fail on the same examples when it is run again.
settings.register_profile("eggroll", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("eggroll")


@pytest.fixture
def data_dir():
    """The folder with MNIST, GSM8K and text, named by EGGROLL_DATA_DIR."""
    folder = os.environ.get("EGGROLL_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EGGROLL_DATA_DIR does not name a folder with data sets")
    return Path(folder)
