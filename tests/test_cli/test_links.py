"""Commands write and remove nothing outside of a run, whatever links are in it."""

import shutil

import pytest

from eggroll.run.lock import locked


@pytest.fixture
def base(eggroll):
    """A finished run, and a folder that has to stay as it is."""
    assert eggroll.tune("-g", "2", "-o", "base").status == 0
    (eggroll.work / "victim").mkdir()
    (eggroll.work / "victim/manifest.json").write_text("mine")
    return eggroll.work / "base"


def refused(done):
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    return done.err


def test_links_are_not_followed(eggroll, base):
    victim = eggroll.work / "victim"
    (base / "checkpoints/generation-000006").symlink_to(victim)
    error = refused(eggroll("tune", "--resume", "base", "-g", "3"))
    assert "error: base/checkpoints/generation-000006 is a symbolic link where a directory belongs" in error
    (base / "checkpoints/generation-000006").unlink()
    (base / "replay-2").symlink_to(victim)
    assert "base/replay-2 is a symbolic link" in refused(eggroll("replay", "base"))
    (base / "best").symlink_to(eggroll.work / "victim")
    assert "base/best is a symbolic link" in refused(eggroll("replay", "base", "-o", "base/best/inner"))
    shutil.rmtree(base / "model")
    (base / "model").symlink_to(victim)
    for arguments in (["tune", "--resume", "base"], ["report", "base"], ["replay", "base"]):
        assert "base/model is a symbolic link" in refused(eggroll(*arguments))
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"manifest.json": "mine"}
    (base / "model").unlink()
    assert eggroll("replay", "base", "-o", "victim").status == 0  # what a user names is the user's


def test_a_run_that_goes_on_is_not_resumed_but_can_be_read(eggroll, base):
    before = (base / "environment.json").read_bytes()
    with locked("base"):
        error = refused(eggroll("tune", "--resume", "base", "-g", "3"))
        assert "error: the run in base is in use: " in error
        assert eggroll("report", "base").status == 0
        assert eggroll("replay", "base").status == 0
    assert (base / "environment.json").read_bytes() == before
    assert not (base / ".lock").exists()
