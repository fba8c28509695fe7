"""Names and texts that the terminal's encoding lacks never end a run."""

import io
import os
import subprocess
import sys

import pytest

from eggroll.cli.main import main


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_the_terminal_cannot_encode(eggroll, encoding):
    """An umlaut in the output path, arrows and emoji in prompts: the run and its last lines are all there."""
    (eggroll.work / "prompts.txt").write_text("red → blue?\nWas für?\n😀\n", encoding="utf-8")
    (eggroll.work / "held.txt").write_text("→ ü?\n猫?\n", encoding="utf-8")
    (eggroll.work / "scöre.py").write_text((eggroll.work / "score.py").read_text())
    arguments = ["-r", "scöre.py", "--eval-prompts", "held.txt", "-g", "1", "--lr", "0.5", "-o", "läufe→"]
    done = subprocess.run(
        [sys.executable, "-m", "eggroll.cli.main", *eggroll.tune_arguments, *arguments],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding)
    name = "läufe?" if encoding == "cp1252" else "l?ufe?"
    assert f"tiny on sc{name[1]}re.py".replace("ä", "ö") in out
    assert f"report   {name}/report.html" in out
    assert (eggroll.work / "läufe→/report.html").exists()
    assert b"Traceback" not in done.stderr


def test_error_texts_that_the_terminal_cannot_encode(eggroll, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["report", "nirgendwö"]) == 1
    stream.flush()
    assert b"error: nirgendw? does not exist" in stream.buffer.getvalue()


def test_a_directory_whose_name_is_no_text(eggroll):
    """Model files cannot be written there, which is said before the model is loaded."""
    name = os.fsdecode(b"l\xe4ufe")
    done = eggroll.tune("-g", "1", "-o", name)
    assert done.status == 1
    assert r"the name 'l\udce4ufe' cannot be read as text here" in done.err
    assert not (eggroll.work / name).exists()
