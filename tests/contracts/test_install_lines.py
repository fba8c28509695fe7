"""Printed install lines work as they are, and another project's package of nearly our name is noticed."""

import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from eggroll import _optional
from eggroll._optional import foreign_package, install_line, require
from eggroll.errors import MissingExtraError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class Installed:
    """A distribution's metadata."""

    def __init__(self, url):
        self.url = url

    def read_text(self, name):
        return None if self.url is None else json.dumps({"url": self.url})


def test_every_extra_that_is_named_exists():
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        named |= set(re.findall(r"""extra=["'](\w+)["']""", path.read_text(encoding="utf-8")))
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_from_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert install_line("rl") == "pip install -c constraints.txt -e '.[rl]'"
    monkeypatch.chdir(tmp_path)
    words = shlex.split(install_line("rl"))
    assert words[:3] == ["pip", "install", "-c"]
    assert Path(words[3]).is_file()
    assert words[4:] == ["-e", f"{ROOT}[rl]"]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("file:///wheels/eggroll_evolve-0.1.0-py3-none-any.whl", "/wheels/eggroll_evolve-0.1.0-py3-none-any.whl[rl]"),
        ("file:///my%20wheels/a.whl", "/my wheels/a.whl[rl]"),
        (None, "eggroll-evolve[rl]"),
    ],
)
def test_from_a_wheel_or_an_index(url, line, tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "eggroll" / "_optional.py"
    monkeypatch.setattr(_optional, "__file__", str(installed))
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(url))
    assert shlex.split(install_line("rl")) == ["pip", "install", line]


def test_the_name_is_the_projects():
    assert PROJECT["name"] == _optional.DISTRIBUTION
    own = [line for lines in PROJECT["optional-dependencies"].values() for line in lines if line.startswith("eggroll")]
    assert own
    assert all(line.startswith(f"{_optional.DISTRIBUTION}[") for line in own)


@pytest.mark.parametrize(("url", "is_said"), [(None, True), ("file:///home/me/eggroll", False)])
def test_the_other_projects_package_is_noticed(url, is_said, monkeypatch):
    """Not an old install of this project's own checkout."""
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.0")
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(url))
    assert ("eggroll-es 0.2.0, which is installed here, belongs to another project" in foreign_package()) == is_said
    with pytest.raises(MissingExtraError, match=r"Install it with: pip install .*\[rl\]") as caught:
        require("no_such_library", extra="rl")
    assert ("pip uninstall eggroll-es" in str(caught.value)) == is_said
