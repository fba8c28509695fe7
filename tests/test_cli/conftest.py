"""A tiny model on disk, data beside it, and the command line called in this process."""

from types import SimpleNamespace

import pytest
from tiny_models import write_llama

from eggroll.cli.main import main

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three.", "Who is it?", "Why?"]
TEXTS = [f"the cat sat on mat number {number}" for number in range(12)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Llama of 26,000 parameters with a byte-level tokenizer and a chat template."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def work(tmp_path, monkeypatch, model_dir):
    """A folder to work in: ``tiny/`` (the model), prompts.txt, held.txt, texts.txt, score.py."""
    (tmp_path / "tiny").symlink_to(model_dir)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "held.txt").write_text("What is blue?\nName a bird.\n")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "score.py").write_text("def score(text):\n    return -float(sum(map(ord, text)) % 97)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TUNE = ["tune", "tiny", "-r", "score.py", "--prompts", "prompts.txt", "-p", "4", "--rank", "1", "--max-tokens", "4"]
TUNE += ["--batch-size", "2", "--dtype", "float32", "--sigma", "0.05", "--lr", "0.02", "--report-to", "none"]


@pytest.fixture
def eggroll(work, capfd):
    """``eggroll("tune", ...)`` gives status, what was printed and what went to standard error."""

    def call(*arguments):
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:  # how tyro leaves
            status = left.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return SimpleNamespace(status=status, out=out, err=err)

    call.work = work
    call.tune = lambda *arguments: call(*TUNE, *arguments)
    call.tune_arguments = TUNE
    return call
