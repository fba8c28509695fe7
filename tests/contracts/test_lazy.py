"""Public names that are imported on first use: what a package offers, and what is said when something is missing."""

from __future__ import annotations

import sys
import types

import pytest

from eggroll._lazy import attach
from eggroll._optional import install_line
from eggroll.errors import MissingExtraError

PACKAGES = ["eggroll", "eggroll.torch", "eggroll.distributed"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one name that can be loaded, and two that cannot."""
    (tmp_path / "good_home.py").write_text("class Good: pass\n")
    (tmp_path / "needy_home.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "broken_home.py").write_text("import eggroll.a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = types.ModuleType("made_up")
    homes = {"Good": "good_home", "Needy": "needy_home", "Broken": "broken_home"}
    made.__getattr__, made.__dir__, made.__all__ = attach("made_up", homes, extra="llm", eager=("here",))
    monkeypatch.setitem(sys.modules, "made_up", made)
    return made


def test_names_are_loaded_once_and_on_first_use(package):
    assert dir(package) == package.__all__ == ["Broken", "Good", "Needy", "here"]
    assert "Good" not in vars(package)
    assert package.Good is sys.modules["good_home"].Good
    assert vars(package)["Good"] is package.Good


def test_a_missing_library_is_named_with_the_extra_that_brings_it(package):
    with pytest.raises(MissingExtraError) as caught:
        _ = package.Needy
    assert str(caught.value) == (
        "made_up.Needy needs 'a_library_that_is_not_there', which is not installed. "
        f"Install it with: {install_line('llm')}"
    )


def test_a_module_of_ours_that_is_missing_is_a_mistake_of_ours(package):
    with pytest.raises(ModuleNotFoundError, match=r"eggroll\.a_module_that_is_not_there"):
        _ = package.Broken


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there(name):
    package = pytest.importorskip(name)
    assert dir(package) == package.__all__
    assert all(getattr(package, public) is not None for public in package.__all__)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'NoSuchName'"):
        _ = package.NoSuchName
