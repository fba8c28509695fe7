"""``eggroll recipe ...`` called in this process, in a folder of its own and without data sets of this machine."""

from types import SimpleNamespace

import pytest

from eggroll.cli.main import main


@pytest.fixture
def recipe(tmp_path, monkeypatch, capfd):
    """``recipe("mnist", ...)`` gives status, what was printed and what went to standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EGGROLL_DATA_DIR", raising=False)

    def call(*arguments, command="recipe"):
        capfd.readouterr()
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as left:  # how tyro leaves, and an interrupted run
            status = left.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return SimpleNamespace(status=status, out=out, err=err)

    return call
