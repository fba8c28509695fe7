import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


@pytest.fixture(scope="session")
def toys():
    """The module of that name, sent to workers by value: tests are no package that they could import."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["toys"] = module
    spec.loader.exec_module(module)
    if importlib.util.find_spec("ray") is not None:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture(scope="session")
def cluster():
    """A Ray cluster in this machine with room for eight workers; pools use it and leave it running."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
