"""What all tests share: no network, no deadlines, and the optional folder with data sets."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# before any Hugging Face library is imported: a test must not depend on a hub that may or may not be reachable
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
